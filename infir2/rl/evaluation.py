"""The evaluation inside RL: the policy's scores on held-out problems, every `rl.evaluate_every`
steps."""

from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from infir2.config.schema import RlRecipe
from infir2.data import ChatTokenizer
from infir2.engines.generate import items_of_rank
from infir2.engines.types import Engine
from infir2.errors import disk_reason
from infir2.evaluate.problems import (
    answer_problems,
    check_response_positions,
    load_problems,
    summarize,
)
from infir2.files import encode_json_line, make_own_directory, write_atomically
from infir2.model import ModelConfig
from infir2.train.plan import last_step_of
from infir2.train.supervisor import Supervisor

EVALUATIONS = "evaluations"


class InLoopEvaluation:
    """Evaluates with the engine of the rollouts. Without `evaluate.problems` it is never due."""

    def __init__(self, recipe: RlRecipe) -> None:
        """Load the problems. Raises DataError."""
        self._recipe = recipe
        self._last_step = last_step_of(recipe, recipe.schedule)
        self._problems = load_problems(recipe.evaluate) if recipe.evaluate.problems else []

    def check_positions(self, config: ModelConfig, tokenizer: ChatTokenizer) -> None:
        """Raises ConfigError if a problem and its response exceed the model's positions."""
        section = self._recipe.evaluate
        if self._problems and self._recipe.rl.evaluate_every:
            check_response_positions(config, tokenizer, self._problems, section)

    def is_due(self, step: int) -> bool:
        """Whether an evaluation belongs after this step."""
        every, last = self._recipe.rl.evaluate_every, self._last_step
        return bool(self._problems and every and step and (step % every == 0 or step == last))

    def run(
        self, engine: Engine, tokenizer: ChatTokenizer, step: int, supervisor: Supervisor
    ) -> None:
        """Log the scores of the engine's weights. Every rank calls this and answers its part."""
        supervisor.heartbeat(f"the evaluation after step {step}")
        section, seed = self._recipe.evaluate, self._recipe.run.seed
        problems = items_of_rank(engine, supervisor.ranks, self._problems)
        parts: list[list[dict[str, Any]]] = supervisor.all_gather_results(
            lambda check: answer_problems(engine, tokenizer, problems, section, seed, check)
        )
        rows = list(chain.from_iterable(parts))
        scores = summarize(self._problems, rows, section.samples)
        if supervisor.ranks.is_rank0:
            self._keep(step, rows, supervisor)
        supervisor.log.write("evaluation", step, **asdict(scores))
        supervisor.log.message(f"step {step}: {scores.describe()}")

    def _keep(self, step: int, rows: list[dict[str, Any]], supervisor: Supervisor) -> None:
        """Write every response to `run.dir`/evaluations; a disk that refuses stops no training."""
        path = Path(self._recipe.run.dir) / EVALUATIONS / f"step-{step}.jsonl"
        try:
            make_own_directory(path.parent)
            write_atomically(path, b"".join(encode_json_line({"step": step} | row) for row in rows))
        except OSError as error:
            reason = disk_reason(error)
            supervisor.log.message(f"{path} cannot be written ({reason}); the scores are kept")
