"""The directory of an evaluation, `run.dir`.

It is checked before the model is loaded and claimed before anything is sampled: claiming writes
environment.json and recipe.toml. The results follow after sampling, metrics.jsonl as the last file.
So a directory with an evaluation in metrics.jsonl is finished and never overwritten; one without it
was left by an interrupted command and is used again.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infir2.checkpoint.environment import describe_environment
from infir2.checkpoint.record import TensorBoardView
from infir2.config.load import Loaded
from infir2.config.resume import dump
from infir2.config.schema import EvalRecipe
from infir2.errors import ConfigError, OutputExistsError, disk_reason
from infir2.evaluate.statistics import Evaluation
from infir2.files import disk_errors, encode_json_line, read_json_lines, write_atomically

ENVIRONMENT, RECIPE, SAMPLES, METRICS = (
    "environment.json",
    "recipe.toml",
    "samples.jsonl",
    "metrics.jsonl",
)
EVENTS_PREFIX = "events.out.tfevents."  # TensorBoard's
SAMPLE_ROWS = 24  # responses written to samples.jsonl


def check_output(directory: Path) -> None:
    """Refuse a directory that an evaluation must not write to; it may be missing or empty.

    Raises OutputExistsError for a finished evaluation or files of anything else, ConfigError for a
    directory that cannot be read. Writes nothing.
    """
    try:
        if not directory.exists():
            return
        names = {path.name for path in directory.iterdir()}
        kinds = {row.get("kind") for row in read_json_lines(directory / METRICS)}
    except OSError as error:
        raise ConfigError(
            f"run.dir: {directory} is not a directory that can be read ({disk_reason(error)}); "
            "name another one"
        ) from error
    foreign = sorted(name for name in names if not _belongs_to_an_evaluation(name))
    if kinds - {"evaluation"}:
        foreign.append(f"{METRICS} of a training run")
    elif names and ENVIRONMENT not in names:  # such as a recipe.toml that a person wrote
        foreign += sorted(names)
    if foreign:
        raise OutputExistsError(
            f"run.dir: {directory} exists and is not an evaluation's directory (it has "
            f"{foreign[0]}); name another one, nothing was written"
        )
    if kinds:
        raise OutputExistsError(
            f"run.dir: {directory} has a finished evaluation; name another directory or remove it"
        )


def claim_output(loaded: Loaded[EvalRecipe]) -> Path:
    """Create `run.dir`, which `check_output` accepts, and describe the evaluation in it.

    Raises ConfigError if it cannot be written.
    """
    directory = Path(loaded.recipe.run.dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / ENVIRONMENT, _environment())
        write_atomically(directory / RECIPE, dump(loaded).encode())
    except OSError as error:
        raise ConfigError(
            f"run.dir: {directory} cannot be written ({disk_reason(error)}); make it writable or "
            "name another one"
        ) from error
    return directory


def write_results(directory: Path, scores: Evaluation, rows: list[dict[str, Any]]) -> None:
    """Write the first responses and, last, the scores. Raises CheckpointError."""
    metrics = {name: _finite(value) for name, value in asdict(scores).items()}
    view = TensorBoardView(directory, 0)
    for name, value in metrics.items():
        if isinstance(value, int | float):
            view.add(f"evaluation/{name}", value, 1)
    view.close()
    samples = b"".join(encode_json_line({"step": 1} | row) for row in rows[:SAMPLE_ROWS])
    with disk_errors(f"{directory}: the scores above cannot be written"):
        write_atomically(directory / SAMPLES, samples)
        line = encode_json_line({"kind": "evaluation", "step": 1} | metrics)
        write_atomically(directory / METRICS, line)


def _belongs_to_an_evaluation(name: str) -> bool:
    own = (ENVIRONMENT, RECIPE, SAMPLES, METRICS)
    is_temporary = name.startswith(tuple(f".{each}." for each in own))
    return name in own or name.startswith(EVENTS_PREFIX) or is_temporary


def _environment() -> bytes:
    return json.dumps(describe_environment(), indent=1).encode() + b"\n"


def _finite(value: Any) -> Any:
    """None for a number that JSON does not have, such as the infinite interval of one problem."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
