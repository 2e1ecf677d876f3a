"""A server of SGLang or vLLM as an engine of this process, for `infir2 serve`.

The server gets token ids and returns token ids with log-probabilities; templates, texts, stop texts
and errors are ours, so that a client sees one API whatever generates. An event loop in a thread of
its own talks to the server; `step` takes what has arrived.
"""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from infir2.engines.remote import EngineError, EngineGoneError, checked_completion
from infir2.engines.response_text import Decode, ResponseText
from infir2.engines.server_process import RunningServer, ServerProcess
from infir2.engines.streams import StreamingClient
from infir2.engines.types import (
    Completion,
    Request,
    RequestFailedError,
    Tokens,
    check_request,
)
from infir2.errors import RankError, UserError, first_line

T = TypeVar("T")
WATCH_SECONDS, SILENCE_SECONDS, HEALTH_SECONDS = 5.0, 120.0, 30.0
POLL_SECONDS = 0.005  # a new request waits so long at most, while others run


@dataclass
class _Response:
    """A response that is not complete.

    Attributes:
        text: finds its stop texts.
        heard: when the server last showed that it works on it; infinite while it waits.
        num_shown: tokens that `show` has returned.
    """

    request: Request
    text: ResponseText
    tokens: Tokens = field(default_factory=lambda: Tokens([], [], []))
    work: "asyncio.Task[None] | None" = None
    heard: float = math.inf
    num_shown: int = 0

    def add(self, part: Tokens) -> bool:
        """Take the part up to the token that completes a stop text; whether one does."""
        count = len(part.token_ids)
        if self.request.params.stop_texts:
            for number, token_id in enumerate(part.token_ids):
                self.text.add(token_id)
                if self.text.stopped:
                    count = number + 1
                    break
        self.tokens.extend(part.part(0, count))
        return self.text.stopped

    @property
    def has_more(self) -> bool:
        """Whether there are tokens that `show` has not returned."""
        return len(self.tokens.token_ids) > self.num_shown

    def show(self) -> Tokens:
        """The tokens since the last call."""
        start, self.num_shown = self.num_shown, len(self.tokens.token_ids)
        return self.tokens.part(start)

    def complete(self) -> Completion:
        """Raises BadAnswerError for what is no answer to the request."""
        ids, logprobs, tops = self.tokens.token_ids, self.tokens.logprobs, self.tokens.top_logprobs
        if self.text.stopped:
            values = np.array(logprobs, dtype=np.float32)
            return Completion(self.request.id, ids, values, "stop", 0, tops)
        checked = checked_completion(self.request, ids, logprobs, 0)
        return Completion(checked.id, ids, checked.rollout_logprobs, checked.finish, 0, tops)


class RemoteEngine:
    """A `ServedEngine`: starts a server and generates with it.

    Args:
        host: the server.
        decode: text of token ids.
        max_running_requests: as many requests the server has at a time.
    """

    def __init__(
        self,
        host: ServerProcess | RunningServer,
        decode: Decode,
        max_running_requests: int,
    ) -> None:
        self.policy_version, self.shared_by_ranks = 0, False
        self._host, self._decode, self._max_running = host, decode, max_running_requests
        self._loop = asyncio.new_event_loop()
        threading.Thread(
            target=self._loop.run_forever, name="infir2-remote-engine", daemon=True
        ).start()
        self._events = queue.SimpleQueue[tuple[_Response, Tokens | Exception | None]]()
        self._responses: dict[str, _Response] = {}
        self._failed = deque[RequestFailedError]()
        self._client = cast(StreamingClient, self._wait(host.start()))
        self.info = self._wait(self._client.info())
        self._slots = asyncio.Semaphore(max_running_requests)
        asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    @property
    def max_request_tokens(self) -> int:
        """As `ServedEngine`."""
        return self.info.max_positions or 2**31

    def gauges(self) -> dict[str, int]:
        """As `ServedEngine`."""
        return {"requests_running": min(self._max_running, len(self._responses))}

    @property
    def num_unfinished(self) -> int:
        """As `Engine`."""
        return len(self._responses)

    def submit(self, request: Request) -> None:
        """As `Engine`. Raises ValueError for a temperature that the server refuses, too."""
        check_request(request, self._responses)
        if request.params.temperature > self._client.max_temperature:
            raise ValueError(
                f"temperature: this server's engine samples at {self._client.max_temperature:g} at "
                "most"
            )
        text = ResponseText(self._decode, request.params.stop_texts)
        response = self._responses[request.id] = _Response(request, text)
        self._loop.call_soon_threadsafe(self._begin, response)

    def step(self) -> list[Completion]:
        """As `ServedEngine`. Raises what ended the server."""
        while self._failed:
            error = self._failed.popleft()
            if self._responses.pop(error.id, None):  # else it was canceled
                raise error
        if not self._responses:
            self._require_running()
            return []
        completions: list[Completion] = []
        with contextlib.suppress(queue.Empty):
            response, event = self._events.get(timeout=POLL_SECONDS)
            while True:
                if self._responses.get(response.request.id) is response:  # else it was canceled
                    completions += self._apply(response, event)
                response, event = self._events.get_nowait()
        return completions

    def new_tokens(self) -> dict[str, Tokens]:
        """As `OffersProgress`."""
        fresh = (each for each in self._responses.values() if each.request.streams)
        return {each.request.id: each.show() for each in fresh if each.has_more}

    def cancel(self, request_ids: Iterable[str]) -> None:
        """As `Engine`; the server ends them too."""
        for request_id in request_ids:
            if response := self._responses.pop(request_id, None):
                self._loop.call_soon_threadsafe(_stop, response)

    def _apply(self, response: _Response, event: Tokens | Exception | None) -> list[Completion]:
        """Take what the server said of a response; what is complete now."""
        request_id = response.request.id
        try:
            if isinstance(event, Exception):
                raise event
            if event is not None and not response.add(event):
                return []
            completion = response.complete()
        except EngineError as error:
            if isinstance(error, EngineGoneError):
                self._require_running()
            self._failed.append(RequestFailedError(request_id, first_line(error)))
            return []
        self.cancel([request_id])
        return [completion]

    def _require_running(self) -> None:
        if message := self._host.how_it_ended():
            raise RankError(message)

    # In the event loop

    def _begin(self, response: _Response) -> None:
        response.work = self._loop.create_task(self._receive(response))

    async def _receive(self, response: _Response) -> None:
        try:
            async with (
                self._slots,
                contextlib.aclosing(self._client.stream(response.request)) as parts,
            ):
                response.heard = time.monotonic()
                async for part in parts:
                    response.heard = time.monotonic()
                    self._events.put((response, part))
            self._events.put((response, None))
        except (EngineError, UserError) as error:
            self._events.put((response, error))

    async def _watch(self) -> None:
        """Find a server that hangs: it is silent about a request, and a health check fails."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now, responses = time.monotonic(), list(self._responses.values())
            silent = [each for each in responses if now - each.heard > SILENCE_SECONDS]
            if not silent:
                continue
            try:
                async with asyncio.timeout(HEALTH_SECONDS):
                    await self._client.check_health()
            except (EngineError, TimeoutError):
                message = f"{self._host.name} hangs: nothing for {now - silent[0].heard:.0f} s."
                self._events.put((silent[0], RankError(message)))
            for each in silent:  # it is slow, and works
                each.heard = time.monotonic()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _stop(response: _Response) -> None:
    if response.work is not None:
        response.work.cancel()
