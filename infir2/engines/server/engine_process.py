"""The native engine in a process of its own, as an engine of the server's.

An engine frees Python's lock at each call of torch, and an event loop that is busy with streams
gives it back 5 ms later: in one process, 64 streams slow an H200's engine down to a tenth. So they
share no lock, and exchange one message per step of the engine, whatever the number of requests.
`engine_worker.py` is the other side. Messages have numbers, texts and lists only (`marshal`).
"""

import marshal
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from infir2 import errors
from infir2.engines.types import Completion, Request, RequestFailedError, Tokens, check_request
from infir2.errors import RankError, UserError

COMMAND = [sys.executable, "-P", "-m", "infir2.engines.server.engine_worker"]
POLL_SECONDS = 0.005  # a new request waits so long at most, while others run


class Worker(Protocol):
    """The other side of a `connection`."""

    connection: Connection

    def how_it_ended(self) -> str:
        """Such as "code 1" or "signal 9"; called once the connection is closed."""
        ...


class EngineWorker:
    """The process of an engine: it ends when the `connection` to it is closed."""

    def __init__(self) -> None:
        self.connection: Connection
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the server's
            )

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def how_it_ended(self) -> str:
        """As `Worker`."""
        code = self._process.wait()
        return f"signal {-code}" if code < 0 else f"code {code}"


class ProcessEngine:
    """A `ServedEngine` that a trainer may update, at the other end of a connection.

    Attributes:
        cache_tokens, max_running_requests, scale_format: as `NativeEngine`.
    """

    def __init__(self, worker: Worker, **settings: Any) -> None:
        """Return once it is loaded; `settings` as `engine_worker.open_engine`.

        Raises what loading raises, and RankError when the process ends.
        """
        self.policy_version, self.shared_by_ranks = 0, False
        self._worker, self._connection = worker, worker.connection
        self._unfinished: dict[str, int] = {}  # the number of each request, which no other had
        self._requests: dict[int, Request] = {}
        self._num_requests = 0
        self._new: dict[str, Tokens] = {}
        self._finished: list[Completion] = []
        self._failed: list[tuple[int, str]] = []
        self._replies: list[tuple[str, Any]] = []
        facts = self._ask("open", settings)
        self.cache_tokens: int = facts["cache_tokens"]
        self.max_running_requests: int = facts["max_running_requests"]
        self.scale_format: str | None = facts["scale_format"]

    @property
    def max_request_tokens(self) -> int:
        """As `ServedEngine`."""
        return self.cache_tokens

    @property
    def num_unfinished(self) -> int:
        """As `Engine`."""
        return len(self._unfinished)

    def gauges(self) -> dict[str, int]:
        """As `ServedEngine`, of the other side between two steps: it says that they end."""
        gauges: dict[str, int] = self._ask("gauges")
        return gauges

    def submit(self, request: Request) -> None:
        """As `Engine`; a request that the cache cannot hold fails in `step`."""
        check_request(request, self._unfinished)
        number = self._num_requests = self._num_requests + 1
        self._unfinished[request.id], self._requests[number] = number, request
        params = vars(request.params)
        self._send("submit", number, list(request.token_ids), params, request.key, request.streams)

    def step(self) -> list[Completion]:
        """As `ServedEngine`: what has arrived."""
        seconds = POLL_SECONDS if self._unfinished else 0.0
        while self._connection.poll(seconds):
            self._receive()
            seconds = 0.0
        while self._failed:
            number, message = self._failed.pop()
            if request := self._forget(number):
                raise RequestFailedError(request.id, message)
        finished, self._finished = self._finished, []
        return finished

    def new_tokens(self) -> dict[str, Tokens]:
        """As `OffersProgress`."""
        new, self._new = self._new, {}
        return new

    def cancel(self, request_ids: Iterable[str]) -> None:
        """As `Engine`."""
        numbers = [self._unfinished[each] for each in request_ids if each in self._unfinished]
        for number in numbers:
            self._forget(number)
        self._send("cancel", numbers)

    def update_from_directory(self, directory: Path, policy_version: int) -> None:
        """As `NativeEngine`."""
        self._ask("update", str(directory), policy_version)

    def weights_digest(self) -> dict[str, str]:
        """As `OffersDigest`."""
        digest: dict[str, str] = self._ask("digest")
        return digest

    def _forget(self, number: int) -> Request | None:
        """Take a request out of those that are unfinished; None if it is none of them."""
        if request := self._requests.pop(number, None):
            del self._unfinished[request.id]
            self._new.pop(request.id, None)
        return request

    def _ask(self, *command: Any) -> Any:
        self._send(*command)
        while not self._replies:
            self._receive()
        kind, value = self._replies.pop()
        if not kind:
            return value
        error = getattr(errors, kind, RuntimeError)
        raise (error if issubclass(error, UserError) else RuntimeError)(value)

    def _send(self, *command: Any) -> None:
        try:
            self._connection.send_bytes(marshal.dumps(command))
        except OSError as error:
            raise self._ended() from error

    def _receive(self) -> None:
        try:
            message = marshal.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._ended() from error
        new, finished, failed, replies, self.policy_version = message
        for number, *tokens in new:
            if request := self._requests.get(number):
                self._new.setdefault(request.id, Tokens([], [])).extend(Tokens(*tokens))
        for number, token_ids, logprobs, *rest in finished:
            if request := self._forget(number):
                values = np.array(logprobs, dtype=np.float32)
                self._finished.append(Completion(request.id, token_ids, values, *rest))
        self._failed += failed
        self._replies += replies

    def _ended(self) -> RankError:
        how = self._worker.how_it_ended()
        return RankError(f"the engine's process ended ({how}); start the server again.")
