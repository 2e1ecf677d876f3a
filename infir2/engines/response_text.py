"""The text of a response, token by token, up to the first stop text.

A token may end inside a character, and a stop text inside a token. So text is held back while it
may still change: the bytes of an incomplete character, and what may be the beginning of a stop
text. The pieces that `add` and `finish` return, joined, are the text that a client sees.

A token is decoded together with some tokens before it, because a decoder may treat the first token
of a text differently; the whole response is never decoded again.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_CONTEXT_TOKENS = 8
_MAX_HELD_TOKENS = 16  # a character has at most 4 bytes
_REPLACEMENT = "\ufffd"  # stands for bytes that are no character, or not yet


class ResponseText:
    """Example: with stop text "END", the tokens of "a E" and "NDb" give "a " and stop there.

    Args:
        decode: text of token ids; of an incomplete character, U+FFFD.
        stop_texts: none is empty.

    Attributes:
        stopped: a stop text was found; later tokens are not read.
    """

    def __init__(self, decode: Decode, stop_texts: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode, self._stop_texts = decode, stop_texts
        self._window: list[int] = []
        self._num_held = 0  # tokens since the last one that ended a character
        self._num_decoded = 0  # characters of the window's text that `_release` knows
        self._held = ""  # may begin a stop text

    def add(self, token_id: int) -> str:
        """The text that has become certain."""
        if self.stopped:
            return ""
        self._window.append(token_id)
        text = certain = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            self._num_held += 1
            is_long = self._num_held > _MAX_HELD_TOKENS
            certain = text[:-1] if is_long else text.rstrip(_REPLACEMENT)
        else:
            self._num_held = 0
        new = certain[self._num_decoded :]
        self._num_decoded = max(self._num_decoded, len(certain))
        if not self._num_held:
            self._shorten_window()
        return self._release(new)

    def extend(self, token_ids: Sequence[int]) -> str:
        """As `add` for each token, decoded together where that gives the same."""
        if self.stopped or len(token_ids) < 2:
            return "".join(map(self.add, token_ids))
        text = self._decode([*self._window, *token_ids])
        new = text[self._num_decoded :]
        has_stop = any(stop in self._held + new for stop in self._stop_texts)
        if has_stop or text.endswith(_REPLACEMENT):
            return "".join(map(self.add, token_ids))
        self._window.extend(token_ids)
        self._num_held = 0
        self._num_decoded = max(self._num_decoded, len(text))
        self._shorten_window()
        return self._release(new)

    def finish(self) -> str:
        """The rest of a response that has ended."""
        if self.stopped:
            return ""
        last = self._release(self._decode(self._window)[self._num_decoded :])
        held, self._held = self._held, ""
        return last + held

    def _shorten_window(self) -> None:
        """Keep the last tokens, from one on that begins a character."""
        if len(self._window) <= 2 * _CONTEXT_TOKENS:
            return
        for count in range(_CONTEXT_TOKENS, 2 * _CONTEXT_TOKENS):
            text = self._decode(self._window[-count:])
            if not text.startswith(_REPLACEMENT):
                self._window, self._num_decoded = self._window[-count:], len(text)
                return

    def _release(self, new: str) -> str:
        text = self._held + new
        starts = [text.find(stop) for stop in self._stop_texts if stop in text]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        num_held = max((overlap(text, stop) for stop in self._stop_texts), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def whole_text(decode: Decode, token_ids: Sequence[int], stop_texts: Sequence[str] = ()) -> str:
    """The text of a response that has ended with the first stop text, if it has one."""
    text = decode(token_ids)
    return text[: min((text.find(stop) for stop in stop_texts if stop in text), default=None)]


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
