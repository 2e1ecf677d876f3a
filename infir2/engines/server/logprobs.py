"""Log-probabilities, at the sampling temperature, in the two forms of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from infir2.data import ChatTokenizer
from infir2.engines.types import Tokens

_LOWEST = -9999.0  # OpenAI's number for a token that is impossible


class TokenNames:
    """What a token is called: its text, or `token_id:N` where texts would be ambiguous."""

    def __init__(self, tokenizer: ChatTokenizer, as_ids: bool) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def utf8(self, token_id: int) -> list[int] | None:
        """The bytes of a token; None for a part of a character."""
        text = self._tokenizer.token_text(token_id)
        return None if "\ufffd" in text else list(text.encode())


def chat_logprobs(names: TokenNames, tokens: Tokens) -> dict[str, Any]:
    """{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}, one entry per token."""
    tops = tokens.top_logprobs or [[] for _ in tokens.token_ids]
    return {
        "content": [
            _entry(names, token_id, logprob)
            | {"top_logprobs": [_entry(names, *candidate) for candidate in top]}
            for token_id, logprob, top in zip(tokens.token_ids, tokens.logprobs, tops, strict=True)
        ]
    }


def _entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": names.name(token_id),
        "logprob": max(logprob, _LOWEST),
        "bytes": names.utf8(token_id),
    }


def completion_logprobs(
    names: TokenNames, tokens: Tokens, offsets: Sequence[int]
) -> dict[str, Any]:
    """{"tokens", "token_logprobs", "top_logprobs", "text_offset"}, lists with a value per token."""
    return {
        "tokens": [names.name(token_id) for token_id in tokens.token_ids],
        "token_logprobs": [max(logprob, _LOWEST) for logprob in tokens.logprobs],
        "top_logprobs": [
            {names.name(token_id): max(logprob, _LOWEST) for token_id, logprob in top}
            for top in tokens.top_logprobs
        ]
        or None,
        "text_offset": list(offsets),
    }
