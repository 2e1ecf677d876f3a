"""Held-out problems: their prompts, an engine's responses, and whether these are correct."""

from collections.abc import Callable, Sequence
from typing import Any

from infir2.config.schema import EvaluateSection
from infir2.data import ChatTokenizer, Prompt, load_prompts
from infir2.engines.generate import generate_groups
from infir2.engines.types import Completion, Engine, SamplingParams
from infir2.evaluate.statistics import Evaluation, average_at_k, by_difficulty, mean_pass_at_k
from infir2.faults import fault
from infir2.verify import check_math_batch


def load_problems(section: EvaluateSection) -> list[Prompt]:
    """The first `max_problems` problems of the recipe's sources. Raises DataError."""
    return load_prompts(section.problems)[: section.max_problems or None]


def prompt_token_ids(
    tokenizer: ChatTokenizer, problem: Prompt, section: EvaluateSection
) -> list[int]:
    """The problem as a chat, up to the point where the model continues the assistant's turn."""
    system = [{"role": "system", "content": section.system_prompt}] if section.system_prompt else []
    ids = tokenizer.apply_chat_template([*system, *problem.messages], add_generation_prompt=True)
    if not section.response_prefix:
        return ids
    return [*ids, *tokenizer.encode_with_special_tokens(section.response_prefix)]


def answer_problems(
    engine: Engine,
    tokenizer: ChatTokenizer,
    problems: Sequence[Prompt],
    section: EvaluateSection,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Generate and check `section.samples` responses to each problem.

    Returns a row per response, in order of the problems: problem (id), prompt, response, answer,
    reward (0 or 1), truncated. `check` is called after each step of the engine; what it raises ends
    the evaluation.
    """
    prompts = [(problem.id, prompt_token_ids(tokenizer, problem, section)) for problem in problems]
    params = SamplingParams(
        section.temperature, section.max_response_tokens, tokenizer.eos_token_ids, section.top_p
    )
    groups: dict[int, list[Completion]] = {}
    for index, group in generate_groups(engine, prompts, section.samples, params, seed, check):
        groups[index] = group
        fault("evaluate")
    owners = [problem for problem in problems for _ in range(section.samples)]
    completions = [completion for index in range(len(problems)) for completion in groups[index]]
    texts = [section.response_prefix + tokenizer.decode(each.token_ids) for each in completions]
    verdicts = check_math_batch(
        [(text, owner.answer) for text, owner in zip(texts, owners, strict=True)],
        answer_format=section.answer_format,
    )
    return [
        {
            "problem": owner.id,
            "prompt": owner.messages[-1]["content"],
            "response": text,
            "answer": owner.answer,
            "reward": float(verdict.correct),
            "truncated": completion.finish == "length",
        }
        for owner, text, verdict, completion in zip(
            owners, texts, verdicts, completions, strict=True
        )
    ]


def summarize(problems: Sequence[Prompt], rows: Sequence[dict[str, Any]], k: int) -> Evaluation:
    """Scores of the rows of `answer_problems`, k for each problem, in any order."""
    rewards: dict[str, list[float]] = {problem.id: [] for problem in problems}
    for row in rows:
        rewards[row["problem"]].append(row["reward"])
    by_problem = list(rewards.values())
    average = average_at_k(by_problem)
    return Evaluation(
        avg_at_k=average.mean,
        interval=average.interval,
        k=k,
        pass_at_k=mean_pass_at_k(by_problem, k),
        num_problems=len(problems),
        truncated_fraction=sum(row["truncated"] for row in rows) / len(rows),
        by_difficulty=by_difficulty(by_problem, [problem.difficulty for problem in problems]),
    )
