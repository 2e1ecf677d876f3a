"""Checkpoints of a run directory that survive a kill at any moment.

    runs/cpt/checkpoints/step-20/{__0_0.distcp, ..., .metadata, state.json, manifest.json}

A checkpoint is written under a temporary name and every file is synced; the manifest (sizes and
SHA-256) comes last; then one rename publishes it. So `step-N` is complete or does not exist, and
nothing published is ever modified.

The tensors are a distributed checkpoint of torch (dcp.py), written by one or more ranks; a reader
(reader.py) does not see by how many.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from infir2.checkpoint.lock import RunLock
from infir2.checkpoint.manifest import MANIFEST, FileEntry, encode_manifest, write_hashed
from infir2.checkpoint.reader import (
    CHECKPOINTS,
    STATE,
    Checkpoint,
    Warn,
    load_checkpoint,
    log_warning,
    newest_checkpoint,
    published_steps,
)
from infir2.errors import CheckpointCorruptError, CheckpointError, disk_reason
from infir2.faults import fault
from infir2.files import (
    HeldDirectory,
    disk_error,
    disk_errors,
    fsync_directory,
    make_own_directory,
    require_own_directory,
)
from infir2.parallel.ranks import Ranks
from infir2.parallel.shard_spec import ShardSpec
from infir2.terminal import byte_progress

TEMPORARY = ".tmp-step-"  # prefix of a checkpoint that is being written or removed
_CORRUPT = re.compile(r"corrupt-step-(\d+)-[0-9a-f]+")


class Store:
    """Writes, keeps and finds the checkpoints of one run directory.

    Every rank constructs it and calls `save` at the same point; all succeed or all raise. Rank 0
    acquires the lock of the run directory (OutputExistsError if another job holds it) and removes
    what interrupted saves left.

    Example: `Store("runs/cpt", keep=2).save(20, {"parameters/model.norm.weight": weight}, {})`.

    Args:
        run_dir: created if it does not exist.
        keep: number of checkpoints to keep.
        warn: receives a sentence about everything that is skipped, removed or taken over.
        ranks: the ranks that save together.

    Attributes:
        shard_specs: shard of each tensor that is sharded over ranks; others are saved by rank 0.
    """

    def __init__(
        self,
        run_dir: str | Path,
        keep: int = 2,
        warn: Warn = log_warning,
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
        self._held: HeldDirectory  # rank 0 only
        if self.ranks.is_rank0:
            self._close = weakref.finalize(self, RunLock.acquire(self.run_dir, warn).release)
            try:
                self._open_directory()
            except BaseException:
                self._close()
                raise

    def _open_directory(self) -> None:
        with disk_errors(f"{self.directory}: cannot be used"):
            make_own_directory(self.directory)
            self._held = HeldDirectory(self.run_dir)
            self._remove_leftovers()

    def close(self) -> None:
        """Release the run directory; also done when the store is garbage-collected."""
        if self._close:
            self._close()

    def check_in_place(self) -> None:
        """Raises RunMovedError after the run directory was moved or replaced. Rank 0 only."""
        self._held.check()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None; see `newest_checkpoint`."""
        return newest_checkpoint(self.directory, self._warn, self._corrupt)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Publish `checkpoints/step-N` and remove older checkpoints; returns its path.

        An intact `step-N` that exists already is kept unchanged; a damaged one is renamed. A save
        that fails is retried once; if the disk is full, all older checkpoints but the newest good
        one are removed first.

        Args:
            step: N.
            tensors: of any shape, dtype and device. One piece (`dcp.PIECE_BYTES`) at a time is
                copied to the host.
            state: serializable as JSON.

        Raises:
            CheckpointError: the disk is full or refuses to write. The previous checkpoints are
                intact, and no partial one is left.
            RunMovedError: the run directory was moved or replaced; nothing was written.
        """
        assert self._close is None or self._close.alive, "the store is closed"
        payload = json.dumps(dict(state)).encode()
        target = self.directory / f"step-{step}"
        try:
            if self.ranks.broadcast_from_rank0(lambda: self._is_intact(target)):
                return target
            self._publish(target, step, tensors, payload)
        except OSError as error:
            self._warn(f"saving step {step} failed ({disk_reason(error)}); retrying once.")
            try:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self.ranks.broadcast_from_rank0(self._free_space)
                self._publish(target, step, tensors, payload)
            except OSError as again:
                subject = f"{self.directory}: step {step} could not be saved"
                raise disk_error(subject, again) from again
        self.ranks.broadcast_from_rank0(lambda: self._retain(step))
        return target

    def _is_intact(self, target: Path) -> bool:
        self.check_in_place()
        try:
            load_checkpoint(target)
        except CheckpointCorruptError as error:
            if target.exists():
                self._warn(f"{error} A new checkpoint replaces it.")
            return False
        return True

    def _publish(
        self, target: Path, step: int, tensors: Mapping[str, Tensor], payload: bytes
    ) -> None:
        owned = {name: tensor for name, tensor in tensors.items() if self._owns(name)}
        num_bytes = sum(self.ranks.all_gather(sum(tensor.nbytes for tensor in owned.values())))
        temporary = self.ranks.broadcast_from_rank0(
            lambda: self._create_directory(step, num_bytes + len(payload))
        )
        try:
            entries = self.ranks.all_gather(self._write_tensors(temporary, owned, step))
            self.ranks.broadcast_from_rank0(
                lambda: self._finish(temporary, target, step, payload, entries)
            )
        except BaseException:
            if self.ranks.is_rank0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _owns(self, name: str) -> bool:
        spec = self.shard_specs.get(name)
        return spec.owned if spec else self.ranks.is_rank0

    def _create_directory(self, step: int, num_bytes: int) -> Path:
        require_own_directory(self.directory)
        free = shutil.disk_usage(self.directory).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"{num_bytes} bytes needed, {free} free")
        temporary = self._temporary(step)
        temporary.mkdir()
        return temporary

    def _write_tensors(
        self, directory: Path, tensors: Mapping[str, Tensor], step: int
    ) -> dict[str, FileEntry]:
        """Write this rank's tensors; returns the entries of its files."""
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
        """Rank 0 adds state and manifest to the files of all ranks, and publishes by rename."""
        files = {name: entry for part in entries for name, entry in part.items()}
        self.check_in_place()
        files[STATE] = write_hashed(temporary / STATE, payload)
        fault("save.before_manifest")
        write_hashed(temporary / MANIFEST, encode_manifest(step, files))
        fsync_directory(temporary)
        if target.exists():
            os.rename(target, self._corrupt_path(step))
        fault("save.before_rename")
        os.rename(temporary, target)
        self._corrupt.discard(step)
        try:
            fsync_directory(self.directory)
        except OSError as error:
            # The checkpoint is complete; only a power cut in the next seconds could undo the
            # rename.
            self._warn(
                f"{self.directory}: could not be synced after step {step} was published "
                f"({disk_reason(error)})."
            )
        fault("save.after_rename")

    def _temporary(self, step: int) -> Path:
        suffix = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        return self.directory / f"{TEMPORARY}{step}-{suffix}"

    def _corrupt_path(self, step: int) -> Path:
        return self.directory / f"corrupt-step-{step}-{secrets.token_hex(4)}"

    def _remove(self, path: Path, step: int) -> None:
        """Rename, then delete: a kill in between leaves no partial checkpoint under its name."""
        self.check_in_place()
        temporary = self._temporary(step)
        os.rename(path, temporary)
        fault("save.during_retention")
        temporary.unlink() if temporary.is_symlink() else shutil.rmtree(temporary)

    def _retain(self, newest: int) -> None:
        """Remove old checkpoints; a failure is a warning, because the new one is safe."""
        try:
            self._remove_old(newest)
        except OSError as error:
            self._warn(
                f"{self.directory}: an old checkpoint could not be removed ({disk_reason(error)})."
            )

    def _remove_old(self, newest: int) -> None:
        """Keep `newest` and the `keep - 1` newest good ones.

        Damaged checkpoints are renamed to `corrupt-...`, and removed once all that are kept are
        newer.
        """
        for step in sorted(self._corrupt & set(published_steps(self.directory))):
            os.rename(self.directory / f"step-{step}", self._corrupt_path(step))
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

    def _free_space(self) -> None:
        """Remove all but the newest checkpoint that verifies; none if none verifies."""
        try:
            good = self.newest()
        except CheckpointError:
            return
        for step in published_steps(self.directory):
            if good and step != good.step:
                self._remove(self.directory / f"step-{step}", step)
                self._warn(f"{self.directory}: removed step-{step} to free space.")

    def _remove_leftovers(self) -> None:
        """Remove what interrupted saves left, of any host: only the holder of the lock saves."""
        for entry in sorted(self.directory.glob(f"{TEMPORARY}*")):
            with contextlib.suppress(OSError):
                shutil.rmtree(entry)
                self._warn(f"removed {entry}, left by an interrupted save.")
