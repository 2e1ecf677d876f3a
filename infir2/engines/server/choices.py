"""A response on its way to a client: what each event of the engine adds to its choice."""

import math
from dataclasses import dataclass
from typing import Any

from infir2.engines.response_text import ResponseText, whole_text
from infir2.engines.server.errors import ApiError
from infir2.engines.server.logprobs import TokenNames, chat_logprobs, completion_logprobs
from infir2.engines.server.prompts import Prompt
from infir2.engines.server.schema import ChatBody, CompletionBody
from infir2.engines.server.served import Served
from infir2.engines.server.thoughts import Thoughts
from infir2.engines.types import Completion, Request, Tokens


@dataclass(frozen=True)
class Piece:
    """What an event adds: text apart from the thought, tokens, and why the response ended."""

    thought: str
    text: str
    tokens: Tokens
    offsets: list[int]  # of each token in the text
    finish: str | None


class Choice:
    """The choice `index` of an answer; `num_tokens` of its response are known."""

    def __init__(
        self, served: Served, body: ChatBody | CompletionBody, prompt: Prompt, request: Request
    ) -> None:
        self.prompt, self.num_tokens = prompt, 0
        self._decode, self._params = served.tokenizer.decode, request.params
        self._text = ResponseText(self._decode, request.params.stop_texts)
        self._num_characters = 0
        self._needs_offsets = isinstance(body, CompletionBody) and body.wants_logprobs
        self._thoughts = Thoughts(prompt.before) if isinstance(body, ChatBody) else None

    def add(self, event: Completion | Tokens) -> Piece:
        """Raises ApiError 500 for log-probabilities that are none."""
        ended, tokens = isinstance(event, Completion), self._new_tokens(event)
        if not all(map(math.isfinite, tokens.logprobs)):
            raise ApiError(500, "a log-probability is not finite: the weights are unusable")
        offsets = list[int]()
        if ended and not self.num_tokens and not self._needs_offsets:
            visible = self._visible(tokens.token_ids)
            text = whole_text(self._decode, visible, self._params.stop_texts)
        else:
            text = self._grow(tokens.token_ids, offsets)
            text += self._text.finish() if ended else ""
        self.num_tokens += len(tokens.token_ids)
        thought = ""
        if self._thoughts is not None:
            thought, text = self._thoughts.add(text)
            if ended:
                rest = self._thoughts.finish()
                thought, text = thought + rest[0], text + rest[1]
        finish = event.finish if isinstance(event, Completion) else None
        return Piece(thought, text, tokens, offsets, finish)

    def _new_tokens(self, event: Completion | Tokens) -> Tokens:
        return event if isinstance(event, Tokens) else event.tokens.part(self.num_tokens)

    def _visible(self, token_ids: list[int]) -> list[int]:
        """Without the stop token."""
        has_end = token_ids and token_ids[-1] in self._params.stop_ids
        return token_ids[:-1] if has_end else token_ids

    def _grow(self, token_ids: list[int], offsets: list[int]) -> str:
        """The text that has become certain; adds each token's offset if they are asked for."""
        visible = self._visible(token_ids)
        if not self._needs_offsets:
            return self._text.extend(visible)
        text = ""
        for token_id in visible:
            offsets.append(self._num_characters + len(text))
            text += self._text.add(token_id)
        self._num_characters += len(text)
        offsets += [self._num_characters] * (len(token_ids) - len(visible))
        return text


class ChatForm:
    """The form of /v1/chat/completions."""

    id_prefix, param = "chatcmpl", "messages"
    whole, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, served: Served, body: ChatBody) -> None:
        self._wants_logprobs = body.wants_logprobs
        self._names = TokenNames(served.tokenizer, bool(body.return_tokens_as_token_ids))

    def choice(self, piece: Piece) -> dict[str, Any]:
        thought = {"reasoning_content": piece.thought} if piece.thought else {}
        message = {"role": "assistant", "content": piece.text, **thought}
        return {"message": message, "logprobs": self._logprobs(piece)}

    def delta(self, piece: Piece, is_first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""} if is_first else {}
        if piece.thought:
            delta["reasoning_content"] = piece.thought
        if piece.text:
            delta["content"] = piece.text
        return {"delta": delta, "logprobs": self._logprobs(piece)}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        return chat_logprobs(self._names, piece.tokens) if self._wants_logprobs else None


class CompletionForm:
    """The form of /v1/completions."""

    id_prefix, param = "cmpl", "prompt"
    whole = chunk = "text_completion"

    def __init__(self, served: Served, body: CompletionBody) -> None:
        self._wants_logprobs = body.wants_logprobs
        self._names = TokenNames(served.tokenizer, bool(body.return_tokens_as_token_ids))

    def choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._wants_logprobs:
            logprobs = completion_logprobs(self._names, piece.tokens, piece.offsets)
        return {"text": piece.text, "logprobs": logprobs}

    def delta(self, piece: Piece, is_first: bool) -> dict[str, Any]:
        return self.choice(piece)
