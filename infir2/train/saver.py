"""Checkpoints of a running training, in the foreground or in the background, one at a time."""

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from infir2.checkpoint import Store
from infir2.checkpoint.background import BackgroundSaver
from infir2.config.schema import CheckpointSection
from infir2.errors import CheckpointError, RunMovedError
from infir2.terminal import log
from infir2.train.run_log import RunLog
from infir2.train.trainer import Trainer


@dataclass(frozen=True)
class _PendingSave:
    step: int
    start: float  # time.monotonic()
    end: Future[float]  # time.monotonic() of the publication, or the error


class Saver:
    """Saves a trainer into the run directory.

    A kill loses the steps since the newest published checkpoint: one save interval, plus what was
    trained while a save was running.

    Attributes:
        saved_step: step of the newest published checkpoint of this run; 0 without one.
    """

    def __init__(
        self, store: Store, section: CheckpointSection, kind: str, log: RunLog, saved_step: int
    ) -> None:
        self.saved_step = saved_step
        self._store, self._section, self._kind, self._log = store, section, kind, log
        self._background: BackgroundSaver | None = None
        self._pending: _PendingSave | None = None
        self._trainer: Trainer | None = None  # set by attach

    def attach(self, trainer: Trainer) -> None:
        """Save this trainer from now on."""
        self._trainer = trainer
        self._store.shard_specs = trainer.shard_specs()
        if self._section.background:
            self._background = BackgroundSaver(self._store.save)
            trainer.before_update = self._background.await_copy

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Start a checkpoint when the previous one is finished; in the foreground, finish it too.

        Raises CheckpointError as `finish_pending_save`.
        """
        assert self._trainer is not None
        self.finish_pending_save()
        start = time.monotonic()
        tensors = self._trainer.tensors() | {"rng/torch": torch.get_rng_state()}
        state = state | {"kind": self._kind}
        if self._background:
            future = self._background.start(step, tensors, state)
            self._pending = _PendingSave(step, start, future)
            return
        end: Future[float] = Future()
        self._pending = _PendingSave(step, start, end)
        try:
            self._store.save(step, tensors, state)
            end.set_result(time.monotonic())
        except CheckpointError as error:
            end.set_exception(error)
        except BaseException:  # a second Ctrl-C, no memory: nobody may wait for this save
            self._pending = None
            raise
        self.finish_pending_save()

    def finish_pending_save(self, wait: bool = True) -> None:
        """Record the end of the running save; without `wait`, only if it has ended.

        With `checkpoint.on_save_error = "warn"` a failed save is an event and training continues;
        otherwise, and after the run directory was moved, raises its CheckpointError.
        """
        if self._pending is None or not (wait or self._pending.end.done()):
            return
        pending, self._pending = self._pending, None
        try:
            seconds = pending.end.result() - pending.start
        except CheckpointError as error:
            if self._section.on_save_error == "stop" or isinstance(error, RunMovedError):
                raise
            self._log.event(pending.step, "save_failed", str(error))
        else:
            self._log.write("save", pending.step, seconds=seconds)
            self.saved_step = pending.step

    def close(self) -> None:
        """Wait for the running save. Its error is only printed: another one ends the run."""
        if self._background:
            self._background.close()
        if self._pending and (failure := self._pending.end.exception()):
            log(str(failure), self._kind)
