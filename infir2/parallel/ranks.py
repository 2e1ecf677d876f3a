"""The ranks of one run, and the Python objects that they exchange.

In a single process every method returns at once and needs no process group, so callers need no
special case.
"""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from infir2.errors import RankError, UserError
from infir2.files import write_atomically
from infir2.launch.ranks import one_node_attempt_dir

Value = TypeVar("Value")
_POLL_SECONDS = 0.01
_NO_TIMEOUT = timedelta(days=365)


class Ranks:
    """This process's rank, the number of ranks, and collectives over Python objects (gloo).

    Every rank calls each collective at the same point.

    Example: `ranks.broadcast_from_rank0(read_newest)` calls `read_newest()` on rank 0 only and
    returns its result on every rank.

    Args:
        rank: of this process.
        size: number of ranks.
        group: process group of the collectives; None in a single process.
        no_timeout_group: process group of `raise_together` with `on_wait`.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, group: Any = None, no_timeout_group: Any = None
    ) -> None:
        self.rank, self.size, self.group = rank, size, group
        self._no_timeout_group = no_timeout_group

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def with_new_group(self) -> "Ranks":
        """The same ranks with a new process group, for collectives of another thread."""
        if self.size == 1:
            return self
        return Ranks(self.rank, self.size, dist.new_group(backend="gloo"))

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_to_rank0(self, value: Value) -> list[Value]:
        """The values of all ranks, in the order of ranks, on rank 0; [] on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_rank0 else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def broadcast_from_rank0(self, fn: Callable[[], Value]) -> Value:
        """Call `fn` on rank 0 and return its result on every rank.

        A UserError or OSError of rank 0 is raised on every rank.
        """
        if self.size == 1:
            return fn()
        outcome: list[Any] = [None]
        if self.is_rank0:
            try:
                outcome = [(fn(), None)]
            except (UserError, OSError) as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        value, failure = outcome[0]
        if isinstance(failure, UserError):
            failure.on_all_ranks()
        if failure is not None:
            raise failure
        return value

    def raise_together(
        self, fn: Callable[[], Value], on_wait: Callable[[], None] | None = None
    ) -> Value:
        """Call `fn` on every rank; if it fails on one, raise on every rank.

        A rank raises its own UserError or OSError, or else that of the lowest rank that failed.
        With `on_wait`, a rank that has finished waits for the others without a timeout, and calls
        `on_wait()` repeatedly meanwhile.
        """
        if self.size == 1:
            return fn()
        value, own_error = None, None
        try:
            value = fn()
        except (UserError, OSError) as error:
            own_error = error
        if on_wait:
            self._wait_for_all(on_wait)
        errors = [error for error in self.all_gather(own_error) if error is not None]
        if errors:
            if own_error is None and isinstance(errors[0], UserError):
                errors[0].on_all_ranks()
            raise own_error or errors[0]
        return value  # type: ignore[return-value]

    def _wait_for_all(self, on_wait: Callable[[], None]) -> None:
        barrier = dist.barrier(self._no_timeout_group, async_op=True)
        while not barrier.is_completed():
            on_wait()
            time.sleep(_POLL_SECONDS)
        barrier.wait()  # raises if a rank has died


def init_ranks(device: torch.device, timeout_seconds: float) -> Ranks:
    """Initialize torch.distributed from the variables that torchrun sets; call `shutdown_ranks`.

    Without these variables, or with one process, there is no process group. A collective raises
    when it waits longer than `timeout_seconds` for another rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds)
    if directory := one_node_attempt_dir():
        rank = int(os.environ["RANK"])
        store = _loopback_store(directory / "store-port", rank, size, timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, timeout=timeout)
    return Ranks(
        dist.get_rank(),
        size,
        dist.new_group(backend="gloo"),
        dist.new_group(backend="gloo", timeout=_NO_TIMEOUT),
    )


def _loopback_store(path: Path, rank: int, size: int, timeout: timedelta) -> dist.TCPStore:
    """The store of ranks on one machine. Rank 0 writes its port to `path`.

    torch's own store listens on all interfaces, for anybody.
    """
    if rank == 0:
        server = socket.create_server(("127.0.0.1", 0))
        port, descriptor = server.getsockname()[1], server.detach()
        store = dist.TCPStore(
            "127.0.0.1", port, size, True, timeout, False, master_listen_fd=descriptor
        )
        write_atomically(path, str(port).encode())
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while not path.exists():
        if time.monotonic() > deadline:
            raise RankError(f"rank {rank}: rank 0 did not start in {timeout.total_seconds():g} s")
        time.sleep(_POLL_SECONDS)
    return dist.TCPStore("127.0.0.1", int(path.read_text()), size, False, timeout)


def shutdown_ranks() -> None:
    """Destroy the process groups of `init_ranks`, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
