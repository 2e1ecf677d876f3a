"""A chat template, rendered in a process with limits.

Rows are rendered twice: with placeholders for their texts, where equal structures give equal text
and are rendered once (`structure`), and as they are (`text`), to prove that the first is right.
"""

import atexit
import functools
import json
import os
import threading
from collections.abc import Sequence
from typing import Any

from infir2.data.messages import with_reasoning
from infir2.data.types import Message, RowError
from infir2.errors import ConfigError
from infir2.verify.pool import Pool

ROW_SECONDS, START_SECONDS = 30.0, 300.0
MEMORY_BYTES = 1 << 28
_PROBE: list[Message] = [
    {"role": "user", "content": "probe-question"},
    {"role": "assistant", "content": "probe-answer", "reasoning_content": "probe-thought"},
]

_lock = threading.Lock()
_pools: dict[int, Pool] = {}  # by process id: a forked child cannot use its parent's worker


class ChatTemplate:
    """A chat template, the text of its special tokens, and the date that it may write.

    Attributes:
        name: the template in messages, such as "the chat template in models/Qwen3-8B".
        date: what `strftime_now` formats, YYYY-MM-DD.
    """

    def __init__(self, name: str, source: str, variables: dict[str, Any], date: str) -> None:
        self.name, self.source, self.date = name, source, date
        self._variables = variables
        self.structure = functools.lru_cache(4096)(self._structure)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Render messages.

        Raises:
            RowError: the template rejects them, fails, or exceeds its memory.
            ConfigError: the template does not finish, or ends its process.
        """
        return self._render(self._as_parts(list(messages)), add_generation_prompt)

    def with_thoughts(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Messages whose thoughts stand where the template reads them: in a field or the text."""
        if not self._reads_thoughts:
            return [_thought_in_text(message) for message in messages]
        if self._doubles_thoughts:
            return [_thought_in_field(message) for message in messages]
        return messages

    def _structure(self, messages: str, add_generation_prompt: bool) -> str:
        """Render masked messages, given as JSON. Errors as `text`."""
        return self._render(self._as_parts(json.loads(messages)), add_generation_prompt)

    @functools.cached_property
    def _reads_thoughts(self) -> bool:
        """Whether the template writes a thought that is in a field of its own."""
        return self._shows("probe-thought", self._as_parts(_PROBE))

    @functools.cached_property
    def _doubles_thoughts(self) -> bool:
        """Whether the template writes an empty thought before one that is in the text."""
        try:
            messages = self._as_parts([_PROBE[0], _thought_in_text(_PROBE[1])])
            return self._render(messages, False).count("<think>") > 1
        except RowError:
            return False

    @functools.cached_property
    def _needs_parts(self) -> bool:
        """Whether the template reads contents only as a list of parts, for text and images."""
        return not self._shows("probe-question", _PROBE) and self._shows(
            "probe-question", _in_parts(_PROBE)
        )

    def _as_parts(self, messages: list[Any]) -> list[Any]:
        return _in_parts(messages) if self._needs_parts else messages

    def _shows(self, words: str, messages: list[Any]) -> bool:
        try:
            return words in self._render(messages, False)
        except RowError:
            return False

    def _render(self, messages: list[Any], add_generation_prompt: bool) -> str:
        arguments = (self.source, self._variables, self.date, messages, add_generation_prompt)
        (outcome,) = _pool().run([arguments], ROW_SECONDS, START_SECONDS)
        if outcome.reason in ("timeout", "killed"):
            # No unusable row: another rank's process might just finish, and ranks must agree.
            detail = f"did not finish within {ROW_SECONDS:.0f} s"
            detail = detail if outcome.reason == "timeout" else "ended the process that renders it"
            raise ConfigError(f"data.tokenizer: {self.name} {detail}: use another.")
        if outcome.reason == "error" and outcome.detail.startswith("TemplateError: "):
            reason = outcome.detail.removeprefix("TemplateError: ")
            raise RowError("template_refused", f"the chat template rejects the row: {reason}")
        if outcome.reason:
            detail = "needs too much memory" if outcome.reason == "oom" else outcome.detail
            raise RowError("template_failed", f"the chat template fails: {detail}")
        return str(outcome.value)


def _thought_in_text(message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    content = with_reasoning(message["reasoning_content"], message["content"])
    return {"role": message["role"], "content": content}


def _thought_in_field(message: Message) -> Message:
    thought, end, answer = message["content"].partition("</think>")
    if message["role"] != "assistant" or not end or "reasoning_content" in message:
        return message
    thought = thought.strip().removeprefix("<think>").strip("\n")
    return {"role": "assistant", "content": answer.lstrip("\n"), "reasoning_content": thought}


def _in_parts(messages: list[Any]) -> list[Any]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def _pool() -> Pool:
    """This process's worker, which starts with the first template."""
    with _lock:
        if os.getpid() not in _pools:
            _pools[os.getpid()] = Pool("infir2.templates.environment:render", 1, MEMORY_BYTES)
        return _pools[os.getpid()]


@atexit.register
def _close_pool() -> None:
    with _lock:
        pool = _pools.pop(os.getpid(), None)
    if pool is not None:
        pool.close()
