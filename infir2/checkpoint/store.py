"""Checkpoints of a run directory that survive a kill at any moment.

A checkpoint is written under a temporary name, every file synced, the manifest (sizes and SHA-256) last, then published
by one rename. `step-N` therefore is whole or does not exist, and nothing published is ever written to again.

    runs/cpt/checkpoints/step-20/{__0_0.distcp, ..., .metadata, state.json, manifest.json}

The tensors are a distributed checkpoint of torch's (`dcp.py`), by one process or several; what a reader sees does not depend on
who wrote it. Nothing of it is read before the manifest has been verified.
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from infir2.checkpoint.lock import RunLock
from infir2.checkpoint.manifest import (
    MANIFEST,
    METADATA,
    FileEntry,
    encode_manifest,
    removed,
    verify_directory,
    write_file,
)
from infir2.errors import CheckpointCorruptError, CheckpointError, disk_reason
from infir2.faults import fault
from infir2.files import disk_error, fsync_directory
from infir2.parallel.ranks import Ranks
from infir2.parallel.shard_spec import ShardSpec
from infir2.terminal import byte_progress

if TYPE_CHECKING:  # torch.distributed.checkpoint takes 0.7 s to import
    from infir2.checkpoint.dcp import DcpTensors

CHECKPOINTS = "checkpoints"
STATE = "state.json"
LEFTOVER = ".tmp-step-"  # a checkpoint that is being written, or removed
_STEP = re.compile(r"step-(0|[1-9]\d*)")
_CORRUPT = re.compile(r"corrupt-step-(\d+)-[0-9a-f]+")

Warn = Callable[[str], None]


def _log_warning(message: str) -> None:
    logging.getLogger("infir2").warning(message)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest has been verified. Its run may remove it at any time after."""

    step: int
    path: Path
    files: Mapping[str, FileEntry]

    @cached_property
    def state(self) -> dict[str, Any]:
        """The JSON-able part: configuration, data position, random number generators."""
        try:
            return json.loads((self.path / STATE).read_bytes())
        except FileNotFoundError as error:
            raise CheckpointError(removed(self.path)) from error

    def tensors(self) -> "DcpTensors":
        """The tensors by name; each is read, whole or in part, when asked for."""
        from infir2.checkpoint.dcp import DcpTensors

        tensors = DcpTensors(self.path)
        if unlisted := tensors.files - self.files.keys():
            raise CheckpointCorruptError(
                f"{self.path / METADATA}: names {min(unlisted)}, which the manifest does not list."
            )
        return tensors


def load_checkpoint(path: Path, glance: bool = False) -> Checkpoint:
    """Verify and open one `step-N` directory; CheckpointCorruptError names the first bad file.

    `glance`: the bytes of the tensors are not read, their files' sizes are compared.
    """
    step, files = verify_directory(path, (STATE, METADATA) if glance else None)
    if path.name != f"step-{step}":
        raise CheckpointCorruptError(
            f"{path}: its manifest says step {step}; the directory was renamed."
        )
    if missing := {STATE, METADATA} - files.keys():
        raise CheckpointCorruptError(f"{path / MANIFEST}: lists no {min(missing)}.")
    return Checkpoint(step, path, files)


def published_steps(directory: Path) -> list[int]:
    """Steps of the `step-N` directories, oldest first; an absent directory has none."""
    try:
        names = [entry.name for entry in directory.iterdir() if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def newest_checkpoint(
    directory: Path, warn: Warn, skipped: set[int] | None = None, glance: bool = False
) -> Checkpoint | None:
    """The newest checkpoint that verifies, None if there are none; CheckpointError if there are some and none verifies.

    Each one that is passed over is named through `warn`, with the reason, and its step added to `skipped`. `glance`: see `load_checkpoint`.
    """
    steps = published_steps(directory)
    for step in reversed(steps):
        try:
            return load_checkpoint(directory / f"step-{step}", glance)
        except CheckpointCorruptError as error:
            if not (
                directory / f"step-{step}"
            ).exists():  # its run has removed it meanwhile, and has a newer one
                return newest_checkpoint(directory, warn, skipped, glance)
            warn(f"skipped checkpoint step-{step}: {error}")
            if skipped is not None:
                skipped.add(step)
    if steps:
        raise CheckpointError(
            f"{directory}: none of its {len(steps)} checkpoints verifies (the warnings name each file); "
            "restore one from a copy, or move the directory away to start over."
        )
    return None


def open_checkpoint(
    path: str | Path, warn: Warn = _log_warning, glance: bool = False
) -> Checkpoint:
    """The newest good checkpoint of a run directory, or exactly the one named: `runs/x` or `runs/x/checkpoints/step-N`.

    Reading takes no lock: a running job's published checkpoints can be opened at any time. `glance`: see `load_checkpoint`.
    """
    path = Path(path)
    if _STEP.fullmatch(path.resolve().name) and not (path / CHECKPOINTS).is_dir():
        if not path.is_dir():
            raise CheckpointError(f"{path}: there is no such checkpoint.")
        return load_checkpoint(path.resolve(), glance)
    checkpoint = newest_checkpoint(path / CHECKPOINTS, warn, glance=glance)
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: is neither a checkpoint (step-N) nor a run directory with a saved checkpoint in {CHECKPOINTS}/."
        )
    return checkpoint


