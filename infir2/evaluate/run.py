"""`infir2 eval`: sample k responses to every held-out problem, check them, write the scores."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from infir2.checkpoint.fingerprint import fingerprint
from infir2.config.load import Loaded
from infir2.config.schema import EvalRecipe
from infir2.data import ChatTokenizer, Prompt
from infir2.engines.native import NativeEngine
from infir2.evaluate.output import (
    SamplesWriter,
    check_output,
    claim_output,
    finished_scores,
    resume_output,
    write_results,
)
from infir2.evaluate.problems import (
    Row,
    answer_problems,
    check_response_positions,
    encode_problem,
    load_problems,
    summarize,
)
from infir2.evaluate.statistics import Evaluation
from infir2.terminal import StepProgress, begin_phase, log, log_text
from infir2.train.banner import start_banner
from infir2.train.build import build_model, open_tokenizer
from infir2.train.plan import device_of, planned_config, set_up_torch


def run_evaluation(loaded: Loaded[EvalRecipe]) -> Evaluation:
    """Evaluate `model.path` (a run or a Hugging Face directory) and write the scores to `run.dir`.

    Continues an interrupted evaluation with the same settings; a finished one is not repeated.
    Prints the scores and returns them.

    Everything that can refuse the command does so before the first response is sampled. Raises
    OutputExistsError and ConfigError as `check_output` and `claim_output`, and the errors of
    loading the model, the tokenizer and the problems.
    """
    recipe = loaded.recipe
    check_output(loaded)
    set_up_torch(recipe.run)
    tokenizer = open_tokenizer(recipe.model)
    begin_phase("reading the problems")
    problems = load_problems(recipe.evaluate)
    model_config = planned_config(recipe.model)
    check_response_positions(model_config, tokenizer, problems, recipe.evaluate)
    inputs = {
        "model.path": fingerprint(Path(recipe.model.path)),
        "evaluate.problems": _problems_fingerprint(recipe, tokenizer, problems),
    }
    with claim_output(loaded, inputs) as directory:
        scores = finished_scores(directory)
        if scores is not None:
            log(f"{directory} has this evaluation, finished; nothing was sampled.", "eval")
            log_text(scores.describe())
            return scores
        model = build_model(recipe.model, recipe.fp8, recipe.run, tokenizer.vocab_size)
        log(start_banner(model.config, recipe.fp8, device_of(recipe.run)), "eval")
        engine = NativeEngine(model, recipe.rollout.max_running_requests, recipe.rollout.cache_gib)
        kept = resume_output(loaded, inputs)
        rows = _sample(recipe, engine, tokenizer, problems, kept)
        scores = summarize(problems, rows, recipe.evaluate.samples)
        log_text(scores.describe())
        write_results(directory, scores, rows)
        log(f"finished: scores and {len(rows)} responses are in {directory}", "eval")
        return scores


def _sample(
    recipe: EvalRecipe,
    engine: NativeEngine,
    tokenizer: ChatTokenizer,
    problems: Sequence[Prompt],
    kept: Sequence[Row],
) -> list[Row]:
    """All responses: those that an interrupted evaluation kept, and new ones."""
    section = recipe.evaluate
    progress = _Progress(len(problems) * section.samples, kept)
    samples = SamplesWriter(Path(recipe.run.dir))

    def on_rows(rows: list[Row]) -> None:
        samples.write(rows)
        progress.add(rows)

    try:
        check, seed = progress.show, recipe.run.seed
        return answer_problems(engine, tokenizer, problems, section, seed, check, kept, on_rows)
    finally:
        samples.close()
        progress.close()


class _Progress:
    """How many responses are done and right, and how far those in progress have come."""

    def __init__(self, total: int, kept: Sequence[Row]) -> None:
        self._done, self._right, self._tokens = 0, 0.0, 0
        self._bar = StepProgress("eval", total, len(kept), unit="response")
        if kept:
            self._bar.log(f"resumed after {len(kept)} of {total} responses")
        self.add(kept)

    def add(self, rows: Sequence[Row]) -> None:
        self._done += len(rows)
        self._right += sum(row["reward"] for row in rows)

    def show(self) -> None:
        """Call this after each step of the engine, which decodes one token of each response."""
        self._tokens += 1
        right = f"{100 * self._right / self._done:.1f} % right" if self._done else "none ended yet"
        self._bar.update(self._done, f"{right}, decoding step {self._tokens}")

    def close(self) -> None:
        self._bar.close()


def _problems_fingerprint(
    recipe: EvalRecipe, tokenizer: ChatTokenizer, problems: Sequence[Prompt]
) -> str:
    """SHA-256 of what the problems and the tokenizer contribute to the responses and rewards."""
    lines = [
        [problem.id, encode_problem(tokenizer, problem, recipe.evaluate)[0], problem.answer]
        for problem in problems
    ]
    text = json.dumps([lines, tokenizer.eos_token_ids, tokenizer.fingerprint()])
    return hashlib.sha256(text.encode()).hexdigest()
