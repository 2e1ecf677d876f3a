"""`infir2 eval` and the evaluation inside RL: sample k responses to every held-out problem, check them, write scores with intervals."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from infir2.checkpoint.record import MetricsWriter
from infir2.config.load import Loaded
from infir2.config.resume import dump
from infir2.config.schema import EvalRecipe, EvaluateSection, RlRecipe
from infir2.data import ChatTokenizer, Prompt, load_prompts
from infir2.engines.native import NativeEngine
from infir2.engines.types import Completion, Engine, SamplingParams, part_of, respond
from infir2.evaluate.statistics import Evaluation, average_at_k, by_difficulty, mean_pass_at_k
from infir2.faults import fault
from infir2.terminal import log_text
from infir2.train.build import build_model, open_tokenizer
from infir2.train.supervisor import Session, describe_environment
from infir2.verify import check_math_batch

SAMPLE_ROWS = 24  # responses written to samples.jsonl


def answer_problems(
    engine: Engine,
    tokenizer: ChatTokenizer,
    problems: Sequence[Prompt],
    section: EvaluateSection,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """A row per response (prompt, response, answer, correct, truncated), k per problem. `check` is called all the time."""
    prompts = [(problem.id, prompt_token_ids(tokenizer, problem, section)) for problem in problems]
    params = SamplingParams(
        section.temperature, section.max_response_tokens, tokenizer.eos_token_ids, section.top_p
    )
    found: dict[int, list[Completion]] = {}
    for place, responses in respond(engine, prompts, section.samples, seed, params, check):
        found[place] = responses
        fault("evaluate")
    completions = [completion for place in range(len(problems)) for completion in found[place]]
    texts = [
        section.response_prefix + tokenizer.decode(completion.token_ids)
        for completion in completions
    ]
    owners = [problem for problem in problems for _ in range(section.samples)]
    verdicts = check_math_batch(
        [(text, owner.answer) for text, owner in zip(texts, owners, strict=True)]
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


def prompt_token_ids(
    tokenizer: ChatTokenizer, problem: Prompt, section: EvaluateSection
) -> list[int]:
    """The problem as a chat, up to where the assistant's answer goes on."""
    system = [{"role": "system", "content": section.system_prompt}] if section.system_prompt else []
    ids = tokenizer.apply_chat_template([*system, *problem.messages], add_generation_prompt=True)
    return (
        [*ids, *tokenizer.encode_with_special_tokens(section.response_prefix)]
        if section.response_prefix
        else ids
    )


def run_evaluation(loaded: Loaded[EvalRecipe]) -> None:
    """Evaluate `model.path` (a run, or a Hugging Face directory, FP8 or not) and write the scores to `run.dir`."""
    recipe = loaded.recipe
    tokenizer, _ = open_tokenizer(recipe.model)
    problems = open_problems(recipe.evaluate)
    engine = NativeEngine(
        build_model(recipe.model, recipe.fp8, recipe.run, tokenizer.vocab_size),
        recipe.rollout.max_running_requests,
    )
    rows = answer_problems(engine, tokenizer, problems, recipe.evaluate, recipe.run.seed)
    scores = summary(problems, rows, recipe.evaluate.samples)
    directory = Path(recipe.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.toml").write_text(dump(loaded), encoding="utf-8")
    (directory / "environment.json").write_text(
        json.dumps(describe_environment(), indent=1) + "\n", encoding="utf-8"
    )
    metrics = MetricsWriter(directory, resumed_step=0)
    metrics.write("evaluation", 1, **asdict(scores))
    metrics.write_samples([{"step": 1} | row for row in rows[:SAMPLE_ROWS]])
    metrics.close()
    log_text(describe(scores))


def in_loop_evaluator(
    recipe: RlRecipe,
) -> Callable[[Engine, ChatTokenizer, int, Session], None] | None:
    """The evaluation that `run_rl` calls every `rl.evaluate_every` steps; None when the recipe names no problems."""
    if not recipe.evaluate.problems:
        return None
    problems = open_problems(recipe.evaluate)

    def evaluate(engine: Engine, tokenizer: ChatTokenizer, step: int, session: Session) -> None:
        session.beat(f"the evaluation after step {step}")
        mine = part_of(engine, session.ranks, problems)
        parts = session.divided(
            lambda check: answer_problems(
                engine, tokenizer, mine, recipe.evaluate, recipe.run.seed, check
            )
        )
        scores = summary(problems, list(chain.from_iterable(parts)), recipe.evaluate.samples)
        session.metrics.write("evaluation", step, **asdict(scores))
        session.progress.log(f"step {step}: {describe(scores)}")

    return evaluate


def open_problems(section: EvaluateSection) -> list[Prompt]:
    return load_prompts(section.problems)[: section.max_problems or None]


def describe(scores: Evaluation) -> str:
    """One line for people. Example: 'avg@4 0.412 +- 0.031, pass@4 0.700 on 300 problems, 1.2 % truncated'."""
    return (
        f"avg@{scores.k} {scores.avg_at_k:.3f} +- {scores.interval:.3f}, pass@{scores.k} {scores.pass_at_k:.3f} "
        f"on {scores.num_problems} problems, {100 * scores.truncated_fraction:.1f} % truncated"
    )


def summary(problems: Sequence[Prompt], rows: list[dict[str, Any]], k: int) -> Evaluation:
    """Scores of `rows`, k for each problem, in any order."""
    by_problem: dict[str, list[float]] = {problem.id: [] for problem in problems}
    for row in rows:
        by_problem[row["problem"]].append(row["reward"])
    correct = list(by_problem.values())
    average = average_at_k(correct)
    return Evaluation(
        avg_at_k=average.mean,
        interval=average.interval,
        k=k,
        pass_at_k=mean_pass_at_k(correct, k),
        num_problems=len(problems),
        truncated_fraction=sum(row["truncated"] for row in rows) / len(rows),
        by_difficulty=by_difficulty(correct, [problem.difficulty for problem in problems]),
    )
