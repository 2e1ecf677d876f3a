"""A process group of the trainer's rank 0 and the ranks of one server.

Each server has a group of its own: one that dies or is started again concerns no other, and a new
group is made when it is back. torch.distributed does not know the group, so it cannot disturb those
of the trainer. The names of its store are those of `init_custom_process_group`, by which SGLang
joins (0.5.12 to 0.5.23, the same in slime and verl); both torches need the same NCCL.

NCCL does not return when the other side is dead. Whatever may block runs in a daemon thread, and
`abort` ends what is in flight.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from infir2.engines.remote import EngineError
from infir2.errors import first_line

Value = TypeVar("Value")
POLL_SECONDS = 0.001
# The caller has a limit of its own; NCCL's would end the trainer.
NO_TIMEOUT, GLOO_TIMEOUT = timedelta(days=1), timedelta(seconds=60)
# Read when a group is made: errors of this group must not end the trainer either.
_NO_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_ABORTED: list[Any] = []  # gloo's destructor waits for what is in flight, with Python's lock


class BroadcastGroup:
    """Rank 0 of the group. The server joins while `connect` waits.

    Attributes:
        name: of the group; nobody can guess it.
        address: host and port where the server finds it.
        size: number of ranks.
        backend: "nccl", or "gloo" for a trainer on a CPU.
    """

    def __init__(self, host: str, size: int, device: torch.device) -> None:
        """`host` is an address of this machine; the group listens there only."""
        self.name, self.size, self._device = f"infir2-{secrets.token_hex(8)}", size, device
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        self.address: tuple[str, int] = host, listener.getsockname()[1]
        store = dist.TCPStore(
            *self.address,
            is_master=True,
            wait_for_workers=False,
            timeout=NO_TIMEOUT,
            master_listen_fd=listener.detach(),
        )
        for prefix in (self.name, f"{self.name}/", f"{device.type}/"):
            store = dist.PrefixStore(prefix, store)  # type: ignore[assignment]
        self._store = store
        self._backend: Any = None

    async def connect(self) -> None:
        """Return when every rank has joined. Raises EngineError."""
        self._backend = await _in_thread(self._make_backend)

    async def broadcast(self, data: Tensor) -> float:
        """Send uint8 [n] to the other ranks. Returns the seconds. Raises EngineError."""
        begun = time.monotonic()
        options = dist.BroadcastOptions()
        options.rootRank = 0
        backend = self._backend
        # NCCL connects at the first call.
        work = await _in_thread(lambda: backend.broadcast([data], options))
        while not work.is_completed():
            await asyncio.sleep(POLL_SECONDS)
        await _in_thread(work.wait)
        return time.monotonic() - begun

    def abort(self) -> None:
        """End what is in flight, and leave the group; returns at once."""
        backend, self._backend = self._backend, None
        if backend is None:
            return
        if self.backend == "gloo":
            _ABORTED.append(backend)
        else:
            threading.Thread(target=backend.abort, daemon=True).start()

    def _make_backend(self) -> Any:
        if self.backend == "gloo":
            return dist.ProcessGroupGloo(self._store, 0, self.size, GLOO_TIMEOUT)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = NO_TIMEOUT
        with torch.cuda.device(self._device), _environment(_NO_WATCHDOG):
            return dist.ProcessGroupNCCL(self._store, 0, self.size, options)


def local_address(url: str) -> str:
    """The address of this machine that the server at `url` can reach."""
    parts = urllib.parse.urlsplit(url)
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(found[0], found[1]) as probe:
        probe.connect(found[4])  # a datagram socket sends nothing
        return str(probe.getsockname()[0])


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def _in_thread(work: Callable[[], Value]) -> Value:
    """As asyncio.to_thread, but the interpreter does not wait for the thread when it exits.

    Raises EngineError for what torch raises.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Value] = loop.create_future()

    def settle(set_result: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_result(value)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = future.set_result, work()
        except Exception as error:
            outcome = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="infir2-broadcast", daemon=True).start()
    try:
        return await future
    except RuntimeError as error:
        raise EngineError("transfer", f"the broadcast failed: {first_line(error)}") from error