def read_state(path: str | Path) -> dict[str, Any]:
    """The state of the checkpoint that `open_checkpoint` names, of which no tensor is read."""
    return open_checkpoint(path, glance=True).state


class Store:
    """Writes, keeps and finds the checkpoints of one run directory.

    `keep`: newest checkpoints kept. `warn` hears one sentence for everything skipped, removed or taken over.
    Rank 0 of `team` takes the run directory's lock and clears away what dead saves left (OutputExistsError when another job
    holds the directory); every rank calls `save` at the same point, and all succeed or all raise.
    `places`: where the tensors that a rank has a part of lie in the whole (none in one process).
    Example: `Store("runs/cpt", keep=2).save(20, {"parameters/model.norm.weight": weight}, {"step": 20})`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        keep: int = 2,
        warn: Warn = _log_warning,
        ranks: Ranks | None = None,
    ) -> None:
        assert keep >= 1
        self.ranks = ranks or Ranks()
        self.shard_specs: Mapping[str, ShardSpec] = {}
        self.run_dir = Path(run_dir)
        self.directory = self.run_dir / CHECKPOINTS
        self._keep = keep
        self._warn = warn
        self._corrupt: set[int] = set()
        self._close: weakref.finalize | None = None
        if self.ranks.is_rank0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._failure("cannot be made", error) from error
            self._close = weakref.finalize(self, RunLock.acquire(self.run_dir, warn).release)
            self._remove_leftovers()

    def close(self) -> None:
        """Let go of the run directory; also done when the store is garbage."""
        if self._close:
            self._close()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None in a fresh run directory; see `newest_checkpoint`."""
        return newest_checkpoint(self.directory, self._warn, self._corrupt)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Publish `checkpoints/step-N` and thin out older ones; returns its path.

        tensors: any shapes, dtypes and devices; one piece (`dcp.PIECE_BYTES`) at a time is copied to the host. state: JSON-able.
        A whole `step-N` that is already there is kept as it is; a damaged one is moved aside.
        CheckpointError, with the previous checkpoints intact and nothing half-written left, when the disk is full or
        cannot be written, after one retry (for which all older checkpoints but the newest good one are removed if the
        disk is full).
        """
        assert self._close is None or self._close.alive, "the store is closed"
        payload = json.dumps(dict(state)).encode()
        target = self.directory / f"step-{step}"
        if self.ranks.broadcast_from_rank0(lambda: self._is_whole(target)):
            return target
        try:
            self._publish(target, step, tensors, payload)
        except OSError as error:
            self._warn(f"saving step {step} failed ({disk_reason(error)}); trying once more.")
            try:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self.ranks.broadcast_from_rank0(self._make_room)
                self._publish(target, step, tensors, payload)
            except OSError as again:
                raise self._failure(f"step {step} could not be saved", again) from again
        self.ranks.broadcast_from_rank0(lambda: self._retain(step))
        return target

    def _is_whole(self, target: Path) -> bool:
        try:
            load_checkpoint(target)
        except CheckpointCorruptError as error:
            if target.exists():
                self._warn(f"{error} A new checkpoint takes its place.")
            return False
        return True

    def _failure(self, what: str, error: OSError) -> CheckpointError:
        return disk_error(f"{self.directory}: {what}", error)

    def _publish(
        self, target: Path, step: int, tensors: Mapping[str, Tensor], payload: bytes
    ) -> None:
        mine = {name: tensor for name, tensor in tensors.items() if self._is_mine(name)}
        num_bytes = sum(self.ranks.all_gather(sum(tensor.nbytes for tensor in mine.values())))
        temporary = self.ranks.broadcast_from_rank0(
            lambda: self._new_directory(step, num_bytes + len(payload))
        )
        try:
            entries = self.ranks.all_gather(self._write_tensors(temporary, mine, step))
            self.ranks.broadcast_from_rank0(
                lambda: self._finish(temporary, target, step, payload, entries)
            )
        except BaseException:
            if self.ranks.is_rank0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _is_mine(self, name: str) -> bool:
        spec = self.shard_specs.get(name)
        return spec.owned if spec else self.ranks.is_rank0

    def _new_directory(self, step: int, num_bytes: int) -> Path:
        free = shutil.disk_usage(self.directory).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"{num_bytes} bytes needed, {free} free")
        temporary = self._temporary(step)
        temporary.mkdir()
        return temporary

    def _write_tensors(
        self, directory: Path, tensors: Mapping[str, Tensor], step: int
    ) -> dict[str, FileEntry]:
        """Write this rank's tensors. Returns the entries of its files."""
        from infir2.checkpoint.dcp import save_tensors

        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        with byte_progress(
            f"saving step {step}", num_bytes if self.ranks.is_rank0 else 0
        ) as on_bytes:
            return save_tensors(directory, tensors, self.shard_specs, self.ranks, on_bytes)

    def _finish(
        self,
        temporary: Path,
        target: Path,
        step: int,
        payload: bytes,
        entries: list[dict[str, FileEntry]],
    ) -> None:
        """What rank 0 adds to the files of all ranks, and the rename that publishes them."""
        files = {name: entry for part in entries for name, entry in part.items()}
        files[STATE] = write_file(temporary / STATE, payload)
        fault("save.before_manifest")
        write_file(temporary / MANIFEST, encode_manifest(step, files))
        fsync_directory(temporary)
        if target.exists():
            os.rename(target, self.directory / f"corrupt-step-{step}-{secrets.token_hex(4)}")
        fault("save.before_rename")
        os.rename(temporary, target)
        self._corrupt.discard(step)
        try:
            fsync_directory(self.directory)
        except OSError as error:  # published and whole; only a power cut in the next seconds could undo the rename
            self._warn(
                f"{self.directory}: could not be synced after publishing step {step} ({disk_reason(error)})."
            )
        fault("save.after_rename")

    def _temporary(self, step: int) -> Path:
        return (
            self.directory
            / f"{LEFTOVER}{step}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        )

    def _remove(self, path: Path, step: int) -> None:
        """Out of sight by one rename first, so that a kill in the middle leaves no half checkpoint behind."""
        temporary = self._temporary(step)
        os.rename(path, temporary)
        fault("save.during_retention")
        shutil.rmtree(temporary)

    def _retain(self, newest: int) -> None:
        """Keep the one just published and the newest `keep - 1` good ones; set damaged ones aside until they are old too."""
        try:
            self._thin_out(newest)
        except (
            OSError
        ) as error:  # the new checkpoint is safe; too many old ones are no reason to stop
            self._warn(
                f"{self.directory}: an old checkpoint could not be removed ({disk_reason(error)})."
            )

    def _thin_out(self, newest: int) -> None:
        for step in sorted(self._corrupt & set(published_steps(self.directory))):
            os.rename(
                self.directory / f"step-{step}",
                self.directory / f"corrupt-step-{step}-{secrets.token_hex(4)}",
            )
        self._corrupt.clear()
        older = [step for step in published_steps(self.directory) if step != newest]
        num_removed = max(0, len(older) - (self._keep - 1))
        for step in older[:num_removed]:
            self._remove(self.directory / f"step-{step}", step)
        oldest = published_steps(self.directory)[0]
        for entry in list(self.directory.iterdir()):
            match = _CORRUPT.fullmatch(entry.name)
            if match and int(match[1]) < oldest:
                self._remove(entry, int(match[1]))

    def _make_room(self) -> None:
        """Remove all but the newest checkpoint that verifies; none goes if none does."""
        try:
            good = self.newest()
        except CheckpointError:
            return
        for step in published_steps(self.directory):
            if good and step != good.step:
                self._remove(self.directory / f"step-{step}", step)
                self._warn(f"{self.directory}: removed step-{step} to make room.")

    def _remove_leftovers(self) -> None:
        """Remove what dead saves left, on whatever host: who holds the lock is the only one that saves."""
        for entry in sorted(self.directory.glob(f"{LEFTOVER}*")):
            with contextlib.suppress(OSError):
                shutil.rmtree(entry)
                self._warn(f"removed {entry}, left by a save that did not finish.")
