"""The directory of an evaluation, `run.dir`: what is in it, and how an evaluation resumes.

    recipe.toml         every setting; a resumed evaluation must have the same ones
    inputs.json         fingerprints of the weights and of the problems
    environment.json    software and machine
    samples.jsonl       every response, appended as it ends; at the end in order of the problems
    metrics.jsonl       the scores, written last: with them the evaluation is finished

The first three are written after everything that can refuse the command. An interrupted evaluation
keeps the lines of samples.jsonl. A response depends on nothing but the weights, its prompt and its
key, so the result is that of an uninterrupted evaluation.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infir2.checkpoint.environment import describe_environment
from infir2.checkpoint.lock import LOCK, RunLock
from infir2.checkpoint.record import TensorBoardView
from infir2.config.load import Loaded, load
from infir2.config.resume import changed_keys, dump
from infir2.config.schema import EvalRecipe
from infir2.errors import CheckpointError, ConfigError, OutputExistsError, disk_reason
from infir2.evaluate.problems import Row
from infir2.evaluate.statistics import Evaluation
from infir2.files import (
    JsonLinesWriter,
    disk_errors,
    encode_json_line,
    keep_json_lines,
    read_json_lines,
    write_atomically,
)
from infir2.terminal import log

ENVIRONMENT, RECIPE, INPUTS, SAMPLES, METRICS = (
    "environment.json",
    "recipe.toml",
    "inputs.json",
    "samples.jsonl",
    "metrics.jsonl",
)
EVENTS_PREFIX = "events.out.tfevents."  # TensorBoard's
# A resumed evaluation may change these keys: no response depends on them.
_FREE_KEYS = ("run.dir", "run.threads", "rollout.max_running_requests")


def check_output(loaded: Loaded[EvalRecipe]) -> None:
    """Refuse a directory that this evaluation must not write to; it may be missing or empty.

    Raises OutputExistsError for files of anything else, ConfigError for an evaluation with other
    settings or a directory that cannot be read. Writes nothing.
    """
    directory = Path(loaded.recipe.run.dir)
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
    elif ENVIRONMENT not in names and not all(
        name.startswith(LOCK) for name in names
    ):  # such as a recipe.toml that a person wrote
        foreign += sorted(names)
    if foreign:
        raise OutputExistsError(
            f"run.dir: {directory} exists and is not an evaluation's directory (it has "
            f"{foreign[0]}); name another one, nothing was written"
        )
    if RECIPE in names:
        _check_settings(loaded, directory)


def _check_settings(loaded: Loaded[EvalRecipe], directory: Path) -> None:
    what = "a finished evaluation" if finished_scores(directory) else "an unfinished evaluation"
    fix = "restore the value, name another directory, or remove this one"
    try:
        old = load(EvalRecipe, [directory / RECIPE]).recipe
    except ConfigError as error:
        raise ConfigError(
            f"run.dir: {directory} has {what} with settings that cannot be read "
            f"({str(error).rstrip('.')}); name another directory, or remove this one"
        ) from error
    for key, (before, after) in changed_keys(old, loaded.recipe).items():
        if key not in _FREE_KEYS:
            raise ConfigError(
                f"run.dir: {directory} has {what} with {key} = {before!r}, and now it is "
                f"{after!r}; {fix}"
            )


@contextmanager
def claim_output(loaded: Loaded[EvalRecipe], inputs: dict[str, str]) -> Iterator[Path]:
    """Create and lock `run.dir`, and yield it; what is created is removed if nothing is written.

    `inputs` are fingerprints by the key that names the input. Raises OutputExistsError if another
    evaluation uses the directory, ConfigError if it cannot be written or has an evaluation of other
    inputs.
    """
    directory = Path(loaded.recipe.run.dir)
    try:
        lock = RunLock.acquire(directory, log)
    except (CheckpointError, ConfigError) as error:
        if isinstance(error.__cause__, OSError):
            raise _not_writable(directory, error.__cause__) from error
        raise
    try:
        check_output(loaded)
        old = _read_inputs(directory)
        for key, value in inputs.items():
            if old.get(key, value) != value:
                raise ConfigError(
                    f"run.dir: {directory} has an evaluation of what {key} named before it "
                    "changed; name another directory, or remove this one"
                )
        yield directory
    finally:
        lock.release()


def resume_output(loaded: Loaded[EvalRecipe], inputs: dict[str, str]) -> list[Row]:
    """Describe a new evaluation in the claimed `run.dir`, or return the responses of this one.

    A line that a crash cut short is lost. Raises ConfigError if the directory cannot be written.
    """
    directory = Path(loaded.recipe.run.dir)
    try:
        if _read_inputs(directory):
            keep_json_lines(directory / SAMPLES, lambda row: "tokens" in row)
            return read_json_lines(directory / SAMPLES)
        (directory / SAMPLES).unlink(missing_ok=True)  # nobody knows of which evaluation
        environment = json.dumps(describe_environment(), indent=1).encode() + b"\n"
        write_atomically(directory / ENVIRONMENT, environment)
        write_atomically(directory / RECIPE, dump(loaded).encode())
        write_atomically(directory / INPUTS, encode_json_line(inputs))
    except OSError as error:
        raise _not_writable(directory, error) from error
    return []


def _not_writable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.dir: {directory} cannot be written ({disk_reason(error)}); make it writable or "
        "name another one"
    )


class SamplesWriter(JsonLinesWriter):
    """Appends responses to samples.jsonl."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / SAMPLES)

    def write(self, rows: list[Row]) -> None:
        self.append(*map(_sample_line, rows))


def scores_as_json(scores: Evaluation) -> dict[str, Any]:
    """The scores as metrics.jsonl has them."""
    return asdict(scores)


def write_results(directory: Path, scores: Evaluation, rows: list[Row]) -> None:
    """Write all responses, in order, and last the scores. Raises CheckpointError."""
    metrics = scores_as_json(scores)
    view = TensorBoardView(directory, 0)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    view.show({f"evaluation/{name}": value for name, value in numbers.items()}, 1)
    view.close()
    samples = b"".join(encode_json_line(_sample_line(row)) for row in rows)
    with disk_errors(f"{directory}: the scores above cannot be written"):
        write_atomically(directory / SAMPLES, samples)
        line = encode_json_line({"kind": "evaluation", "step": 1} | metrics)
        write_atomically(directory / METRICS, line)


def finished_scores(directory: Path) -> Evaluation | None:
    """The scores of a finished evaluation; None if it is not finished."""
    for row in read_json_lines(directory / METRICS):
        if Evaluation.__dataclass_fields__.keys() <= row.keys():
            return Evaluation(**{name: row[name] for name in Evaluation.__dataclass_fields__})
    return None


def _sample_line(row: Row) -> Row:
    return {"step": 1} | row


def _belongs_to_an_evaluation(name: str) -> bool:
    own = (ENVIRONMENT, RECIPE, INPUTS, SAMPLES, METRICS)
    is_temporary = name.startswith(tuple(f".{each}." for each in own))
    return name in own or name.startswith((LOCK, EVENTS_PREFIX)) or is_temporary


def _read_inputs(directory: Path) -> dict[str, Any]:
    """What `resume_output` wrote to inputs.json; {} if the evaluation has not begun."""
    return next(iter(read_json_lines(directory / INPUTS)), {})
