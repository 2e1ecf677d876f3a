"""Any number of engines as one: an engine that fails loses its requests to the others.

An event loop in a thread of its own waits for all servers. A request keeps its id wherever it is
generated; an answer that is none (`remote.py`) is counted and the request generated again, on
another engine if there is one. Only engines that have proved to hold the newest weights get work.
"""

import asyncio
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from infir2.engines.pool_member import PoolLimits, PoolMember
from infir2.engines.remote import (
    EngineError,
    EngineHost,
    PublishedWeights,
    WeightProbe,
    WeightPublisher,
)
from infir2.engines.types import Completion, Request, check_request
from infir2.errors import RankError, first_line
from infir2.parallel.ranks import Ranks

Value = TypeVar("Value")
Finished = queue.SimpleQueue[list[Completion] | BaseException]
POLL_SECONDS = 0.5
CLOSE_SECONDS = 10.0


class EnginePool:
    """A `RolloutEngine` over servers. Every rank has this object; rank 0's works.

    Attributes:
        probe: what the trainer computes with the weights of the next `update_weights`; servers that
            cannot show their weights are compared with it.
    """

    def __init__(
        self,
        hosts: Sequence[EngineHost],
        limits: PoolLimits,
        publisher: WeightPublisher | None,
        ranks: Ranks,
        may_sleep: bool = False,
    ) -> None:
        """Start the engines; they serve after the first `update_weights`.

        Without `may_sleep`, `sleep` does nothing. `hosts` is empty and `publisher` None on every
        rank but 0.
        """
        self.policy_version, self.shared_by_ranks = 0, True
        self.probe: WeightProbe | None = None
        self._ranks, self._publisher = ranks, publisher
        self._unfinished_ids: set[str] = set()
        self._finished: Finished = queue.SimpleQueue()
        self._publish_metrics: dict[str, float] = {}
        self._may_sleep, self._is_asleep, self._freed_bytes = may_sleep, False, 0.0
        self._loop = asyncio.new_event_loop()
        self._dispatcher: _Dispatcher | None = None
        if ranks.is_rank0:
            thread = threading.Thread(
                target=self._loop.run_forever, name="infir2-engines", daemon=True
            )
            thread.start()
            self._dispatcher = self._wait(_open_dispatcher(hosts, limits, self._finished))

    @property
    def num_unfinished(self) -> int:
        """As `Engine`."""
        return len(self._unfinished_ids)

    def submit(self, request: Request) -> None:
        """As `Engine`; stop texts and the most likely tokens are not among what servers do."""
        check_request(request, self._unfinished_ids)
        if request.params.stop_texts or request.params.top_logprobs:
            raise ValueError(f"request {request.id}: a pool has no stop texts and no top_logprobs")
        self._unfinished_ids.add(request.id)
        self._loop.call_soon_threadsafe(self._working().add, request)

    def step(self) -> list[Completion]:
        """As `Engine`. Raises RankError when no engine is left, CheckFailedError for weights that
        an engine does not hold."""
        completions = []
        try:
            items = self._finished.get(timeout=POLL_SECONDS)
            while True:
                if isinstance(items, BaseException):
                    raise items
                for item in items:
                    if item.id in self._unfinished_ids:  # else it was canceled
                        self._unfinished_ids.remove(item.id)
                        completions.append(item)
                items = self._finished.get_nowait()
        except queue.Empty:
            return completions

    def cancel(self, request_ids: Iterable[str]) -> None:
        """As `Engine`; the servers end them too."""
        canceled = self._unfinished_ids.intersection(request_ids)
        self._unfinished_ids -= canceled
        if canceled:
            self._wait(self._working().cancel(canceled))

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """As `WeightSink`: keep them, let every engine load and prove them.

        Engines that are being started again get them later. Raises RankError, CheckFailedError.
        """
        assert not self.num_unfinished, "finish or cancel all requests before new weights"
        stream = iter(weights)

        def write() -> PublishedWeights | None:
            try:
                if self._publisher is None:
                    return None
                return replace(self._publisher.publish(stream, policy_version), probe=self.probe)
            finally:
                for _ in stream:  # the ranks gather every weight together
                    pass

        begun = time.monotonic()
        published = self._ranks.raise_together(write)
        if self._is_asleep:
            _empty_cache()  # the engines take the memory back
        self._is_asleep, written = False, time.monotonic()
        self._ranks.broadcast_from_rank0(lambda: self._sync(published))
        self.policy_version = policy_version
        if published is not None:
            self._publish_metrics = published.metrics(written - begun)

    def sleep(self) -> None:
        """As `CanSleep`: the servers leave their GPUs to the trainer."""
        assert not self.num_unfinished, "finish or cancel all requests before the engines sleep"
        if not self._may_sleep:
            return
        before = _free_bytes()
        self._ranks.broadcast_from_rank0(lambda: self._wait(self._working().sleep()))
        self._is_asleep, self._freed_bytes = True, max(0.0, _free_bytes() - before)

    def metrics(self) -> dict[str, float]:
        """What has happened since the last call, and the newest publish; {} but on rank 0."""
        if self._dispatcher is None:
            return {}
        slept = {"sleep_freed_bytes": self._freed_bytes} if self._freed_bytes else {}
        return self._publish_metrics | slept | self._wait(self._dispatcher.metrics())

    def close(self) -> None:
        """Stop the engines that were started, and remove the published weights."""
        if self._dispatcher is not None:
            self._wait(self._dispatcher.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
        if self._publisher is not None:
            self._publisher.close()

    def _sync(self, published: PublishedWeights | None) -> None:
        assert published is not None
        assert self._publisher is not None
        self._wait(self._working().sync(published))
        self._publisher.remove_before(published)

    def _working(self) -> "_Dispatcher":
        assert self._dispatcher is not None, "only rank 0 has engines"
        return self._dispatcher

    def _wait(self, work: Coroutine[Any, Any, Value]) -> Value:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free_bytes() -> float:
    """Free memory of this rank's GPU, as its driver sees it."""
    return float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0.0


async def _open_dispatcher(
    hosts: Sequence[EngineHost],
    limits: PoolLimits,
    finished: Finished,
) -> "_Dispatcher":
    return _Dispatcher(hosts, limits, finished)


class _Dispatcher:
    """Gives requests to engines; lives in the event loop."""

    def __init__(
        self,
        hosts: Sequence[EngineHost],
        limits: PoolLimits,
        finished: Finished,
    ) -> None:
        self.limits, self.weights, self.num_engines = limits, None, len(hosts)
        self._finished = finished
        self._fresh: list[Completion] = []
        self._waiting: deque[Request] = deque()
        self._failed_at: dict[str, list[PoolMember]] = {}
        self._counts: Counter[str] = Counter()
        self._changes = asyncio.Event()
        self._members = [PoolMember(host, self) for host in hosts]
        self._error: BaseException | None = None
        self._tasks = [asyncio.create_task(self._run(member)) for member in self._members]

    weights: PublishedWeights | None

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)
        self.changed()

    async def cancel(self, request_ids: set[str]) -> None:
        """Drop requests."""
        self._waiting = deque(r for r in self._waiting if r.id not in request_ids)
        for request_id in request_ids:
            self._failed_at.pop(request_id, None)
        await asyncio.gather(*(member.cancel(request_ids) for member in self._members))
        self.changed()

    async def sync(self, weights: PublishedWeights) -> None:
        """Return when every engine holds `weights`, but those that are starting again."""
        self.weights = weights
        for member in self._members:
            member.publish()
        while True:
            if self._error is not None:
                raise self._error
            serving = any(member.serves(weights) for member in self._members)
            if serving and all(member.is_settled(weights) for member in self._members):
                return
            self._changes.clear()
            await self._changes.wait()

    async def sleep(self) -> None:
        """Let every engine that serves give up its GPU memory."""
        await asyncio.gather(*(member.sleep() for member in self._members))

    async def metrics(self) -> dict[str, float]:
        """Events since the last call."""
        counts, self._counts = self._counts, Counter()
        serving = sum(member.holds(self.weights) for member in self._members)
        values = {"engines_serving": serving, "engine_restarts": counts.pop("restarts", 0)}
        named = {f"engine_{event}": number for event, number in sorted(counts.items())}
        return {name: float(value) for name, value in (values | named).items()}

    async def close(self) -> None:
        """Stop everything."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
        closing = asyncio.gather(*(m.close() for m in self._members), return_exceptions=True)
        await asyncio.wait({closing}, timeout=CLOSE_SECONDS)

    # As `Pool`.

    def finish(self, completion: Completion) -> None:
        self._failed_at.pop(completion.id, None)
        # What arrives together is handed over together, because each time wakes a thread.
        if not self._fresh:
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._fresh.append(completion)

    def _hand_over(self) -> None:
        fresh, self._fresh = self._fresh, []
        self._finished.put(fresh)

    def retry(self, request: Request, member: PoolMember, error: EngineError) -> None:
        self.count(f"retries_{error.reason}")
        failed_at = self._failed_at.setdefault(request.id, [])
        if error.reason != "gone":  # the request has no part in that; restarts are bounded
            failed_at.append(member)
        if len(failed_at) >= self.limits.max_attempts:
            self._fail(
                RankError(
                    f"{len(failed_at)} attempts to generate request {request.id} failed, the last "
                    f"at {member.host.name}: {first_line(error)}"
                )
            )
        self._waiting.appendleft(request)

    def count(self, event: str) -> None:
        self._counts[event] += 1

    def changed(self) -> None:
        self._changes.set()
        if not self._waiting:
            return
        serving = [member for member in self._members if member.serves(self.weights)]
        room = sum(max(0, self.limits.max_queued - len(member.running)) for member in serving)
        for _ in range(min(room, len(self._waiting))):
            request = self._waiting.popleft()
            failed_at = self._failed_at.get(request.id, [])
            others = [member for member in serving if member not in failed_at] or serving
            member = min(others, key=lambda member: len(member.running))
            if len(member.running) >= self.limits.max_queued:
                self._waiting.append(request)  # those that have not failed yet come first
                continue
            assert self.weights is not None
            member.start(request, self.weights.policy_version)

    async def _run(self, member: PoolMember) -> None:
        try:
            await member.run()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._fail(error)
        if all(each.state == "dead" for each in self._members):
            self._fail(
                RankError(
                    "every rollout engine has failed, more often than it is started again; the "
                    "messages above say why"
                )
            )

    def _fail(self, error: BaseException) -> None:
        """End the run at the next `step` or `update_weights`."""
        self._error = self._error or error
        self._finished.put(self._error)
        self._changes.set()
