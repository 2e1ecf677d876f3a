"""One thread drives an engine for the event loop of a server.

The event loop only queues commands; the thread runs them between two steps of the engine, so that
requests join and leave while others run, and nobody else ever touches the engine. Results return to
the event loop once per step.
"""

import asyncio
import contextlib
import queue
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from infir2.engines.generate import generate_all
from infir2.engines.types import (
    Completion,
    Request,
    RequestFailedError,
    SamplingParams,
    ServedEngine,
    Tokens,
)

T = TypeVar("T")
E = TypeVar("E", bound=ServedEngine)
Event = Completion | Tokens | Exception
MERGED_TOKENS = 8
IDLE_SECONDS = 1.0  # then an engine may say that it has ended
_WARM_UP = Request("warm-up", [0], SamplingParams(0.0, max_tokens=1, stop_ids=()), key=0)


class CanceledError(Exception):
    """The request was dropped before it finished: by a cancel, new weights or the server's end."""


class QueueFullError(Exception):
    """The server has as many requests as it accepts at a time."""


class WrongVersionError(Exception):
    """A request names another version of the weights than the engine's."""


class _Inbox:
    """What has arrived for requests that are answered together; lives in the event loop.

    While a reader is behind, the tokens of a request are taken together, up to
    MERGED_TOKENS: so an event is rare where the engine is fast, and a stream stays one.
    """

    def __init__(self) -> None:
        self._events = deque[tuple[int, Any]]()
        self._newest: dict[int, Any] = {}  # of each request, among `_events`
        self._is_read: asyncio.Future[None] | None = None

    def put(self, number: int, event: Any) -> None:
        """Add an event of the request `number`, and wake who waits."""
        newest = self._newest.get(number)
        if (
            isinstance(event, Tokens)
            and isinstance(newest, Tokens)
            and len(newest.token_ids) + len(event.token_ids) <= MERGED_TOKENS
        ):
            newest.extend(event)
        else:
            self._newest[number] = event
            self._events.append((number, event))
        if self._is_read is not None and not self._is_read.done():
            self._is_read.set_result(None)

    async def get(self) -> tuple[int, Any]:
        """The oldest event, with the number of its request."""
        while not self._events:
            self._is_read = asyncio.get_running_loop().create_future()
            await self._is_read
        number, event = self._events.popleft()
        if self._newest[number] is event:
            del self._newest[number]
        return number, event


@dataclass
class _Waiter:
    """Who waits for a request.

    Attributes:
        inbox: receives its events.
        number: of the request among those that share `inbox`.
        request: what is generated.
        num_shown: tokens that were sent before the completion.
    """

    inbox: _Inbox
    number: int
    request: Request
    num_shown: int = 0


