"""Run directories as data: metrics, samples, recipe and environment, with everything tolerated that a stopped run leaves.

A run that was killed leaves a half-written last line; a diverged run has nulls or NaN in its lines. Reading never fails
on these: bad lines are counted in `Run.notes`, of two lines for one step the later stands, and values that are not finite
become NaN, which charts show as gaps.

Units: `seconds` and `trained_tokens` of a train line are those of its own step; fractions are 0..1.
"""

import json
import math
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from infir2.errors import DataError

SAMPLE_HEAD_BYTES = 1 << 20
SAMPLE_TAIL_BYTES = 4 << 20
EVALUATION_PREFIX = "eval-"


@dataclass(frozen=True)
class Table:
    """Lines of one kind, by step: `Table(rows)["loss"]` is float64 [rows], NaN where absent or not finite."""

    rows: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array([number(row.get(name)) for row in self.rows], dtype=np.float64)

    @property
    def steps(self) -> np.ndarray:
        return self["step"]

    def has(self, name: str) -> bool:
        return any(math.isfinite(number(row.get(name))) for row in self.rows)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation line: avg@k with the half-width of its 95 % interval, as fractions of 1."""

    step: int
    avg_at_k: float
    interval: float
    k: int
    pass_at_k: float
    num_problems: int
    truncated_fraction: float
    by_difficulty: dict[str, float]


@dataclass(frozen=True)
class SampleResponse:
    """One sampled response, such as SampleResponse(40, "What is 2+3?", "... \\boxed{5}", "5", 1.0, False)."""

    step: int
    prompt: str
    response: str
    answer: str
    reward: float
    truncated: bool


@dataclass(frozen=True)
class Run:
    """One run directory. Missing files leave their field empty and a sentence in `notes`."""

    path: Path
    name: str
    train: Table
    validation: Table
    evaluations: tuple[Evaluation, ...]
    events: tuple[dict[str, Any], ...]
    samples: tuple[SampleResponse, ...]
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    state: dict[str, Any]  # state.json of the newest checkpoint, with `kind` and `model_config`
    notes: tuple[str, ...]

    @property
    def is_rl(self) -> bool:
        return self.train.has("reward")

    @property
    def fp8(self) -> bool | None:
        """True or false as the recipe says, None without a recipe."""
        section = self.recipe.get("fp8")
        return bool(section.get("enabled", True)) if isinstance(section, dict) else (True if self.recipe else None)

    @property
    def base(self) -> str:
        """The path that the run started from (a run directory, a checkpoint or a Hugging Face directory), or ''."""
        for section, key in (("checkpoint", "branch_from"), ("model", "path")):
            value = self.recipe.get(section, {}).get(key, "")
            if isinstance(value, str) and value:
                return value
        return ""

    def starts_from(self, other: "Run") -> bool:
        """Whether the base is `other`, one of its checkpoints or, by name, a copy of it elsewhere."""
        parts = Path(self.base).parts
        if "checkpoints" in parts:
            parts = parts[: parts.index("checkpoints")]
        return bool(parts) and parts[-1] == other.name

    def total(self, column: str) -> float:
        """Sum of a train column over all steps; steps between logged ones count as their mean."""
        values = self.train[column]
        values = values[np.isfinite(values)]
        steps = self.train.steps
        if not len(values):
            return 0.0
        spacing = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
        return float(values.mean()) * (steps[-1] - steps[0] + spacing) * len(values) / len(steps)


def number(value: Any) -> float:
    """A finite float, or NaN for anything else (None, text, Inf)."""
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float):
        return math.nan
    try:
        result = float(value)
    except OverflowError:
        return math.nan
    return result if math.isfinite(result) else math.nan


def find_runs(run_dirs: Iterable[Path]) -> list[Path]:
    """Directories with a metrics.jsonl; one without is taken as a whole recipe and stands for the runs just inside it.

    Raises DataError for a path that is no directory or holds no run.
    """
    found: list[Path] = []
    for directory in (Path(path) for path in run_dirs):
        if (directory / "metrics.jsonl").is_file() or (directory / "recipe.toml").is_file():
            inside = [directory]
        else:
            inside = sorted((path.parent for path in directory.glob("*/metrics.jsonl")), key=_first_written)
        if not inside:
            raise DataError(
                f"{directory} holds no metrics.jsonl and no run directory with one; name a run directory or the directory of a recipe's runs"
            )
        found += [path for path in inside if path not in found]
    return found


def _first_written(run_dir: Path) -> tuple[float, str]:
    """The recipe is written once, when the run starts; metrics go on being written."""
    recipe = run_dir / "recipe.toml"
    return ((recipe if recipe.exists() else run_dir / "metrics.jsonl").stat().st_mtime, run_dir.name)


def read_run(run_dir: Path) -> Run:
    """Read one run directory; only a path that is no directory is an error (DataError)."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a directory; name a run directory")
    notes: list[str] = []
    rows = _read_metrics(run_dir / "metrics.jsonl", notes)
    recipe_text = _read_text(run_dir / "recipe.toml", notes)
    try:
        recipe = tomllib.loads(recipe_text)
    except tomllib.TOMLDecodeError as error:
        recipe = {}
        notes.append(f"recipe.toml cannot be parsed ({error})")
    return Run(
        path=run_dir,
        name=run_dir.resolve().name,
        train=_by_step(rows, "train"),
        validation=_by_step(rows, "validation"),
        evaluations=tuple(_evaluation(row) for row in _by_step(rows, "evaluation").rows),
        events=tuple(row for row in rows if row.get("kind") == "event"),
        samples=_read_samples(run_dir / "samples.jsonl", notes),
        recipe=recipe,
        recipe_text=recipe_text,
        environment=_read_json(run_dir / "environment.json", notes),
        state=_newest_state(run_dir / "checkpoints"),
        notes=tuple(notes),
    )


