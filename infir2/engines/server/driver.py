"""One thread drives an engine for the event loop of a server.

The event loop only queues commands; the thread runs them between two steps of the engine, so that
requests join and leave while others run, and nobody else ever touches the engine. Results return to
the event loop once per step.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from infir2.engines.generate import generate_all
from infir2.engines.native import NativeEngine
from infir2.engines.types import Completion, Request, SamplingParams

T = TypeVar("T")
_WARM_UP = Request("warm-up", [0], SamplingParams(0.0, max_tokens=1, stop_ids=()), key=0)


class CanceledError(Exception):
    """The request was dropped before it finished: by a cancel, new weights or the server's end."""


class QueueFullError(Exception):
    """The server has as many requests as it accepts at a time."""


class WrongVersionError(Exception):
    """A request names another version of the weights than the engine's."""


@dataclass(frozen=True)
class _Result:
    """What a future of the event loop receives."""

    future: "asyncio.Future[Any]"
    value: Any = None
    error: Exception | None = None

    def set(self) -> None:
        if self.future.done():  # the caller has gone
            return
        if self.error is None:
            self.future.set_result(self.value)
        else:
            self.future.set_exception(self.error)


def _set_all(results: list[_Result]) -> None:
    for result in results:
        result.set()


class EngineDriver:
    """Opens an engine in a thread of its own and generates with it.

    All methods are called in the event loop, but for `cancel_all` and what is marked as the
    thread's.

    Args:
        open_engine: loads the model; runs in the thread.
        max_requests: unfinished requests, above which `complete` raises QueueFullError.
        on_end: called in the thread when it ends, whether by `close` or by an error.

    Attributes:
        is_ready: the engine has generated a token.
        failure: the error that ended the thread.
    """

    def __init__(
        self,
        open_engine: Callable[[], NativeEngine],
        max_requests: int,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.is_ready, self.failure = False, None  # type: bool, BaseException | None
        self.num_requests = 0
        self._open_engine, self._max_requests, self._on_end = open_engine, max_requests, on_end
        self._commands = queue.SimpleQueue[Callable[[], None]]()
        self._waiting: dict[str, asyncio.Future[Completion]] = {}  # the thread's
        self._results: list[_Result] = []  # the thread's, until the step ends
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="infir2-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; it answers to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self, seconds: float) -> bool:
        """Cancel everything and end the thread. Returns whether it ended within `seconds`."""
        self._closing = True
        self._commands.put(lambda: None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    async def complete(self, request: Request, policy_version: int | None = None) -> Completion:
        """Generate a response; when the caller is cancelled, so is the request.

        Raises QueueFullError, CanceledError, ValueError as `Engine.submit`, and WrongVersionError
        unless `policy_version` is None or the engine's.
        """
        if self.num_requests >= self._max_requests:
            raise QueueFullError
        future: asyncio.Future[Completion] = self._loop.create_future()
        self.num_requests += 1
        self._commands.put(lambda: self._submit(request, policy_version, future))
        try:
            return await future
        finally:
            self.num_requests -= 1
            if future.cancelled():
                self._commands.put(lambda: self._cancel([request.id]))

    async def call(self, function: Callable[[NativeEngine], T]) -> T:
        """The result of `function`, called in the thread between two steps."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._commands.put(lambda: self._call(function, future))
        return await future

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Drop unfinished requests: their `complete` raises CanceledError."""
        ids = list(request_ids)
        self._commands.put(lambda: self._cancel(ids))

    def cancel_all(self) -> None:
        """`cancel` of all requests; for a function that `call` runs."""
        self._cancel(list(self._waiting))

    # In the thread

    def _run(self) -> None:
        try:
            self._engine = self._open_engine()
            generate_all(self._engine, [_WARM_UP])
            self.is_ready = True
            while not self._closing:
                self._turn()
        except BaseException as error:  # the main thread raises it again
            self.failure = error
        finally:
            self.is_ready, self._closing = False, True
            for future in self._waiting.values():
                self._results.append(_Result(future, error=CanceledError("the server stops")))
            self._send()
            self._on_end()

    def _turn(self) -> None:
        """Run the commands that wait, then one step; without requests, wait for a command."""
        if not self._engine.num_unfinished:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()
        for completion in self._engine.step():
            self._results.append(_Result(self._waiting.pop(completion.id), completion))
        self._send()

    def _send(self) -> None:
        results, self._results = self._results, []
        if results:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(_set_all, results)

    def _submit(
        self, request: Request, version: int | None, future: "asyncio.Future[Completion]"
    ) -> None:
        current = self._engine.policy_version
        try:
            if version not in (None, current):
                raise WrongVersionError(
                    f"the weights have policy_version {current}, not {version}; update one of them"
                )
            self._engine.submit(request)
        except (ValueError, WrongVersionError) as error:
            self._results.append(_Result(future, error=error))
        else:
            self._waiting[request.id] = future

    def _cancel(self, request_ids: Iterable[str]) -> None:
        ids = [name for name in request_ids if name in self._waiting]
        self._engine.cancel(ids)
        for name in ids:
            error = CanceledError(f"request {name} was canceled; send it again")
            self._results.append(_Result(self._waiting.pop(name), error=error))

    def _call(self, function: Callable[[NativeEngine], T], future: "asyncio.Future[T]") -> None:
        try:
            self._results.append(_Result(future, function(self._engine)))
        except Exception as error:
            self._results.append(_Result(future, error=error))