class EngineDriver(Generic[E]):
    """Opens an engine in a thread of its own and generates with it.

    All methods are called in the event loop, but for those marked as the thread's.

    Args:
        open_engine: loads the model; runs in the thread.
        max_requests: unfinished requests, above which `generate` raises QueueFullError.
        on_end: called in the thread when it ends, whether by `close` or by an error.

    Attributes:
        is_ready: the engine has generated a token.
        failure: the error that ended the thread.
        num_requests: unfinished requests.
        max_request_tokens: that of the engine, once it is ready.
        counts: of what was done since the start, by name.
    """

    def __init__(
        self,
        open_engine: Callable[[], E],
        max_requests: int,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.is_ready, self.failure = False, None  # type: bool, BaseException | None
        self.num_requests, self.counts = 0, Counter[str]()
        self.max_request_tokens = 0
        self._open_engine, self._max_requests, self._on_end = open_engine, max_requests, on_end
        self._commands = queue.SimpleQueue[Callable[[], None]]()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="infir2-engine", daemon=True)
        # The thread's.
        self._waiters: dict[str, _Waiter] = {}
        self._results: list[tuple[_Waiter, Any]] = []  # until the step ends

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

    async def generate(
        self, requests: Sequence[Request], policy_version: int | None = None
    ) -> AsyncIterator[tuple[int, Completion | Tokens]]:
        """Yield (number of a request, its completion); before, the tokens of one that streams.

        Closing the iterator, or cancelling who waits for it, cancels the requests. Raises
        QueueFullError, CanceledError, RequestFailedError, ValueError as `Engine.submit`, and
        WrongVersionError unless `policy_version` is None or the engine's.
        """
        if self.num_requests + len(requests) > self._max_requests:
            raise QueueFullError
        inbox = _Inbox()
        unfinished = {request.id for request in requests}
        self.num_requests += len(requests)
        for number, request in enumerate(requests):
            waiter = _Waiter(inbox, number, request)
            self._commands.put(partial(self._submit, waiter, policy_version))
        try:
            while unfinished:
                number, event = await inbox.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Completion):
                    unfinished.remove(event.id)
                yield number, event
        finally:
            self.num_requests -= len(requests)
            if unfinished:
                self.cancel(unfinished)

    async def complete(self, request: Request, policy_version: int | None = None) -> Completion:
        """The response to one request. Raises as `generate`."""
        async with contextlib.aclosing(
            self.generate([request], policy_version)  # type: ignore[type-var]
        ) as events:
            async for _, event in events:
                assert isinstance(event, Completion)
                return event
        raise AssertionError

    async def call(self, function: Callable[[E], T]) -> T:
        """The result of `function`, called in the thread between two steps."""
        waiter = _Waiter(_Inbox(), 0, _WARM_UP)
        self._commands.put(lambda: self._call(function, waiter))
        _, result = await waiter.inbox.get()
        if isinstance(result, Exception):
            raise result
        return result

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Drop unfinished requests: who waits for them receives CanceledError."""
        ids = list(request_ids)
        self._commands.put(lambda: self._cancel(ids))

    def cancel_all(self) -> None:
        """`cancel` of all requests, for a function that `call` runs: the thread's."""
        self._cancel(list(self._waiters))

    # In the thread

    def _run(self) -> None:
        try:
            self._engine = self._open_engine()
            generate_all(self._engine, [_WARM_UP])
            self.max_request_tokens = self._engine.max_request_tokens
            self.is_ready = True
            while not self._closing:
                self._turn()
        except BaseException as error:
            if not self._closing:
                self.failure = error  # the main thread raises it again
        finally:
            self.is_ready, self._closing = False, True
            end = CanceledError("the server stops")
            self._results += [(waiter, end) for waiter in self._waiters.values()]
            self._send()
            self._on_end()

    def _turn(self) -> None:
        """Run the commands that wait, then one step; without requests, wait for a command first."""
        if not self._engine.num_unfinished:
            with contextlib.suppress(queue.Empty):
                self._commands.get(timeout=IDLE_SECONDS)()
        while not self._commands.empty():
            self._commands.get()()
        try:
            for completion in self._engine.step():
                waiter = self._waiters.pop(completion.id)
                self._count(completion, waiter)
                if waiter.request.streams:
                    self._show(waiter, completion.tokens.part(waiter.num_shown))
                self._results.append((waiter, completion))
        except RequestFailedError as error:
            self._results.append((self._waiters.pop(error.id), error))
        for name, tokens in self._engine.new_tokens().items():
            self._show(self._waiters[name], tokens)
        self._send()

    def _show(self, waiter: _Waiter, tokens: Tokens) -> None:
        """Also what a slow turn has gathered, or the end brings, is shown in parts."""
        waiter.num_shown += len(tokens.token_ids)
        for start in range(0, len(tokens.token_ids), MERGED_TOKENS):
            self._results.append((waiter, tokens.part(start, start + MERGED_TOKENS)))

    def _count(self, completion: Completion, waiter: _Waiter) -> None:
        self.counts[f"finished_{completion.finish}"] += 1
        self.counts["prompt_tokens"] += len(waiter.request.token_ids)
        self.counts["generated_tokens"] += len(completion.token_ids)

    def _send(self) -> None:
        results, self._results = self._results, []
        if results:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(_put_all, results)

    def _submit(self, waiter: _Waiter, version: int | None) -> None:
        current, request = self._engine.policy_version, waiter.request
        try:
            if version not in (None, current):
                raise WrongVersionError(
                    f"the weights have policy_version {current}, not {version}; update one of them"
                )
            self._engine.submit(request)
        except (ValueError, WrongVersionError) as error:
            self._results.append((waiter, error))
        else:
            self._waiters[request.id] = waiter

    def _cancel(self, request_ids: Iterable[str]) -> None:
        ids = [name for name in request_ids if name in self._waiters]
        self._engine.cancel(ids)
        self.counts["canceled"] += len(ids)
        for name in ids:
            error = CanceledError(f"request {name} was canceled; send it again")
            self._results.append((self._waiters.pop(name), error))

    def _call(self, function: Callable[[E], Any], waiter: _Waiter) -> None:
        try:
            self._results.append((waiter, function(self._engine)))
        except Exception as error:
            self._results.append((waiter, error))


def _put_all(results: list[tuple[_Waiter, Any]]) -> None:
    for waiter, event in results:
        waiter.inbox.put(waiter.number, event)
