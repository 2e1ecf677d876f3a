"""One engine of a pool: its states, its requests, and its restarts.

    starting -> synced (has the current weights) -> serving (they are proved) -> draining -> ...
                                                    and dead when it has failed too often
    serving -> asleep (has given up its GPU memory) -> draining, synced, serving with new weights

Only a serving engine has requests. Everything here runs in the pool's event loop.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from infir2.engines.remote import (
    BadAnswerError,
    EngineClient,
    EngineError,
    EngineHost,
    PublishedWeights,
    SleepingClient,
    WeightsDifferError,
)
from infir2.engines.types import Completion, Request
from infir2.errors import CheckFailedError
from infir2.terminal import log

Value = TypeVar("Value")
State = Literal["starting", "synced", "serving", "asleep", "draining", "dead"]
HEALTH_SECONDS = 10.0  # an engine that finished nothing for so long is asked whether it is well
SECONDS_PER_TOKEN = 0.5  # slower is a hang of one request, although its engine is well
MAX_BAD_ANSWERS = 3  # in a row, then the engine is started again
RESTART_SECONDS, CANCEL_SECONDS = 1.0, 5.0
BROKEN = ("gone", "hang", "version")  # reasons that say something of the whole engine


@dataclass(frozen=True)
class PoolLimits:
    """Bounds of a pool.

    Attributes:
        max_queued: requests at one engine.
        silence_seconds: an engine that neither finishes a request nor passes a health check for so
            long is hung.
        start_seconds: longest start of an engine, and longest update of its weights.
        max_attempts: of one request, then the run ends.
    """

    max_queued: int
    silence_seconds: float
    start_seconds: float
    max_attempts: int = 6


class Pool(Protocol):
    """What a member knows of its pool."""

    limits: PoolLimits
    num_engines: int
    weights: PublishedWeights | None

    def finish(self, completion: Completion) -> None:
        """Take a finished request."""
        ...

    def retry(self, request: Request, member: "PoolMember", error: EngineError) -> None:
        """Let another engine, if there is one, generate a request that failed here."""
        ...

    def count(self, event: str) -> None:
        """Count an event for the metrics."""
        ...

    def changed(self) -> None:
        """A state has changed or a place is free."""
        ...


class PoolMember:
    """An engine, from its first start to its last failure.

    Attributes:
        state: see above.
        running: the requests that it works on.
        num_restarts: how often it was started again.
    """

    def __init__(self, host: EngineHost, pool: Pool) -> None:
        self.host, self._pool = host, pool
        self.state: State = "starting"
        self.running: dict[str, tuple[Request, asyncio.Task[None]]] = {}
        self.num_restarts = 0
        self._held: PublishedWeights | None = None
        self._published = asyncio.Event()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._bad_answers, self._last_sign = 0, time.monotonic()
        self._client: EngineClient | None = None

    def serves(self, weights: PublishedWeights | None) -> bool:
        """Whether it may generate with these weights."""
        return self.state == "serving" and self._held is weights

    def holds(self, weights: PublishedWeights | None) -> bool:
        """Whether it generates with these weights, or does so again after it has slept."""
        return self.state in ("serving", "asleep") and self._held is weights

    def is_settled(self, weights: PublishedWeights) -> bool:
        """Whether a publish need not wait for it: it has the weights, or comes later or never."""
        is_restarting = self.state == "starting" and self.num_restarts > 0
        return self.serves(weights) or self.state == "dead" or is_restarting

    def publish(self) -> None:
        """The pool has new weights."""
        self._published.set()

    def start(self, request: Request, policy_version: int) -> None:
        """Begin to generate a request."""
        work = asyncio.get_running_loop().create_task(self._generate(request, policy_version))
        self.running[request.id] = request, work

    async def cancel(self, request_ids: set[str]) -> None:
        """End requests here and at the server."""
        mine = sorted(request_ids & self.running.keys())
        for request_id in mine:
            self.running.pop(request_id)[1].cancel()
        if mine and self._client is not None:
            with contextlib.suppress(EngineError):
                await within(CANCEL_SECONDS, self._client.cancel(mine))

    async def sleep(self) -> None:
        """Give up GPU memory until new weights come; an engine that fails at it starts again."""
        client = self._client
        if self.state != "serving" or not isinstance(client, SleepingClient):
            return
        self.state = "asleep"
        try:
            await within(self._pool.limits.start_seconds, client.sleep())
        except EngineError as error:
            self._break(error)

    async def run(self) -> None:
        """Serve until the engine has failed more than `max_restarts` times. Raises UserError."""
        while True:
            try:
                await self._serve()
            except EngineError as error:
                await self._end(error)
            if self.num_restarts >= self.host.max_restarts:
                break
            self.num_restarts += 1
            self._pool.count("restarts")
            self._enter("starting")
            await asyncio.sleep(RESTART_SECONDS)
        log(f"{self.host.name} is not started again", "rl")
        self._enter("dead")

    async def close(self) -> None:
        """Stop the requests, and the server if it is ours."""
        await self.cancel(set(self.running))
        if self._client is not None:
            await self._client.close()
        self.host.kill()

    async def _serve(self) -> None:
        self._broken = asyncio.get_running_loop().create_future()
        self._bad_answers, self._held = 0, None
        self._client = await within(self._pool.limits.start_seconds, self.host.start())
        self._last_sign = time.monotonic()
        while True:
            self._published.clear()
            weights = self._pool.weights
            if weights is not None and weights is not self._held:
                await self._sync(self._client, weights)
            await self._watch(self._client)

    async def _sync(self, client: EngineClient, weights: PublishedWeights) -> None:
        """Load and prove the weights; what differs is sent once more."""
        seconds = self._pool.limits.start_seconds
        self._enter("draining")
        for is_last in (False, True):
            begun = time.monotonic()
            await within(seconds, client.update_weights(weights))
            weights.took("load", time.monotonic() - begun)
            self._enter("synced")
            try:
                begun = time.monotonic()
                await within(seconds, client.prove_weights(weights))
                weights.took("proof", time.monotonic() - begun)
                break
            except WeightsDifferError as error:
                self._pool.count("weights_sent_again")
                log(f"{self.host.name} has other weights than it was sent: {error}", "rl")
                if is_last:
                    raise CheckFailedError(
                        f"{self.host.name} does not hold the published weights, after they were "
                        f"sent twice: {error}"
                    ) from error
        self._held, self._last_sign = weights, time.monotonic()
        self._enter("serving")

    async def _watch(self, client: EngineClient) -> None:
        """Return when there are new weights. Raises EngineError when the engine has failed."""
        health = asyncio.create_task(self._check_health(client))
        published = asyncio.create_task(self._published.wait())
        try:
            waits: set[asyncio.Future[Any]] = {health, published, self._broken}
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            health.cancel()
            published.cancel()
            await asyncio.gather(health, published, return_exceptions=True)

    async def _check_health(self, client: EngineClient) -> None:
        """Ask whenever nothing has finished for a while. Raises EngineError for a long silence."""
        silence = self._pool.limits.silence_seconds
        pause = min(HEALTH_SECONDS, silence / 2)
        while True:
            await asyncio.sleep(pause)
            if time.monotonic() - self._last_sign <= pause or self.state == "asleep":
                continue
            try:
                await within(silence, client.check_health())
                self._last_sign = time.monotonic()
            except EngineError as error:
                answers = isinstance(error, BadAnswerError)  # it may be compiling kernels
                is_silent = not answers or time.monotonic() - self._last_sign > silence
                if is_silent and self.state != "asleep":  # one that sleeps lets requests wait
                    raise

    async def _generate(self, request: Request, policy_version: int) -> None:
        limits, tokens = self._pool.limits, request.params.max_tokens
        seconds = limits.silence_seconds + SECONDS_PER_TOKEN * tokens
        assert self._client is not None
        try:
            completion = await within(seconds, self._client.generate(request, policy_version))
        except EngineError as error:
            self.running.pop(request.id, None)
            self._bad_answers += 1
            if error.reason in BROKEN or self._bad_answers >= MAX_BAD_ANSWERS:
                self._break(error)
            self._pool.retry(request, self, error)
        else:
            self._last_sign, self._bad_answers = time.monotonic(), 0
            self.running.pop(request.id, None)
            self._pool.finish(completion)
        self._pool.changed()

    def _break(self, error: EngineError) -> None:
        self.state = "draining"
        if not self._broken.done():
            self._broken.set_exception(error)

    async def _end(self, error: EngineError) -> None:
        """Give the requests back to the pool, and end the server if it is ours."""
        others = "; the others do its work" if self._pool.num_engines > 1 else ""
        log(f"{self.host.name} failed ({error.reason}): {error}{others}", "rl")
        self._enter("draining")
        requests = [request for request, _ in self.running.values()]
        for _, task in self.running.values():
            task.cancel()
        self.running = {}
        for request in requests:
            self._pool.retry(request, self, EngineError("gone", str(error)))
        self.host.kill()
        client, self._client = self._client, None
        if client is not None:
            if requests:  # a server that is not ours still works on them
                with contextlib.suppress(EngineError):
                    await within(CANCEL_SECONDS, client.cancel([each.id for each in requests]))
            await client.close()
        if self._broken.done():
            self._broken.exception()  # otherwise asyncio prints one that nobody has read

    def _enter(self, state: State) -> None:
        self.state = state
        self._pool.changed()


async def within(seconds: float, work: Coroutine[Any, Any, Value]) -> Value:
    """The result of `work`; raises EngineError "hang" when it takes longer."""
    try:
        # wait_for of Python 3.11 may lose a cancellation that arrives with the result.
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as error:
        raise EngineError("hang", f"no answer within {seconds:g} s") from error
