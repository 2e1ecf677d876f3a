"""Finding and opening the checkpoints of a run directory, without its lock.

A reader verifies the manifest before it opens any other file. It follows no link inside a run.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from infir2.checkpoint.manifest import (
    MANIFEST,
    MAX_BYTES,
    METADATA,
    FileEntry,
    removed_message,
    unreadable,
    verify_directory,
)
from infir2.errors import CheckpointCorruptError, CheckpointError
from infir2.files import disk_error, read_own

if TYPE_CHECKING:  # torch.distributed.checkpoint takes 0.7 s to import
    from infir2.checkpoint.dcp import DcpTensors

CHECKPOINTS = "checkpoints"
STATE = "state.json"
_STEP = re.compile(r"step-(0|[1-9]\d*)")

Warn = Callable[[str], None]
Value = TypeVar("Value")


def log_warning(message: str) -> None:
    """The default `warn`."""
    logging.getLogger("infir2").warning(message)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a verified manifest. Its run may remove it at any time."""

    step: int
    path: Path
    files: Mapping[str, FileEntry]

    @cached_property
    def state(self) -> dict[str, Any]:
        """The JSON part: configuration, data position, random number generators."""
        path = self.path / STATE
        try:
            state = json.loads(read_own(path, MAX_BYTES))
        except FileNotFoundError as error:
            raise CheckpointError(removed_message(self.path)) from error
        except OSError as error:
            raise unreadable(path, error) from error
        except (ValueError, RecursionError):
            state = None
        if not isinstance(state, dict):
            raise CheckpointCorruptError(f"{path}: is not a JSON object; the file is damaged.")
        return state

    def value(self, name: str, kind: type[Value]) -> Value:
        """A value of `state`. Raises CheckpointCorruptError if it is missing or of another type."""
        value = self.state.get(name)
        if type(value) is not kind:
            raise CheckpointCorruptError(
                f"{self.path / STATE}: its '{name}' is a {type(value).__name__}, and a training "
                f"run saves a {kind.__name__}."
            )
        return value

    def tensors(self) -> "DcpTensors":
        """The tensors by name; each is read when it is accessed."""
        from infir2.checkpoint.dcp import DcpTensors

        tensors = DcpTensors(self.path)
        if unlisted := tensors.files - self.files.keys():
            raise CheckpointCorruptError(
                f"{self.path / METADATA}: names {min(unlisted)}, which the manifest does not list."
            )
        return tensors


def load_checkpoint(path: Path, sizes_only: bool = False) -> Checkpoint:
    """Verify one `step-N` directory; CheckpointCorruptError names the first damaged file.

    `sizes_only`: of tensor files, compare sizes instead of hashes. Raises CheckpointError if a file
    cannot be read now.
    """
    if path.is_symlink():
        raise CheckpointCorruptError(
            f"{path}: is a symbolic link, which a run does not follow; name its target instead."
        )
    step, files = verify_directory(path, (STATE, METADATA) if sizes_only else None)
    if path.name != f"step-{step}":
        raise CheckpointCorruptError(
            f"{path}: its manifest says step {step}; the directory was renamed."
        )
    if missing := {STATE, METADATA} - files.keys():
        raise CheckpointCorruptError(f"{path / MANIFEST}: lists no {min(missing)}.")
    return Checkpoint(step, path, files)


def published_steps(directory: Path) -> list[int]:
    """Steps of the `step-N` directories, oldest first; [] if `directory` does not exist.

    Raises CheckpointError if it cannot be listed.
    """
    try:
        names = [entry.name for entry in directory.iterdir() if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise disk_error(f"{directory}: cannot be listed", error) from error
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def newest_checkpoint(
    directory: Path, warn: Warn, skipped: set[int] | None = None, sizes_only: bool = False
) -> Checkpoint | None:
    """The newest checkpoint that verifies; None if there is no checkpoint.

    A damaged checkpoint is skipped: `warn` receives a sentence with the reason, and its step is
    added to `skipped`. Raises CheckpointError if all are damaged. `sizes_only`: see
    `load_checkpoint`.
    """
    steps = published_steps(directory)
    for step in reversed(steps):
        path = directory / f"step-{step}"
        try:
            return load_checkpoint(path, sizes_only)
        except CheckpointCorruptError as error:
            if not path.exists():  # its run has removed it meanwhile, and published a newer one
                return newest_checkpoint(directory, warn, skipped, sizes_only)
            warn(f"skipped checkpoint step-{step}: {error}")
            if skipped is not None:
                skipped.add(step)
    if steps:
        raise CheckpointError(
            f"{directory}: none of its {len(steps)} checkpoints verifies (the warnings name each "
            "file); restore one from a copy, or move the directory away to start over."
        )
    return None


def open_checkpoint(
    path: str | Path, warn: Warn = log_warning, sizes_only: bool = False
) -> Checkpoint:
    """Open `runs/x/checkpoints/step-N`, or the newest good checkpoint of a run directory `runs/x`.

    Takes no lock, so checkpoints of a running job can be opened. `sizes_only`: see
    `load_checkpoint`.
    """
    path = Path(path)
    if _STEP.fullmatch(path.resolve().name) and not (path / CHECKPOINTS).is_dir():
        if not path.is_dir():
            raise CheckpointError(f"{path}: there is no such checkpoint.")
        return load_checkpoint(path.resolve(), sizes_only)
    checkpoint = newest_checkpoint(path / CHECKPOINTS, warn, sizes_only=sizes_only)
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: is neither a checkpoint (step-N) nor a run directory with a saved checkpoint "
            f"in {CHECKPOINTS}/."
        )
    return checkpoint


def read_state(path: str | Path) -> dict[str, Any]:
    """The state of the checkpoint that `open_checkpoint` opens, without reading its tensors."""
    return open_checkpoint(path, sizes_only=True).state
