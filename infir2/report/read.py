"""Read run directories, including those of killed and diverged runs.

A killed run leaves an incomplete last line; a diverged run has nulls in its lines. Neither is an
error: unreadable lines are counted in `Run.notes`, the later of two lines for one step counts, and
values that are not finite become NaN, which charts show as gaps. `seconds` and `trained_tokens` of
a train line are those of its own step.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from infir2.config import toml
from infir2.errors import DataError
from infir2.evaluate.statistics import Evaluation
from infir2.files import open_own, read_own
from infir2.report.axes import AXES, Clock, cumulative
from infir2.report.samples import Row, Samples, number
from infir2.report.table import Lines, Table
from infir2.terminal import begin_phase

EVALUATION_PREFIX = "eval-"
MAX_BYTES = 2**24  # of recipe.toml, environment.json and state.json


@dataclass(frozen=True)
class Run:
    """One run directory. A missing file leaves its field empty and a sentence in `notes`."""

    path: Path
    name: str
    train: Table
    validation: Table
    evaluations: Table
    events: tuple[Row, ...]
    samples: tuple[Row, ...]  # of samples.jsonl, of a large one its first and last rows
    num_samples: int
    scores: dict[str, float]  # of an evaluation: question -> mean score
    recipe: Row
    recipe_text: str
    environment: Row
    state: Row  # state.json of the newest checkpoint, with `kind` and `model_config`
    started: float  # Unix time of the first start; NaN if no file says it
    notes: tuple[str, ...]

    @property
    def is_rl(self) -> bool:
        return self.train.has("reward")

    @property
    def fp8(self) -> bool | None:
        """Whether the recipe trains in FP8; None without a recipe."""
        return bool(self.recipe.get("fp8", {}).get("enabled", True)) if self.recipe else None

    @property
    def kind(self) -> str:
        """cpt, sft or rl; of a run without checkpoint and environment rl or train."""
        command = self.environment.get("command")
        verb = command[1] if isinstance(command, list) and len(command) > 1 else ""
        known = (self.state.get("kind"), verb, "rl" if self.is_rl else "train")
        return next(str(kind) for kind in known if kind in ("cpt", "sft", "rl", "train"))

    @cached_property
    def clock(self) -> Clock:
        """Tokens and seconds of training by step."""
        steps, columns = self.train.steps, {"tokens": "trained_tokens", "time": "seconds"}
        totals = {axis: cumulative(steps, self.train[name]) for axis, name in columns.items()}
        axes = [axis for axis in AXES if axis == "step" or self.train.has(columns[axis])]
        before = np.concatenate([steps[:1] - 1, steps])
        return Clock(self.name, before, totals["tokens"], totals["time"], tuple(axes))

    @property
    def base(self) -> str:
        """The run, checkpoint or Hugging Face directory that the run started from; '' for none."""
        return str(
            self.recipe.get("checkpoint", {}).get("branch_from")
            or self.recipe.get("model", {}).get("path")
            or ""
        )

    @property
    def evaluation(self) -> Evaluation | None:
        """The last evaluation; a value that its line lacks is NaN or 0."""
        if not self.evaluations:
            return None
        row = self.evaluations.rows[-1]
        rates: Row = {
            each.name: number(row.get(each.name))
            for each in fields(Evaluation)
            if each.type is float
        }
        counts: Row = {
            name: int(np.nan_to_num(number(row.get(name)))) for name in ("k", "num_problems")
        }
        levels = row.get("by_difficulty")
        by_difficulty = (
            {str(level): number(value) for level, value in levels.items()}
            if isinstance(levels, dict)
            else {}
        )
        return Evaluation(**rates, **counts, by_difficulty=by_difficulty)

    @property
    def num_steps(self) -> int:
        return int(self.train.steps[-1] - self.train.steps[0]) + 1 if self.train else 0

    def starts_from(self, other: "Run") -> bool:
        """Whether the base is `other` or one of its checkpoints, by name: runs may have moved."""
        parts = Path(self.base).parts
        parts = parts[: parts.index("checkpoints")] if "checkpoints" in parts else parts
        own = Path(other.name).parts
        return parts[-len(own) :] == own

    def total(self, column: str) -> float:
        """Sum of a train column over all steps; a step without a line counts as the mean."""
        values = self.train[column]
        return (
            float(np.nansum(values)) / max(1, len(values)) * (self.num_steps if self.train else 0)
        )


def read_runs(run_dirs: Iterable[Path]) -> list[Run]:
    """Read runs in the given order.

    A directory that is no run is replaced by the runs directly inside it, each after its base. Runs
    with the same name get the name of their parent directory as a prefix. Raises DataError for a
    path without a run.
    """
    runs: dict[Path, Run] = {}
    for directory in map(Path, run_dirs):
        if any((directory / name).is_file() for name in ("metrics.jsonl", "recipe.toml")):
            found = [read_run(directory)]
        else:
            found = _bases_first(
                [read_run(path.parent) for path in sorted(directory.glob("*/metrics.jsonl"))]
            )
        if not found:
            raise DataError(
                f"{directory} holds no run (no metrics.jsonl in it or directly below it); "
                "name run directories or their parent"
            )
        runs |= {run.path.resolve(): run for run in found if run.path.resolve() not in runs}
    names = Counter(run.name for run in runs.values())
    return [
        run if names[run.name] == 1 else replace(run, name=f"{path.parent.name}/{run.name}")
        for path, run in runs.items()
    ]


def _bases_first(runs: list[Run]) -> list[Run]:
    ordered: list[Run] = []
    while len(ordered) < len(runs):
        left = [run for run in runs if run not in ordered]
        ready = [
            run
            for run in left
            if not any(run.starts_from(other) for other in left if other is not run)
        ]
        ordered += ready or left
    return ordered


def read_run(run_dir: Path) -> Run:
    """Read one run directory."""
    begin_phase(f"reading {run_dir}")
    notes: list[str] = []
    metrics = _Metrics()
    read_lines(run_dir / "metrics.jsonl", notes, metrics.add)
    recipe_text, recipe = _read_file(run_dir / "recipe.toml", toml.parse, notes)
    samples = Samples()
    if os.path.lexists(run_dir / "samples.jsonl"):
        read_lines(run_dir / "samples.jsonl", notes, samples.add)
        notes += samples.notes
    checkpoints = {
        int(path.name[5:]): path
        for path in run_dir.glob("checkpoints/step-*")
        if path.name[5:].isdecimal() and not path.is_symlink()
    }
    return Run(
        path=run_dir,
        name=run_dir.resolve().name,
        train=metrics.train.table(),
        validation=metrics.validation.table(),
        evaluations=metrics.evaluation.table(),
        events=tuple(metrics.events),
        samples=samples.rows,
        num_samples=samples.num_rows,
        scores=samples.scores,
        recipe={name: value for name, value in recipe.items() if isinstance(value, dict)},
        recipe_text=recipe_text,
        environment=_read_file(run_dir / "environment.json", json.loads, notes)[1],
        state=_read_file(checkpoints[max(checkpoints)] / "state.json", json.loads, [])[1]
        if checkpoints
        else {},
        started=_started(run_dir),
        notes=tuple(notes),
    )


class _Metrics:
    """The lines of metrics.jsonl by kind."""

    def __init__(self) -> None:
        self.train, self.validation, self.evaluation = Lines(), Lines(), Lines(keep_rows=True)
        self.events: list[Row] = []

    def add(self, row: Row, _num_bytes: int) -> None:
        kind = row.pop("kind", None)
        if kind == "event":
            self.events.append(row)
        elif kind in ("train", "validation", "evaluation"):
            getattr(self, kind).add(row)


def _started(run_dir: Path) -> float:
    """From the names of TensorBoard's files, events.out.tfevents.SECONDS.HOST..."""
    times = (path.name.split(".")[3] for path in run_dir.glob("events.out.tfevents.*"))
    return min((float(t) for t in times if t.isdecimal() and len(t) < 11), default=math.nan)


