"""Render a conversation with a chat template, keeping track of which text is the template's.

Each message's text is replaced by a placeholder of private-use characters before rendering, so that
the template's own text and the positions of the messages are known afterwards. Conversations of
equal structure render to equal text, which is kept. A template that reads the texts (`/no_think`)
does not; then only control tokens in the texts are replaced.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from infir2.data.types import Message, RowError

THINK_MARKERS = ("<think>", "</think>")
PLACEHOLDER = re.compile("\U000f0000([0-9]{1,9})\U000f0001")
MAX_COMPARED_CHARACTERS = 1 << 17  # longer conversations are not rendered with their texts
_THINK_MARKER = re.compile("(" + "|".join(THINK_MARKERS) + ")")
_OPENED_THOUGHT = re.compile(r"<think>\s*$")
_THOUGHT_OF_PROMPT = re.compile(r"<think>\s*(?:</think>\s*)?$")


class Template(Protocol):
    """Renders messages to text; both methods raise RowError if the template rejects them."""

    def text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str: ...

    def structure(self, messages: str, add_generation_prompt: bool) -> str:
        """Render messages, given as JSON so that equal ones need to be rendered only once."""
        ...


@dataclass(frozen=True)
class Turn:
    """An assistant's turn: a span of the rendered text that ends after the end of turn.

    Attributes:
        start: offset after the generation prompt.
        answer_end: offset after the last text of the message; the end token follows.
        stop: offset up to which the text is the same whether or not the conversation continues.
    """

    start: int
    answer_end: int
    stop: int


@dataclass(frozen=True)
class Rendering:
    """A conversation rendered with placeholders.

    Prompt and answer are tokenized separately at each offset in `answer_starts`, so that the tokens
    of the prompt equal those that an engine receives.
    """

    text: str
    contents: list[str]  # contents[i] is the text that placeholder i stands for
    answer_starts: list[int] = field(default_factory=list)  # offsets in `text`
    turns: dict[int, Turn] = field(default_factory=dict)  # to train on, by index of the message

    @property
    def opened_thought(self) -> str:
        """The end of a generation prompt that opens a thought, such as "<think>\\n", or ""."""
        opened = _OPENED_THOUGHT.search(self.text)
        return opened[0] if opened else ""


def render(
    messages: Sequence[Message],
    add_generation_prompt: bool,
    template: Template,
    control: re.Pattern[str],
) -> Rendering:
    """Render a conversation.

    An assistant turn is trained if the template writes it as the engine would continue the
    generation prompt, and keeps it so when the conversation continues. A turn without a thought
    may lack the one that the prompt opens. A first message of the assistant answers nothing and is
    context. `control` matches the control tokens.

    Raises:
        RowError: the template drops, repeats or reorders a message, or changes its text. It may
            drop only the text of assistant messages, such as the reasoning of past turns.
    """
    masked = _Masked.of(messages, template)
    text = masked.apply(len(messages), add_generation_prompt)
    _check_kept(text, masked, messages)
    if sum(map(len, masked.contents)) <= MAX_COMPARED_CHARACTERS:
        expected = template.text(messages, add_generation_prompt)
        if _filled(text, masked.contents) != expected:
            masked = _Masked.of(messages, template, control)
            text = masked.apply(len(messages), add_generation_prompt)
            made_up = set(_placeholders(text)) - set(range(len(masked.contents)))
            if made_up or _filled(text, masked.contents) != expected:
                raise RowError("template_alters", "the chat template changes control tokens")
    rendering = Rendering(text, masked.contents)
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number:
            _add_turn(rendering, masked, number)
    last = len(messages) - 1
    if messages[-1]["role"] == "assistant" and last and last not in rendering.turns:
        return _with_thought(rendering, masked)
    return rendering


def _add_turn(rendering: Rendering, masked: "_Masked", number: int) -> None:
    """Record where the answer of message `number` starts, and its turn if it is trained."""
    text, prompt = rendering.text, masked.apply(number, True)
    if not text.startswith(prompt) or _has_no_thought(prompt, text[len(prompt) :]):
        prompt = _THOUGHT_OF_PROMPT.sub("", prompt)
        if not text.startswith(prompt):
            return
    start = len(prompt)
    rendering.answer_starts.append(start)
    until_turn = masked.apply(number + 1, False)
    stop = _common_length(until_turn, text)
    own = masked.placeholders_of(number)
    if _placeholders(text[start:stop]) == own:
        ends = [match.end() for match in PLACEHOLDER.finditer(text, start, stop)]
        rendering.turns[number] = Turn(start, ends[-1] if ends else start, stop)


def _has_no_thought(prompt: str, answer: str) -> bool:
    """Whether the thought that the prompt opens is closed at once."""
    return bool(_OPENED_THOUGHT.search(prompt)) and answer.lstrip().startswith("</think>")


def _with_thought(rendering: Rendering, masked: "_Masked") -> Rendering:
    """Put back the thought of the last turn, which the template opens in its generation prompt.

    DeepSeek-R1's template ends a prompt with "<think>" but writes an answer without its thought.
    An engine's response continues the prompt: thought, answer and end of turn are trained so.
    Any other rendering is returned unchanged, its last turn untrained.
    """
    number = len(masked.messages) - 1
    prompt = masked.apply(number, True)
    opened = _OPENED_THOUGHT.search(prompt)
    content = masked.messages[-1]["content"].lstrip().removeprefix("<think>")
    answer = PLACEHOLDER.findall(content.partition("</think>")[2])
    position = rendering.text.rfind(f"\U000f0000{answer[-1]}\U000f0001") if answer else -1
    if opened is None or position < 0 or "reasoning_content" in masked.messages[-1]:
        return rendering
    end = rendering.text[position:].partition("\U000f0001")[2]
    thought = content.lstrip() if opened[0] != "<think>" else content
    text = prompt + thought + end
    starts = [start for start in rendering.answer_starts if start < len(prompt)]
    turns = rendering.turns | {number: Turn(len(prompt), len(text) - len(end), len(text))}
    return Rendering(text, rendering.contents, [*starts, len(prompt)], turns)


@dataclass(frozen=True)
class _Masked:
    """Messages with placeholders for their texts: for all of each text, or for what `only` matches.

    White space at the ends of a text stays outside of its placeholder, so that a template can trim
    it. Think markers in assistant messages stay too, and split the text.
    """

    template: Template
    only: re.Pattern[str] | None = None
    messages: list[Message] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)  # the text of each placeholder
    owners: list[int] = field(default_factory=list)  # index of its message

    @classmethod
    def of(
        cls, messages: Sequence[Message], template: Template, only: re.Pattern[str] | None = None
    ) -> "_Masked":
        masked = cls(template, only)
        for number, message in enumerate(messages):
            shown = {"role": message["role"]}
            for key in ("reasoning_content", "content"):
                if key in message:
                    shown[key] = masked._mask(message[key], number, message["role"] == "assistant")
            masked.messages.append(shown)
        return masked

    def apply(self, count: int, add_generation_prompt: bool) -> str:
        """Render the first `count` messages."""
        messages = self.messages[:count]
        if self.only is not None:
            return self.template.text(messages, add_generation_prompt)
        return self.template.structure(json.dumps(messages), add_generation_prompt)

    def placeholders_of(self, number: int) -> list[int]:
        return [index for index, owner in enumerate(self.owners) if owner == number]

    def _mask(self, text: str, number: int, keep_thoughts: bool) -> str:
        if self.only is not None:
            return self._mask_only(self.only, text, number, keep_thoughts)
        shown = ""
        for part in _THINK_MARKER.split(text) if keep_thoughts else [text]:
            core = part.strip()
            if not core or (keep_thoughts and core in THINK_MARKERS):
                shown += part
                continue
            before, after = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :]
            shown += before + self._placeholder(core, number) + after
        return shown

    def _mask_only(self, only: re.Pattern[str], text: str, number: int, keep_thoughts: bool) -> str:
        if PLACEHOLDER.search(text):
            raise RowError("template_alters", "a text contains this program's placeholders")
        return only.sub(
            lambda match: (
                match[0]
                if keep_thoughts and match[0] in THINK_MARKERS
                else self._placeholder(match[0], number)
            ),
            text,
        )

    def _placeholder(self, text: str, number: int) -> str:
        self.contents.append(text)
        self.owners.append(number)
        return f"\U000f0000{len(self.contents) - 1}\U000f0001"


def _check_kept(text: str, masked: _Masked, messages: Sequence[Message]) -> None:
    """Raise RowError for a text that is missing, repeated, or in another order."""
    kept, possible = _placeholders(text), range(len(masked.owners))
    required = {
        index for index, owner in enumerate(masked.owners) if messages[owner]["role"] != "assistant"
    }
    if not required <= set(kept) <= set(possible) or kept != sorted(set(kept)):
        raise RowError("template_alters", "the chat template drops, repeats or reorders a message")


def _common_length(first: str, second: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _filled(text: str, contents: Sequence[str]) -> str:
    """Return the text with its contents; placeholders that a template made up stay."""
    return PLACEHOLDER.sub(
        lambda match: contents[int(match[1])] if int(match[1]) < len(contents) else match[0], text
    )


def _placeholders(text: str) -> list[int]:
    """Return the numbers of the placeholders in `text`, in order."""
    return [int(match[1]) for match in PLACEHOLDER.finditer(text)]
