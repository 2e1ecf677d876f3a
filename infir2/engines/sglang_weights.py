"""How SGLang gets new weights: from a directory, or by broadcast from the trainer's GPU.

No route that unpickles what it receives is used (`/update_weights_from_tensor`,
`/update_weights_from_ipc`). Requests are aborted, and new ones wait, until the cache is empty and
the weights are complete: a request between two buckets would mix versions, and SGLang ends itself
if it cannot flush its cache.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import torch

from infir2.engines.broadcast_group import BroadcastGroup, local_address
from infir2.engines.http_client import HttpClient
from infir2.engines.remote import BadAnswerError, EngineError, PublishedWeights, reading_answer
from infir2.engines.weight_buckets import Bucket

Value = TypeVar("Value")
MEMORY_PARTS = ["weights", "kv_cache"]
IDLE_SECONDS = 30  # for aborted requests to leave the scheduler
CONTINUE_SECONDS, LEAVE_SECONDS = 5.0, 5.0


class SglangWeights:
    """Sends weights to one server."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http
        self._group: BroadcastGroup | None = None
        self._freed: list[str] = []  # parts of the server's memory that are given up

    async def update(self, weights: PublishedWeights) -> None:
        """As `EngineClient.update_weights`; a server that sleeps wakes up.

        The KV cache gets its memory after the weights are complete, so that both versions and the
        cache need not fit together.
        """
        async with self._paused():
            await self._wake("weights")
            flush = {"flush_cache": not self._freed}  # a cache that sleeps is flushed when awake
            if weights.buckets is None:
                await self._load_directory(weights, flush)
            else:
                await self._broadcast(weights, flush)
            await self._wake("kv_cache")
            await self._http.post("/flush_cache", {})

    async def sleep(self) -> None:
        """As `SleepingClient`. Requests wait until the server is awake: one would end it."""
        if self._freed or not await self._pause():
            return
        await self._http.post("/release_memory_occupation", {"tags": MEMORY_PARTS})
        self._freed = list(MEMORY_PARTS)

    async def succeed(self, route: str, body: dict[str, Any]) -> Any:
        """POST to a route that answers {"success": ..., "message": ...}. Raises EngineError."""
        answer = await self._http.post(route, body)
        with reading_answer(self._http.url):
            if answer["success"]:
                return answer
            message = str(answer["message"])
        raise EngineError("refused", f"{self._http.url}{route}: {message[:300]}")

    async def close(self) -> None:
        """Leave the group."""
        group, self._group = self._group, None
        if group is None:
            return
        group.abort()
        with contextlib.suppress(EngineError, TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._http.post("/destroy_weights_update_group", {"group_name": group.name})

    async def _load_directory(self, weights: PublishedWeights, flush: dict[str, bool]) -> None:
        body = {
            "model_path": str(weights.directory),
            "weight_version": str(weights.policy_version),
            "abort_all_requests": True,
        }
        await self.succeed("/update_weights_from_disk", body | flush)

    async def _broadcast(self, weights: PublishedWeights, flush: dict[str, bool]) -> None:
        assert weights.buckets is not None
        buckets, seconds = weights.buckets.buckets, 0.0
        try:
            group = self._group or await self._join(buckets[0].data.device)
            in_session = await self._post_if_offered("/begin_weight_update", {})
            for bucket in buckets[:-1]:
                seconds += await self._send(bucket, group, {"flush_cache": False})
            last = flush | {"weight_version": str(weights.policy_version)}
            weights.took("transfer", seconds + await self._send(buckets[-1], group, last))
            if in_session:
                await self.succeed("/end_weight_update", {})
        except BaseException:
            self._abandon_group()
            raise

    def _abandon_group(self) -> None:
        """Whoever is left in a broken group waits for ever."""
        if self._group is not None:
            self._group.abort()
        self._group = None

    async def _join(self, device: torch.device) -> BroadcastGroup:
        """A new group of this process and the server's ranks."""
        answer = await self._http.get("/server_info")
        with reading_answer(self._http.url):
            size = 1 + int(answer["tp_size"])
        self._group = group = BroadcastGroup(local_address(self._http.url), size, device)
        body = {
            "master_address": group.address[0],
            "master_port": group.address[1],
            "rank_offset": 1,
            "world_size": size,
            "group_name": group.name,
            "backend": group.backend,
        }
        await both(self.succeed("/init_weights_update_group", body), group.connect())
        return group

    async def _send(self, bucket: Bucket, group: BroadcastGroup, more: dict[str, Any]) -> float:
        """Returns the seconds until the bucket has arrived, before the server loads it."""
        body = {
            "names": bucket.names,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
            "shapes": bucket.shapes,
            "group_name": group.name,
            "load_format": "flattened_bucket",
        }
        loaded = self.succeed("/update_weights_from_distributed", body | more)
        return await both(loaded, group.broadcast(bucket.data))

    async def _wake(self, part: str) -> None:
        if part in self._freed:  # SGLang ends itself when it gets back what it never gave up
            await self._http.post("/resume_memory_occupation", {"tags": [part]})
            self._freed.remove(part)

    async def _pause(self) -> bool:
        """Abort all requests and let new ones wait; False if the release cannot."""
        if not await self._post_if_offered("/pause_generation", {"mode": "abort"}):
            return False
        if not self._freed:
            await self._http.post(f"/flush_cache?timeout={IDLE_SECONDS}", {})
        return True

    @contextlib.asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """No request runs inside the block."""
        try:
            if not await self._pause():
                yield
                return
            yield
        except BaseException:
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(CONTINUE_SECONDS):
                    await self._http.post("/continue_generation", {})
            raise
        await self._http.post("/continue_generation", {})

    async def _post_if_offered(self, route: str, body: dict[str, Any]) -> bool:
        """POST; whether the server has the route, which depends on its release."""
        try:
            await self._http.post(route, body)
        except BadAnswerError as error:
            if error.status != 404:
                raise
            return False
        return True


async def both(first: Coroutine[Any, Any, Any], second: Coroutine[Any, Any, Value]) -> Value:
    """Do both, and return the result of the second one.

    When one fails, the other is canceled, for it would wait for ever.
    """
    tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
    try:
        return (await asyncio.gather(*tasks))[1]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