def _read_file(path: Path, parse: Callable[[str], Any], notes: list[str]) -> tuple[str, Row]:
    """A file's text and its parsed table; '' and {} if there is none."""
    try:
        text = read_own(path, MAX_BYTES).decode("utf-8", errors="replace")
    except OSError as error:
        notes.append(_missing(path, error))
        return "", {}
    try:
        value = parse(text)
        if not isinstance(value, dict):
            raise ValueError("it holds no table")
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be parsed ({error})")
        return text, {}
    return text, value


def _missing(path: Path, error: OSError) -> str:
    is_absent = isinstance(error, FileNotFoundError)
    return f"no {path.name}" if is_absent else f"{path.name} cannot be read ({error.strerror})"


def read_lines(path: Path, notes: list[str], add: Callable[[Row, int], object]) -> None:
    """Pass the lines that are JSON objects, with their bytes, to `add`, in file order."""
    num_bad = 0
    try:
        with open(path, "rb", opener=open_own) as file:
            for line in filter(bytes.strip, file):
                try:
                    value = json.loads(line.decode("utf-8", errors="replace"))
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    add(value, len(line))
                else:
                    num_bad += 1
    except OSError as error:
        notes.append(_missing(path, error))
    if num_bad:
        notes.append(
            f"{path.name}: {num_bad} unreadable {'line' if num_bad == 1 else 'lines'} left out"
        )