def _read_text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append(f"no {path.name}")
        return ""


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _read_text(path, notes)
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        notes.append(f"{path.name} cannot be parsed")
        return {}
    return value if isinstance(value, dict) else {}


def _newest_state(checkpoints: Path) -> dict[str, Any]:
    steps = {int(path.name[5:]): path for path in checkpoints.glob("step-*") if path.name[5:].isdecimal()}
    return _read_json(steps[max(steps)] / "state.json", []) if steps else {}


def _json_objects(lines: Iterable[bytes], bad: list[int]) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects; the numbers (from 1) of those that are not go to `bad`."""
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8", errors="replace"))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            yield value
        else:
            bad.append(index)


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows in file order."""
    bad: list[int] = []
    rows: list[dict[str, Any]] = []
    try:
        with path.open("rb") as lines:
            rows += _json_objects(lines, bad)
    except OSError:
        notes.append(f"no {path.name}")
    if bad:
        notes.append(f"{path.name}: {len(bad)} unreadable {'line' if len(bad) == 1 else 'lines'} left out (line {bad[0]})")
    return rows


def _by_step(rows: list[dict[str, Any]], kind: str) -> Table:
    """The last line of each step, in the order of steps; a line without a step counts as step 0."""
    latest = {number(row.get("step", 0)): row for row in rows if row.get("kind") == kind}
    return Table(tuple(latest[step] for step in sorted(latest) if math.isfinite(step)))


def _evaluation(row: dict[str, Any]) -> Evaluation:
    levels = row.get("by_difficulty")
    return Evaluation(
        step=_count(row.get("step")),
        avg_at_k=number(row.get("avg_at_k")),
        interval=number(row.get("interval")),
        k=_count(row.get("k")),
        pass_at_k=number(row.get("pass_at_k")),
        num_problems=_count(row.get("num_problems")),
        truncated_fraction=number(row.get("truncated_fraction")),
        by_difficulty={str(level): number(value) for level, value in levels.items()} if isinstance(levels, dict) else {},
    )


def _count(value: Any) -> int:
    return int(value) if math.isfinite(number(value)) else 0


def _read_samples(path: Path, notes: list[str]) -> tuple[SampleResponse, ...]:
    """Samples of the file's first and last bytes only: a long RL run writes gigabytes of responses."""
    bad: list[int] = []
    try:
        with path.open("rb") as file:
            rows = list(_json_objects(_first_and_last_lines(file, path.stat().st_size), bad))
    except OSError:
        return ()
    if bad:
        notes.append(f"{path.name}: {len(bad)} unreadable {'line' if len(bad) == 1 else 'lines'} left out")
    return tuple(
        SampleResponse(
            step=_count(row.get("step")),
            prompt=_conversation(row.get("prompt")),
            response=_conversation(row.get("response")),
            answer="" if row.get("answer") is None else str(row["answer"]),
            reward=number(row.get("reward")),
            truncated=bool(row.get("truncated")),
        )
        for row in rows
    )


def _first_and_last_lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Whole lines of the first and last part of a file, all lines of a short one."""
    if size <= SAMPLE_HEAD_BYTES + SAMPLE_TAIL_BYTES:
        yield from file
        return
    yield from file.read(SAMPLE_HEAD_BYTES).split(b"\n")[:-1]
    file.seek(size - SAMPLE_TAIL_BYTES)
    yield from file.read(SAMPLE_TAIL_BYTES).split(b"\n")[1:]


def _conversation(value: Any) -> str:
    """Text of a prompt: a string, or chat messages."""
    if isinstance(value, list):
        parts = [(message.get("role", ""), message.get("content", "")) for message in value if isinstance(message, dict)]
        return "\n".join(f"{role}: {content}" for role, content in parts)
    return "" if value is None else str(value)
