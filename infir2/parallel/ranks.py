"""The processes of one run: who they are, and the few words they exchange outside of tensors.

A `Ranks` of one does nothing and needs no process group, so callers never ask how many there are.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from infir2.errors import UserError

Value = TypeVar("Value")
_POLL_SECONDS = 0.01
_NO_LIMIT = timedelta(days=365)


class Ranks:
    """Rank and size of this process's run, and objects passed between its ranks over gloo.

    `group`: the process group of these exchanges, None for one process.
    Example: `ranks.broadcast_from_rank0(lambda: read_newest())` runs on rank 0 and gives every rank its result, or its UserError.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, group: Any = None, patient: Any = None
    ) -> None:
        self.rank, self.size, self.group, self._patient = rank, size, group, patient

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def fork(self) -> "Ranks":
        """The same ranks over a channel of their own, for another thread. Every rank calls this at the same point."""
        return (
            Ranks(self.rank, self.size, dist.new_group(backend="gloo")) if self.size > 1 else self
        )

    def all_gather(self, value: Value) -> list[Value]:
        """Every rank's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_from_rank0(self, work: Callable[[], Value]) -> Value:
        """`work()` of rank 0, on every rank. Raises its UserError or OSError on every rank."""
        if self.size == 1:
            return work()
        box: list[Any] = [None]
        if self.is_rank0:
            try:
                box = [(work(), None)]
            except (UserError, OSError) as error:
                box = [(None, error)]
        dist.broadcast_object_list(box, src=0, group=self.group)
        value, failure = box[0]
        if failure is not None:
            if isinstance(failure, UserError):
                failure.reported_by_rank0 = True
            raise failure
        return value

    def raise_together(
        self, work: Callable[[], Value], waiting: Callable[[], None] | None = None
    ) -> Value:
        """`work()` on every rank; where one raises a UserError or an OSError, every rank raises (its own, else the first).

        With `waiting`, called all the time, a rank that has finished waits for the others without a limit.
        """
        if self.size == 1:
            return work()
        value, mine = None, None
        try:
            value = work()
        except (UserError, OSError) as error:
            mine = error
        if waiting:
            met = dist.barrier(self._patient, async_op=True)
            while not met.is_completed():
                waiting()
                time.sleep(_POLL_SECONDS)
            met.wait()  # raises if a rank is gone
        errors = [error for error in self.all_gather(mine) if error is not None]
        if errors:
            if mine is None and isinstance(errors[0], UserError):
                errors[0].reported_by_rank0 = True
            raise mine or errors[0]
        return value  # type: ignore[return-value]


def init_ranks(device: torch.device, timeout_seconds: float) -> Ranks:
    """This process's team, from the variables that torchrun sets; without them, or with one process, a team of one.

    A collective that waits longer than `timeout_seconds` for a rank raises. Call `shutdown_ranks` when done.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    return Ranks(
        dist.get_rank(),
        size,
        dist.new_group(backend="gloo"),
        dist.new_group(backend="gloo", timeout=_NO_LIMIT),
    )


def shutdown_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
