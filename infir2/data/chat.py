"""Tokenize conversations, with control tokens only where the chat template puts them.

The chat template renders the conversation with placeholders for the messages' texts
(`rendering.py`). Only in the text around the placeholders does a marker such as `<|im_end|>` become
its control token; the same characters inside a message are encoded as plain text, so that data
cannot forge a turn. `<think>` and `</think>` in an assistant's message are always the tokens that
the model generates itself. Between the template's markers, the text of template and messages is
encoded in one piece, as an inference engine does.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from infir2.config.data_sections import DocumentBos
from infir2.data.rendering import PLACEHOLDER, Rendering, Turn, render
from infir2.data.template import ChatTemplate
from infir2.data.tokenizer import EOD_MARKERS, DocumentTokenizer
from infir2.data.tokenizer_files import read_object
from infir2.data.types import Message, RowError, Sample
from infir2.errors import ConfigError, first_line

QUESTION: Message = {"role": "user", "content": "What is 2+3?"}
ANSWER: Message = {"role": "assistant", "content": "2+3=5"}
THOUGHT: Message = ANSWER | {"reasoning_content": "Two and three are five."}


@dataclass(frozen=True)
class _Chunk:
    """A marker of the template, or the tokens of the plain text between two of them."""

    offset: int  # of its first character in the rendered text, in which placeholders still stand
    end: int
    token_ids: list[int]
    is_marker: bool


def load_tokenizer(
    directory: str | Path, document_bos: DocumentBos = "tokenizer", today: str = ""
) -> "ChatTokenizer":
    """Load the tokenizer of a Hugging Face directory.

    Raises:
        ConfigError: a file is missing or broken.
    """
    return ChatTokenizer(Path(directory), document_bos, today)


class ChatTokenizer(DocumentTokenizer):
    """A Hugging Face tokenizer with its chat template.

    A tokenizer without a chat template can encode documents; a conversation raises ConfigError.

    Args:
        directory, document_bos: as in DocumentTokenizer.
        today: the date that the template writes if it writes one, YYYY-MM-DD; "": today's.
        template_variables: further variables of the template.
    """

    def __init__(
        self,
        directory: Path,
        document_bos: DocumentBos = "tokenizer",
        today: str = "",
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(directory, document_bos)
        self._template_variables = dict(template_variables or {})
        self.today = today or date.today().isoformat()
        try:
            date.fromisoformat(self.today)
        except ValueError:
            raise ConfigError(
                f"model.template_date: {today} is not a date: write YYYY-MM-DD."
            ) from None
        self._placeholder_or_marker = re.compile(
            "|".join([PLACEHOLDER.pattern, *map(re.escape, sorted(self._added, key=len)[::-1])])
        )

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Raises ConfigError if there is none."""
        self.require_chat_template()
        try:
            source = self._hf.get_chat_template()
        except ValueError as error:  # several templates, none of which is the default
            raise ConfigError(
                f"data.tokenizer: {self.directory} has several chat templates; name one of them "
                f'"default" ({first_line(error)}).'
            ) from error
        variables: dict[str, Any] = {
            name: token if isinstance(token, list) else str(token)
            for name, token in self._hf.special_tokens_map.items()
        }
        name = f"the chat template in {self.directory}"
        for each in self._template_variables:
            if each in ("messages", "add_generation_prompt") or not re.search(
                rf"\b{each}\b", source
            ):
                raise ConfigError(f"rl.template_options: {name} has no option {each}; remove it.")
        return ChatTemplate(name, source, variables | self._template_variables, self.today)

    @functools.cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a response.

        These are the end of turn, the tokenizer's eos, the end of document, and the control tokens
        among the ends that the model's files beside the tokenizer name (Llama 3: `<|eom_id|>`).
        """
        ends = (
            self._turn_end,
            self._hf.eos_token_id,
            *(self._special.get(marker) for marker in EOD_MARKERS),
            *filter(self.is_control, _declared_ends(self.directory)),
        )
        return tuple(sorted({end for end in ends if end is not None}))

    @functools.cached_property
    def _turn_end(self) -> int | None:
        """The id of the token that ends an answer; None if no answer can be trained."""
        if not self._hf.chat_template:
            return None
        for answer in (ANSWER, THOUGHT):
            try:
                return int(self.encode_conversation([QUESTION, answer]).token_ids[-1])
            except (RowError, ConfigError):
                continue
        return None

    @property
    def turn_end(self) -> str | None:
        """The token that ends an answer of the chat template; None without one."""
        return (
            None if self._turn_end is None else str(self._hf.convert_ids_to_tokens(self._turn_end))
        )

    def require_chat_template(self) -> None:
        """Raise ConfigError if there is no chat template."""
        if not self._hf.chat_template:
            raise ConfigError(
                f"data.tokenizer: {self.directory} has no chat_template in tokenizer_config.json: "
                "add one, or name another tokenizer."
            )

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Return the tokens of trusted text, such as a response prefix: markers become special."""
        return self._tokens(Rendering(text, []))

    def encode_raw_prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt that somebody rendered: BOS as before a document, unless
        the text has it, and markers as special tokens."""
        token_ids, start = self.encode_with_special_tokens(text), self._document_start
        return token_ids if token_ids[: len(start)] == start else [*start, *token_ids]

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[int]:
        """Return the tokens of a conversation; `add_generation_prompt` opens the assistant's turn.

        With the generation prompt, they are a prefix of the tokens of
        `encode_conversation([*messages, answer])`, unless it opens a thought and there is none.

        Raises:
            RowError: the template rejects the conversation, or drops a part of it.
            ConfigError: there is no chat template.
        """
        return self._tokens(self.render(messages, add_generation_prompt))

    def encode_prompt(
        self, messages: Sequence[Message], response_prefix: str = ""
    ) -> tuple[list[int], str]:
        """Return the tokens of a prompt, and the text with which its response begins.

        The second is the "<think>" that the generation prompt ends with, "" where the template
        leaves it to the model to begin a thought, and then `response_prefix`; a prefix that repeats
        the "<think>" is not written twice. Errors as `apply_chat_template`.
        """
        rendering = self.render(messages, add_generation_prompt=True)
        token_ids, opened = self._tokens(rendering), rendering.opened_thought
        if not response_prefix or (opened and opened.strip() == response_prefix.strip()):
            return token_ids, opened
        prefix = self.encode_with_special_tokens(response_prefix)
        return [*token_ids, *prefix], opened + response_prefix

    def encode_answer(self, content: str, with_end: bool) -> list[int]:
        """Return the tokens of a user's message between two turns of the assistant.

        They follow the first turn's end token, or begin with it (`with_end`), and end with the
        generation prompt of the second turn. The tokens of neither turn have a part in them.

        Raises:
            RowError: the template rewrites the first turn, has no end token after it, or rejects
                the message.
        """
        before = self.apply_chat_template([QUESTION, ANSWER])
        messages = [QUESTION, ANSWER, {"role": "user", "content": content}]
        after = self.apply_chat_template(messages, add_generation_prompt=True)
        ends = [index for index, token in enumerate(before) if token in self.eos_token_ids]
        if not ends or after[: len(before)] != before:
            raise RowError("template_alters", "the chat template does not continue a turn as it is")
        return after[ends[-1] + (not with_end) :]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> Rendering:
        """Render a conversation to text with placeholders. Errors as `apply_chat_template`."""
        messages = self.template.with_thoughts(messages)
        return render(messages, add_generation_prompt, self.template, self._control)

    def encode_conversation(
        self, messages: Sequence[Message], origin: str = "", last_turn_only: bool = False
    ) -> Sample:
        """Return the tokens and the loss mask of a conversation that ends with an assistant turn.

        The loss mask selects each assistant turn, or the last one only, from the first token after
        the generation prompt to the end-of-turn token. An exception is a turn that the template
        renders differently once the conversation continues (Qwen3 drops the reasoning of past
        turns): it is context only, as it is for an engine. The last turn is always trained.

        Raises:
            RowError: the template rejects the conversation, or drops a part of it.
            ConfigError: there is no chat template.
        """
        assert messages[-1]["role"] == "assistant"
        rendering = self.render(messages, False)
        last = len(messages) - 1
        if not last:
            raise RowError("no_trained_tokens", "an assistant message without a question")
        if last not in rendering.turns:
            raise RowError(
                "template_alters",
                "the chat template changes the last assistant turn, or the text before it; "
                "use a template that keeps the answer's thought, or leave the thought out",
            )
        chunks = list(self._chunks(rendering))
        ends = _turn_ends(chunks, rendering.turns)
        if last not in ends:
            raise RowError(
                "no_trained_tokens",
                "the chat template has no end token after the assistant's turn",
            )
        trained = [last] if last_turn_only else list(ends)
        spans = [(rendering.turns[turn].start, ends[turn]) for turn in trained]
        mask: list[bool] = []
        for chunk in chunks:
            is_trained = any(start <= chunk.offset < end for start, end in spans)
            mask += [is_trained] * len(chunk.token_ids)
        # Drop the template's text after the last end token, such as a newline.
        length = len(mask) - mask[::-1].index(True)
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        return Sample(
            np.asarray(token_ids[:length], dtype=np.int32),
            np.asarray(mask[:length], dtype=np.bool_),
            origin,
        )

    def _tokens(self, rendering: Rendering) -> list[int]:
        return [token for chunk in self._chunks(rendering) for token in chunk.token_ids]

    def _chunks(self, rendering: Rendering) -> Iterator[_Chunk]:
        """Yield the tokens of a rendered text, in order.

        A chunk is one marker of the template, or all text between two markers, split only where an
        answer starts. Placeholders are replaced by their texts.
        """
        edges = sorted({0, *rendering.answer_starts, len(rendering.text)})
        for first, last in itertools.pairwise(edges):
            yield from self._chunks_between(rendering, first, last)

    def _chunks_between(self, rendering: Rendering, first: int, last: int) -> Iterator[_Chunk]:
        text, contents = rendering.text, rendering.contents
        plain, offset, position, strip = "", first, first, False
        for match in self._placeholder_or_marker.finditer(text, first, last):
            plain += text[position : match.start()]
            position = match.end()
            if match[1] is not None:
                plain += contents[int(match[1])]
                continue
            token = self._added[match[0]]
            plain = plain.lstrip() if strip else plain
            if plain := plain.rstrip() if token.strips_left else plain:
                yield _Chunk(offset, match.start(), self.encode_text(plain), is_marker=False)
            yield _Chunk(match.start(), position, [token.id], is_marker=True)
            plain, offset, strip = "", position, token.strips_right
        plain += text[position:last]
        if plain := plain.lstrip() if strip else plain:
            yield _Chunk(offset, last, self.encode_text(plain), is_marker=False)


def _declared_ends(directory: Path) -> list[int]:
    """The `eos_token_id` of the model's files, each one or a list; [] without these files."""
    ends: list[int] = []
    for path in (directory / "generation_config.json", directory / "config.json"):
        if path.exists():
            eos = read_object(path).get("eos_token_id")
            ends += [end for end in (eos if isinstance(eos, list) else [eos]) if type(end) is int]
    return ends


def _turn_ends(chunks: Sequence[_Chunk], turns: Mapping[int, Turn]) -> dict[int, int]:
    """Return the offset after the last marker that follows each turn's answer.

    That token is the end of turn; the template's text after it is not trained. A turn without one
    is left out.
    """
    ends = {
        number: max(
            (
                chunk.end
                for chunk in chunks
                if chunk.is_marker and turn.answer_end <= chunk.offset and chunk.end <= turn.stop
            ),
            default=-1,
        )
        for number, turn in turns.items()
    }
    return {number: end for number, end in ends.items() if end >= 0}
