"""Render a conversation with a chat template, keeping track of which text is the template's.

Each message's text is replaced by a placeholder of private-use characters before rendering, so that
the template's own text and the positions of the messages are known afterwards.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infir2.data.types import Message, RowError

THINK_MARKERS = ("<think>", "</think>")
PLACEHOLDER = re.compile("\U000f0000([0-9]+)\U000f0001")
_THINK_MARKER = re.compile("(" + "|".join(THINK_MARKERS) + ")")

# (messages, add_generation_prompt) -> text; raises RowError if the template rejects the messages
ApplyTemplate = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True)
class Rendering:
    """A conversation rendered with placeholders.

    Prompt and answer are tokenized separately at each offset in `answer_starts`, so that the tokens
    of the prompt equal those that an engine receives.
    """

    text: str
    contents: list[str]  # contents[i] is the text that placeholder i stands for
    answer_starts: list[int]  # offsets in `text` where an assistant's answer begins
    trained_turns: list[tuple[int, int]]  # spans [start, stop) of `text` to train on


def render(
    messages: Sequence[Message], add_generation_prompt: bool, apply: ApplyTemplate
) -> Rendering:
    """Render a conversation.

    An assistant turn is trained if the conversation up to it renders to the same text as in the
    complete conversation. A first message of the assistant answers nothing and is context.

    Raises:
        RowError: the template drops, repeats or reorders a message. It may drop only the text of
            assistant messages, such as the reasoning of past turns.
    """
    masked, contents, owners = mask_contents(messages)
    text = apply(masked, add_generation_prompt)
    kept = _placeholders(text)
    droppable = {
        index for index, owner in enumerate(owners) if messages[owner]["role"] == "assistant"
    }
    dropped = set(range(len(contents))) - set(kept) - droppable
    answer_starts, trained_turns = [], []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number == 0:
            continue
        prompt = apply(masked[:number], True)
        if not text.startswith(prompt):
            continue
        answer_starts.append(len(prompt))
        until_turn = apply(masked[: number + 1], False)
        own = [index for index, owner in enumerate(owners) if owner == number]
        shown = _placeholders(text[len(prompt) : len(until_turn)])
        if text.startswith(until_turn) and shown == own:
            trained_turns.append((len(prompt), len(until_turn)))
    if dropped or kept != sorted(set(kept)):
        raise RowError("template_alters", "the chat template drops, repeats or reorders a message")
    return Rendering(text, contents, answer_starts, trained_turns)


def mask_contents(messages: Sequence[Message]) -> tuple[list[Message], list[str], list[int]]:
    """Replace the texts of messages by placeholders.

    White space at the ends of a text stays outside of its placeholder, so that a template can trim
    it. Think markers in assistant messages stay too, and split the text.

    Returns:
        The messages with placeholders, the text of each placeholder, and the index of the message
        that each placeholder belongs to.
    """
    masked: list[Message] = []
    contents: list[str] = []
    owners: list[int] = []
    for number, message in enumerate(messages):
        is_assistant = message["role"] == "assistant"
        content = message["content"]
        parts = _THINK_MARKER.split(content) if is_assistant else [content]
        shown = ""
        for part in parts:
            core = part.strip()
            if not core or (is_assistant and core in THINK_MARKERS):
                shown += part
                continue
            before, after = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :]
            shown += f"{before}\U000f0000{len(contents)}\U000f0001{after}"
            contents.append(core)
            owners.append(number)
        masked.append({"role": message["role"], "content": shown})
    return masked, contents, owners


def _placeholders(text: str) -> list[int]:
    """Return the numbers of the placeholders in `text`, in order."""
    return [int(match[1]) for match in PLACEHOLDER.finditer(text)]
