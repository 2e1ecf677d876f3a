"""Responses of SGLang and vLLM while they are generated, by their routes for token ids.

A request that neither streams nor has stop texts is answered in one part, which costs both sides
least. Closing a stream, or cancelling who waits for it, ends the request at the server at once:
SGLang by itself would go on for two seconds.
"""

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from infir2.engines.remote import BadAnswerError, EngineClient, EngineError, reading_answer
from infir2.engines.sglang import SglangClient
from infir2.engines.sglang import sampling_params as sglang_params
from infir2.engines.sglang_batches import NEVER
from infir2.engines.types import MAX_TOP_LOGPROBS, Request, Tokens
from infir2.engines.vllm import MAX_TEMPERATURE, VllmClient
from infir2.engines.vllm import sampling_params as vllm_params
from infir2.engines.vllm_proof import GENERATE

STOP_TEXT_INTERVAL = 8  # tokens: a response with stop texts goes on for so many at most
SGLANG_OPTIONS = ("--incremental-streaming-output",)  # or each event repeats all before it
VLLM_OPTIONS = ("--max-logprobs", str(MAX_TOP_LOGPROBS + 1))


class StreamingClient(EngineClient, Protocol):
    """A client of one server whose responses can be read while they are generated.

    Attributes:
        max_temperature: above which the server refuses requests.
    """

    max_temperature: float

    def stream(self, request: Request) -> AsyncGenerator[Tokens, None]:
        """The parts of a response, until it is complete. Raises EngineError."""
        ...


class SglangStreams(SglangClient):
    """A `StreamingClient` of an SGLang that was started with SGLANG_OPTIONS.

    The seed of a request counts with `--enable-deterministic-inference` only.
    """

    incremental, max_temperature = True, float("inf")

    async def stream(self, request: Request) -> AsyncGenerator[Tokens, None]:
        """As `StreamingClient`."""
        rid, interval = f"{request.id}#{secrets.token_hex(4)}", _interval(request)
        sampling = {"stream_interval": interval, "sampling_seed": request.key >> 1}
        body = {
            "rid": rid,
            "input_ids": list(request.token_ids),
            "sampling_params": sglang_params(request) | sampling,
            "return_logprob": True,
            "top_logprobs_num": request.params.top_logprobs,
            "stream": True,
        }
        finished = False
        try:
            async with aclosing(self._http.events("/generate", body)) as events:
                async for event in events:
                    tokens, finished = self._part(event)
                    yield tokens
        finally:
            if not finished:
                await self._http.post("/abort_request", {"rid": rid})

    def _part(self, event: Any) -> tuple[Tokens, bool]:
        """The new tokens of an event, and whether they are the last."""
        if not isinstance(event, dict) or "error" in event:
            raise BadAnswerError("status", f"{self.url}: {str(event)[:300]}", 400)
        with reading_answer(self.url):
            meta, token_ids = event["meta_info"], [int(token) for token in event["output_ids"]]
            logprobs = [float(entry[0]) for entry in meta["output_token_logprobs"]]
            tops = [
                [(int(each[1]), float(each[0])) for each in top]
                for top in meta.get("output_top_logprobs") or ()
            ]
            reason = meta["finish_reason"]
        if isinstance(reason, dict) and reason.get("type") == "abort":
            raise BadAnswerError("aborted", f"{self.url} aborted a request: {reason}")
        return Tokens(token_ids, logprobs, tops), reason is not None


class VllmStreams(VllmClient):
    """A `StreamingClient` of a vLLM that was started with VLLM_OPTIONS."""

    max_temperature = MAX_TEMPERATURE

    async def stream(self, request: Request) -> AsyncGenerator[Tokens, None]:
        """As `StreamingClient`."""
        num_top, finished = request.params.top_logprobs, False
        # It counts the sampled token, which comes first, among the most likely ones.
        sampling = vllm_params(request) | {"logprobs": num_top + 1 if num_top else 0}
        try:
            if _interval(request) == NEVER:
                choice = await self._generate(request.id, request.token_ids, sampling)
                yield self._tokens(choice, num_top)
                finished = True
                return
            body = {
                "request_id": request.id,
                "token_ids": list(request.token_ids),
                "sampling_params": sampling | {"detokenize": False},
                "stream": True,
            }
            async with aclosing(self._http.events(GENERATE, body)) as events:
                async for event in events:
                    if not isinstance(event, dict) or "error" in event:
                        raise EngineError("status", f"{self.url}: {str(event)[:300]}")
                    with reading_answer(self.url):
                        choice = event["choices"][0]
                        finished = choice["finish_reason"] is not None
                    yield self._tokens(choice, num_top)
        finally:
            if not finished:
                await self.cancel([request.id])

    def _tokens(self, choice: dict[str, Any], num_top: int) -> Tokens:
        with reading_answer(self.url):
            if choice["finish_reason"] == "abort":
                raise EngineError("canceled", f"{self.url}: the request was ended there")
            token_ids = [int(token) for token in choice["token_ids"]]
            content = choice["logprobs"]["content"] if token_ids else []
            tops = []
            for entry in content if num_top else ():
                top = [(each["token_id"], each["logprob"]) for each in entry["top_logprobs"]]
                tops.append(sorted(top, key=lambda pair: -pair[1])[:num_top])
            return Tokens(token_ids, [float(entry["logprob"]) for entry in content], tops)


def _interval(request: Request) -> int:
    """Tokens between two parts of a response."""
    if request.streams:
        return 1
    return STOP_TEXT_INTERVAL if request.params.stop_texts else NEVER
