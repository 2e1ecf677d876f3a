"""Answers of OpenAI's API, in one piece or as a stream of server-sent events."""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import time
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse

from infir2.engines.sampling import sampling_key
from infir2.engines.server.checks import check_tokens
from infir2.engines.server.choices import ChatForm, Choice, CompletionForm, Piece
from infir2.engines.server.connection import while_connected
from infir2.engines.server.driver import CanceledError
from infir2.engines.server.errors import (
    ApiError,
    as_api_error,
    error_content,
    json_bytes,
    json_response,
)
from infir2.engines.server.prompts import Prompt
from infir2.engines.server.schema import ChatBody, CompletionBody
from infir2.engines.server.served import Served
from infir2.engines.types import (
    Completion,
    Request,
    RequestFailedError,
    SamplingParams,
    Tokens,
)

Events = AsyncIterator[tuple[int, Completion | Tokens]]
_GREEDY_BELOW = 1e-5  # where FP32 cannot divide by the temperature


@dataclass
class Answer:
    """The answer to one HTTP request: `n` choices for each prompt.

    Attributes:
        served, body, prompts: what is asked of whom.
        form: how the route writes it.
    """

    served: Served
    body: ChatBody | CompletionBody
    prompts: Sequence[Prompt]
    form: ChatForm | CompletionForm
    id: str = ""
    created: int = field(default_factory=lambda: int(time()))

    def __post_init__(self) -> None:
        self.id = f"{self.form.id_prefix}-{secrets.token_hex(12)}"
        self._n = self.body.n or 1
        self._owners = [prompt for prompt in self.prompts for _ in range(self._n)]
        self._requests = [self._request(index) for index in range(len(self._owners))]
        self._choices = [
            Choice(self.served, self.body, prompt, request)
            for prompt, request in zip(self._owners, self._requests, strict=True)
        ]

    async def respond(self, http: HttpRequest) -> Response:
        """Generate and answer. Raises ApiError, and what the driver's `generate` raises."""
        events = self.served.driver.generate(self._requests)
        try:
            if self.body.stream:
                return await self._stream(http, events)
            return json_response(await while_connected(http, self._whole(events)))
        except ValueError as error:
            raise ApiError(400, str(error), param=self.form.param) from error

    def _request(self, index: int) -> Request:
        """Choice `index`: a seed, the prompt and the number of the sample fix every token."""
        body, token_ids = self.body, self._owners[index].token_ids
        room = max(1, self.served.context_tokens - len(token_ids))
        temperature = 1.0 if body.temperature is None else body.temperature
        params = SamplingParams(
            temperature if temperature >= _GREEDY_BELOW else 0.0,
            body.most_tokens or room,
            () if body.ignore_eos else self.served.tokenizer.eos_token_ids,
            body.top_p or 1.0,
            body.stop_texts,
            body.num_top if body.wants_logprobs else 0,
        )
        key = secrets.randbits(64)
        if body.seed is not None:
            key = sampling_key(body.seed, "", index % self._n, 0)
        request = Request(f"{self.id}/{index}", token_ids, params, key, bool(body.stream))
        check_tokens(self.served, request, self.form.param)
        return request

    async def _whole(self, events: Events) -> dict[str, Any]:
        choices: list[dict[str, Any]] = [{} for _ in self._choices]
        async with aclosing(events) as open_events:  # type: ignore[type-var]
            async for index, event in open_events:
                piece = self._choices[index].add(event)
                choices[index] = self._entry(index, piece, self.form.choice(piece))
        return self._envelope(self.form.whole, choices) | {"usage": self._usage()}

    async def _stream(self, http: HttpRequest, events: Events) -> Response:
        first = await while_connected(http, anext(events))  # an error still has its status
        return StreamingResponse(
            self._server_sent(first, events),
            media_type="text/event-stream; charset=utf-8",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _server_sent(
        self, first: tuple[int, Completion | Tokens], events: Events
    ) -> AsyncIterator[bytes]:
        usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        extra = {"usage": None} if usage else {}
        try:
            for chunk in self._chunks(*first):
                yield _event(chunk | extra)
            async with aclosing(events) as open_events:  # type: ignore[type-var]
                async for index, event in open_events:
                    for chunk in self._chunks(index, event):
                        yield _event(chunk | extra)
            if usage:
                yield _event(self._envelope(self.form.chunk, []) | {"usage": self._usage()})
        except (CanceledError, RequestFailedError, ApiError) as error:
            yield _event(error_content(as_api_error(error)))
        yield b"data: [DONE]\n\n"

    def _chunks(self, index: int, event: Completion | Tokens) -> list[dict[str, Any]]:
        """The chunks of an event: none while its text is held back, and one more at the end."""
        choice = self._choices[index]
        is_first = not choice.num_tokens
        piece = choice.add(event)
        entries = []
        shows_tokens = self.body.wants_logprobs or self.body.return_token_ids
        if piece.text or piece.thought or is_first or (shows_tokens and piece.tokens.token_ids):
            entry = self._entry(index, piece, self.form.delta(piece, is_first), is_first)
            entries.append(entry | {"finish_reason": None})
        if piece.finish:
            last = Piece("", "", Tokens([], []), [], piece.finish)
            shown = self.form.delta(last, False) | {"logprobs": None}
            entries.append({"index": index, **shown, "finish_reason": piece.finish})
        return [self._envelope(self.form.chunk, [entry]) for entry in entries]

    def _entry(
        self, index: int, piece: Piece, shown: dict[str, Any], is_first: bool = True
    ) -> dict[str, Any]:
        entry = {"index": index, **shown, "finish_reason": piece.finish}
        if self.body.return_token_ids:
            entry["token_ids"] = piece.tokens.token_ids
            if is_first:
                entry["prompt_token_ids"] = self._choices[index].prompt.token_ids
        return entry

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(each.token_ids) for each in self.prompts)
        response = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": response,
            "total_tokens": prompt + response,
        }


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(content) + b"\n\n"
