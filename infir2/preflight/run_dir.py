"""Checks of the run directory: writable, free, resumable, with room for checkpoints."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from infir2.checkpoint import Checkpoint, open_checkpoint
from infir2.checkpoint.lock import RunLock
from infir2.checkpoint.reader import CHECKPOINTS, newest_checkpoint
from infir2.config import Loaded
from infir2.config.schema import TrainRecipe
from infir2.errors import ConfigError
from infir2.model.memory import GIB
from infir2.preflight.finding import Finding
from infir2.preflight.memory import CHECKPOINT_BYTES_PER_PARAMETER
from infir2.preflight.model import ModelFacts
from infir2.train.plan import check_branch, resume_changes


def check_run_dir(loaded: Loaded[TrainRecipe]) -> Finding:
    """Writable, renames work, no other job runs in it; the detail names what a run resumes from.

    Raises ConfigError for a directory that cannot be written to or a recipe that cannot resume.
    """
    path = Path(loaded.recipe.run.dir)
    if not path.exists():
        parent = _existing_parent(path)
        _check_rename(parent)
        branch = _check_branch(loaded.recipe)
        return Finding("run dir", "ok", f"{path} is new, {parent} can be written to{branch}")
    warnings: list[str] = []
    _check_rename(path)
    RunLock.acquire(path, warnings.append).release()
    newest = newest_in(path, warnings.append)
    warnings += resume_changes(loaded)
    if newest:
        detail = f"{path} resumes after step {newest.step}"
    else:
        detail = f"{path} has no checkpoint yet{_check_branch(loaded.recipe)}"
    if warnings:
        return Finding("run dir", "warn", f"{detail}; {'; '.join(warnings)}")
    return Finding("run dir", "ok", detail)


def _check_branch(recipe: TrainRecipe) -> str:
    """Words about checkpoint.branch_from, if it is set. Raises CheckpointError, ConfigError."""
    if not recipe.checkpoint.branch_from:
        return ""
    start = open_checkpoint(recipe.checkpoint.branch_from, sizes_only=True)
    check_branch(recipe.schedule, start.step, recipe.train.stop_after_step)
    return f", branches from {start.path}"


def check_disk(recipe: TrainRecipe, model: ModelFacts) -> Finding:
    """Free space for the kept checkpoints and the one being written. Raises ConfigError."""
    directory = _existing_parent(Path(recipe.run.dir))
    num_bytes = CHECKPOINT_BYTES_PER_PARAMETER * model.num_parameters
    free, keep = shutil.disk_usage(directory).free, recipe.checkpoint.keep
    detail = (
        f"{free / GIB:.1f} GiB free, checkpoints of {num_bytes / GIB:.2f} GiB, "
        f"{keep} kept and one being written"
    )
    if free < (keep + 1) * num_bytes:
        raise ConfigError(f"run.dir: {detail}; free some space, or lower checkpoint.keep.")
    return Finding("disk", "ok", detail)


def newest_in(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that a run resumes from, or None; its tensors are not read."""
    return newest_checkpoint(run_dir / CHECKPOINTS, warn, sizes_only=True)


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _check_rename(directory: Path) -> None:
    """Publish a directory as checkpoints are published: write it under another name, rename it."""
    try:
        with tempfile.TemporaryDirectory(prefix=".infir2-check-", dir=directory) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            (new / "file").write_text("x")
            new.rename(Path(temporary, "published"))
    except OSError as error:
        raise ConfigError(
            f"run.dir: {directory} cannot be written to ({error.strerror}); choose another run.dir."
        ) from None
