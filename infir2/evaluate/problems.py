"""Held-out problems: their prompts, an engine's responses, and whether these are correct."""

from collections.abc import Callable, Sequence
from typing import Any

from infir2.config.schema import EvaluateSection
from infir2.data import ChatTokenizer, Prompt, load_prompts
from infir2.data.types import RowError
from infir2.engines.generate import generate_batches, group_requests
from infir2.engines.types import Completion, Engine, Request, SamplingParams
from infir2.errors import DataError
from infir2.evaluate.statistics import (
    Evaluation,
    average_at_k,
    by_difficulty,
    majority_at_k,
    mean_pass_at_k,
    tokens_mean_and_p95,
)
from infir2.faults import fault
from infir2.model import ModelConfig
from infir2.train.plan import check_positions
from infir2.verify import check_math_batch

Row = dict[str, Any]


def load_problems(section: EvaluateSection) -> list[Prompt]:
    """The first `max_problems` problems of the recipe's sources. Raises DataError."""
    return load_prompts(section.problems)[: section.max_problems or None]


def encode_problem(
    tokenizer: ChatTokenizer, problem: Prompt, section: EvaluateSection
) -> tuple[list[int], str]:
    """The problem as a chat up to where the model continues, and the text that begins a response.

    Raises DataError for a problem that the template rejects.
    """
    messages = problem.messages
    if section.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": section.system_prompt}, *messages]
    try:
        return tokenizer.encode_prompt(messages, section.response_prefix)
    except RowError as error:
        raise DataError(f"{problem.origin}: {error}; fix the row, or name another model") from None


def response_requests(
    engine: Engine,
    tokenizer: ChatTokenizer,
    problems: Sequence[Prompt],
    section: EvaluateSection,
    seed: int,
) -> list[Request]:
    """`section.samples` requests for each problem, in order, named "PROBLEM_ID/SAMPLE"."""
    prompts = [(each.id, encode_problem(tokenizer, each, section)[0]) for each in problems]
    params = SamplingParams(
        section.temperature, section.max_response_tokens, tokenizer.eos_token_ids, section.top_p
    )
    return group_requests(prompts, section.samples, params, seed, engine.policy_version)


def check_response_positions(
    config: ModelConfig,
    tokenizer: ChatTokenizer,
    problems: Sequence[Prompt],
    section: EvaluateSection,
) -> None:
    """Raises ConfigError if a problem and its response may exceed the model's positions."""
    longest = max(len(encode_problem(tokenizer, each, section)[0]) for each in problems)
    check_positions(config, "evaluate.max_response_tokens", section.max_response_tokens, longest)


def answer_problems(
    engine: Engine,
    tokenizer: ChatTokenizer,
    problems: Sequence[Prompt],
    section: EvaluateSection,
    seed: int,
    check: Callable[[], None] = lambda: None,
    kept: Sequence[Row] = (),
    on_rows: Callable[[list[Row]], None] = lambda _: None,
) -> list[Row]:
    """Generate and check `section.samples` responses to each problem.

    Args:
        check: called after each step of the engine; what it raises ends the evaluation.
        kept: rows of an interrupted evaluation with the same arguments; they are not sampled again.
        on_rows: receives the new rows as their responses end.

    Returns:
        A row per response, in order of the problems: problem (id), sample (0 to samples - 1),
        prompt, response, answer (the reference), extracted (the response's own, "" without one),
        reward (0 or 1), tokens, truncated.
    """
    requests = response_requests(engine, tokenizer, problems, section, seed)
    owners = [problem for problem in problems for _ in range(section.samples)]
    owner_of = {request.id: owner for request, owner in zip(requests, owners, strict=True)}
    rows = {f"{row['problem']}/{row['sample']}": row for row in kept}
    missing = [request for request in requests if request.id not in rows]
    for completions in generate_batches(engine, missing, check):
        batch = [(completion, owner_of[completion.id]) for completion in completions]
        new = _checked_rows(batch, tokenizer, section)
        on_rows(new)
        rows |= {completion.id: row for completion, row in zip(completions, new, strict=True)}
        for _ in new:
            fault("evaluate")
    return [rows[request.id] for request in requests]


def _checked_rows(
    batch: Sequence[tuple[Completion, Prompt]], tokenizer: ChatTokenizer, section: EvaluateSection
) -> list[Row]:
    texts = [
        encode_problem(tokenizer, problem, section)[1] + tokenizer.decode(completion.token_ids)
        for completion, problem in batch
    ]
    pairs = [(text, problem.answer) for text, (_, problem) in zip(texts, batch, strict=True)]
    verdicts = check_math_batch(pairs, answer_format=section.answer_format)
    return [
        {
            "problem": problem.id,
            "sample": int(completion.id.rpartition("/")[2]),
            "prompt": problem.messages[-1]["content"],
            "response": text,
            "answer": problem.answer,
            "extracted": "" if verdict.reason == "no_answer" else verdict.answer,
            "reward": float(verdict.correct),
            "tokens": len(completion.token_ids),
            "truncated": completion.finish == "length",
        }
        for (completion, problem), text, verdict in zip(batch, texts, verdicts, strict=True)
    ]


def summarize(problems: Sequence[Prompt], rows: Sequence[Row], k: int) -> Evaluation:
    """Scores of the rows of `answer_problems`, k for each problem, in any order."""
    by_id: dict[str, list[Row]] = {problem.id: [] for problem in problems}
    for row in rows:
        by_id[row["problem"]].append(row)
    rewards = [[row["reward"] for row in own] for own in by_id.values()]
    votes = [
        majority_at_k([(row["extracted"], row["reward"] > 0) for row in own])
        for own in by_id.values()
    ]
    average = average_at_k(rewards)
    tokens_mean, tokens_p95 = tokens_mean_and_p95([row["tokens"] for row in rows])
    return Evaluation(
        avg_at_k=average.mean,
        low=average.low,
        high=average.high,
        k=k,
        pass_at_k=mean_pass_at_k(rewards, k),
        majority_at_k=sum(votes) / len(votes),
        num_problems=len(problems),
        truncated_fraction=_fraction([row["truncated"] for row in rows]),
        empty_fraction=_fraction([not row["response"].strip() for row in rows]),
        answerless_fraction=_fraction([not row["extracted"] for row in rows]),
        response_tokens_mean=tokens_mean,
        response_tokens_p95=tokens_p95,
        by_difficulty=by_difficulty(rewards, [problem.difficulty for problem in problems]),
    )


def _fraction(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
