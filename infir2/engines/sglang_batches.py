"""Requests to SGLang's `/generate` in batches, whose answers arrive as each request ends.

A request of its own costs both sides a millisecond of work around HTTP, a third of the time in
which a GPU generates 256 short responses. So those that arrive together share one request, and the
server streams: two events for each, its first token, which is ignored, and its end.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from infir2.engines.http_client import HttpClient
from infir2.engines.remote import BadAnswerError, EngineError
from infir2.errors import UserError

MAX_BATCH = 32  # SGLang's work per event grows with the batch
WAIT_SECONDS = 0.002
NEVER = 2**30  # tokens between the events of a request


@dataclass(frozen=True)
class _Waiting:
    """A request whose answer is awaited."""

    id: str
    token_ids: list[int]
    params: dict[str, Any]
    answer: "asyncio.Future[dict[str, Any]]"


class SglangBatches:
    """Sends requests and sorts the answers."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http
        self._waiting: list[_Waiting] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def generate(
        self, server_id: str, token_ids: list[int], params: dict[str, Any]
    ) -> dict[str, Any]:
        """SGLang's answer to one request, with log-probabilities. Raises as `HttpClient.post`."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(server_id, token_ids, params, loop.create_future())
        if not self._waiting:
            loop.call_later(WAIT_SECONDS, self._send_waiting)
        self._waiting.append(waiting)
        return await waiting.answer

    async def close(self) -> None:
        """End what is in flight."""
        sending = list(self._sending)
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)

    def _send_waiting(self) -> None:
        waiting = [each for each in self._waiting if not each.answer.done()]
        self._waiting = []
        for start in range(0, len(waiting), MAX_BATCH):
            self._start(waiting[start : start + MAX_BATCH])

    def _start(self, batch: list[_Waiting]) -> None:
        task = asyncio.get_running_loop().create_task(self._send(batch))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, batch: list[_Waiting]) -> None:
        try:
            await self._receive(batch)
            error: Exception = BadAnswerError("cut", f"{self._http.url}: the stream ended too soon")
        except (EngineError, UserError) as failure:
            error = failure
        unanswered = [each for each in batch if not each.answer.done()]
        if len(batch) > 1 and isinstance(error, BadAnswerError) and error.reason == "status":
            for each in unanswered:  # one of them may be to blame: each for itself
                self._start([each])
            return
        for each in unanswered:
            each.answer.set_exception(error)

    async def _receive(self, batch: list[_Waiting]) -> None:
        by_id = {each.id: each for each in batch}
        body = {
            "rid": [each.id for each in batch],
            "input_ids": [each.token_ids for each in batch],
            "sampling_params": [each.params | {"stream_interval": NEVER} for each in batch],
            "return_logprob": True,
            "stream": True,
        }
        async for event in self._http.events("/generate", body):
            if not isinstance(event, dict) or "error" in event:
                raise BadAnswerError("status", f"{self._http.url}: {str(event)[:300]}", 400)
            meta = event.get("meta_info")
            if not isinstance(meta, dict) or meta.get("finish_reason") is None:
                continue
            waiting = by_id.pop(str(meta.get("id")), None)
            if waiting is not None and not waiting.answer.done():
                waiting.answer.set_result(event)
