"""Text and conversations to tokens, with control tokens only where the chat template (or the model's own turn) puts them.

The template renders the conversation with every message's text replaced by a private placeholder. What stands around
the placeholders is the template's, and only there a marker such as `<|im_end|>` becomes its control token; the same
characters inside a message are encoded as plain text. In an assistant's message `<think>` and `</think>` count as the
template's: they are the model's own markers. Between control tokens, the text of template and messages is encoded in
one piece, as an inference engine does.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infir2.data.sources import RowError
from infir2.data.types import Message, Sample
from infir2.errors import ConfigError, first_line

THINK_MARKERS = ("<think>", "</think>")
SAMPLE = "It's 1,234.5 in ``x = {'a': [0x1F]}\n\t  return``;  naïve Größe 数学 текст 👩‍🔬 $\\frac{1}{2}$ <|im_end|>\r\n "
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
PLACEHOLDER = re.compile("\U000f0000([0-9]+)\U000f0001")
PROBE_CONVERSATION: list[Message] = [
    {"role": "user", "content": "What is 2+3?"},
    {"role": "assistant", "content": "2+3=5"},
]


@dataclass(frozen=True)
class _Chunk:
    """Tokens and where they begin in the rendered text (placeholders counted as they stand there)."""

    offset: int
    token_ids: list[int]
    is_control: bool


@dataclass(frozen=True)
class _Rendering:
    """A rendered conversation: `text` with placeholders, `turns` the spans of assistant turns that may be trained.

    `cuts` are the offsets where an assistant's answer begins: prompt and answer are encoded apart there, so that the
    tokens of the prompt are those an engine gets.
    """

    text: str
    contents: list[str]
    cuts: list[int]
    turns: list[tuple[int, int]]


def load_tokenizer(directory: str | Path) -> "ChatTokenizer":
    """The tokenizer of a Hugging Face directory. Raises ConfigError naming the file or field that is missing."""
    return ChatTokenizer(Path(directory))


class ChatTokenizer:
    """A Hugging Face tokenizer with its chat template. Needs no pad token.

    A tokenizer without chat template encodes documents; its first conversation raises ConfigError.
    """

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        self.directory = directory
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (directory / name).is_file():
                raise ConfigError(
                    f"data.tokenizer: {directory} has no {name}; name a directory with both tokenizer files."
                )
        try:
            self._hf: Any = PreTrainedTokenizerFast.from_pretrained(str(directory))
            specification = json.loads(self._hf.backend_tokenizer.to_str())
        except Exception as error:  # the library raises bare Exception for a broken file
            raise ConfigError(
                f"data.tokenizer: {directory} cannot be loaded ({first_line(error)}); copy the files again."
            ) from error
        added, unknown = specification["added_tokens"], specification["model"].get("unk_token")
        control = [
            entry
            for entry in added
            if (entry["special"] or entry["content"].strip()) and entry["content"] != unknown
        ]
        self._control = {entry["content"]: entry["id"] for entry in control}
        self._hidden_ids = {
            entry["id"]
            for entry in control
            if entry["special"] and entry["content"] not in THINK_MARKERS
        }
        specification["added_tokens"] = [entry for entry in added if entry not in control]
        self._plain = Tokenizer.from_str(json.dumps(specification))
        self._control_ids = set(self._control.values())
        markers = "|".join(
            re.escape(marker) for marker in sorted(self._control, key=len, reverse=True)
        )
        self._marker = re.compile(markers or "(?!)")
        self._placeholder_or_marker = re.compile(f"{PLACEHOLDER.pattern}|{self._marker.pattern}")
        self.vocab_size: int = max(self._hf.get_vocab().values()) + 1
        self._turn_end = self._check_template() if self._hf.chat_template else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the template's end of turn, the tokenizer's eos, the end of a document."""
        ends = (
            self._turn_end,
            self._hf.eos_token_id,
            *(self._control.get(marker) for marker in DOCUMENT_ENDS),
        )
        return tuple(sorted({end for end in ends if end is not None}))

    @property
    def eod_token_id(self) -> int:
        """The token after each document: `<|endoftext|>` where there is one (a chat model's eos ends a turn), else eos."""
        for marker in DOCUMENT_ENDS:
            if marker in self._control:
                return self._control[marker]
        if self._hf.eos_token_id is None:
            raise ConfigError(
                f"data.tokenizer: set eos_token in {self.directory}/tokenizer_config.json; documents must end with a token."
            )
        return int(self._hf.eos_token_id)

    def fingerprint(self) -> str:
        """sha256 of all that decides how a conversation becomes tokens, the vocabulary's entries aside."""
        parts = {
            "chat_template": self._hf.chat_template,
            "special_tokens": {
                name: str(token) for name, token in self._hf.special_tokens_map.items()
            },
            "control_tokens": self._control,
            "vocab_size": self.vocab_size,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def document_fingerprint(self) -> str:
        """sha256 of what decides how a document becomes tokens: the vocabulary, how it cuts a sample of text, the end token."""
        parts = [
            sorted(self._plain.get_vocab().items()),
            self.encode_text(SAMPLE),
            self.eod_token_id,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def require_chat_template(self) -> None:
        """Raise ConfigError unless there is a chat template."""
        if not self._hf.chat_template:
            raise ConfigError(
                f"data.tokenizer: {self.directory} has no chat_template in tokenizer_config.json: add one, or name another."
            )

    def encode_text(self, text: str) -> list[int]:
        """Plain text; a marker spelled in it never becomes a control token."""
        return self._without_control(text, self._plain.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of each; faster, and in several threads unless TOKENIZERS_PARALLELISM=false."""
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        pairs = zip(texts, encodings, strict=True)
        return [
            [*self._without_control(text, encoding.ids), self.eod_token_id]
            for text, encoding in pairs
        ]

    def _without_control(self, text: str, token_ids: list[int]) -> list[int]:
        """`token_ids` of `text`, or others without control tokens."""
        if self._control_ids.isdisjoint(token_ids):
            return token_ids
        # a vocabulary that holds its markers as ordinary words: cut each marker behind its first character
        parts, start = [], 0
        for match in self._marker.finditer(text):
            parts.append(text[start : match.start() + 1])
            start = match.start() + 1
        pieces = [
            self._plain.encode(part, add_special_tokens=False).ids
            for part in [*parts, text[start:]]
        ]
        token_ids = [token for piece in pieces for token in piece]
        assert self._control_ids.isdisjoint(token_ids)
        return token_ids

    def encode_document(self, text: str) -> list[int]:
        """Plain text with the document's end."""
        return [*self.encode_text(text), self.eod_token_id]

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Text of our own (a prefix of the response, say), in which markers are control tokens."""
        return [token for chunk in self._chunks(text, [], []) for token in chunk.token_ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, without tokens that are flagged special; `<think>` and `</think>` stay."""
        return self._hf.decode(
            [int(token) for token in token_ids if int(token) not in self._hidden_ids],
            skip_special_tokens=False,
        )

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[int]:
        """The tokens of a conversation, up to where the assistant begins if `add_generation_prompt`.

        They are a prefix of `encode_conversation([*messages, answer]).token_ids`. Raises RowError for a conversation
        that the template refuses, ConfigError without a template.
        """
        rendering = self._render(messages, add_generation_prompt)
        return [
            token
            for chunk in self._chunks(rendering.text, rendering.contents, rendering.cuts)
            for token in chunk.token_ids
        ]

    def encode_conversation(self, messages: Sequence[Message], origin: str = "") -> Sample:
        """Tokens and loss mask of a conversation that ends with an assistant turn.

        Trained: each assistant turn from its first token to its end token, unless the template rewrites it once the
        conversation goes on (Qwen3 drops past thoughts): such a turn is context, as it is for the engine. The last
        turn is always trained. Raises RowError where the template loses a part of a message, ConfigError without a
        template.
        """
        assert messages[-1]["role"] == "assistant"
        rendering = self._render(messages, add_generation_prompt=False)
        if len(messages) == 1:
            raise RowError("no_trained_tokens", "an assistant message without a question")
        if not rendering.turns or rendering.turns[-1][1] != len(rendering.text):
            raise RowError(
                "template_alters",
                "the chat template changes the last assistant turn, or what precedes it, when it renders it",
            )
        chunks = list(self._chunks(rendering.text, rendering.contents, rendering.cuts))
        token_ids: list[int] = []
        mask: list[bool] = []
        ends = [
            max((c.offset for c in chunks if c.is_control and first <= c.offset < last), default=-1)
            for first, last in rendering.turns
        ]
        for chunk in chunks:
            trained = any(
                first <= chunk.offset <= end
                for (first, _), end in zip(rendering.turns, ends, strict=True)
            )
            token_ids += chunk.token_ids
            mask += [trained] * len(chunk.token_ids)
        if True not in mask:
            raise RowError(
                "no_trained_tokens",
                "the chat template puts no end token behind the assistant's turn",
            )
        end = len(mask) - mask[::-1].index(
            True
        )  # what the template puts behind the last end token is no use
        return Sample(
            np.asarray(token_ids[:end], dtype=np.int32),
            np.asarray(mask[:end], dtype=np.bool_),
            origin,
        )

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> _Rendering:
        masked, contents, owners = _masked(messages)
        text = self._apply(masked, add_generation_prompt)
        cuts, turns = [], []
        kept = [int(match[1]) for match in PLACEHOLDER.finditer(text)]
        for index, message in enumerate(messages):
            if (
                message["role"] != "assistant" or index == 0
            ):  # what opens a conversation answers nothing
                continue
            start = self._apply(masked[:index], True)
            if not text.startswith(start):
                continue
            cuts.append(len(start))
            turn = self._apply(masked[: index + 1], False)
            own = [place for place, owner in enumerate(owners) if owner == index]
            found = [int(match[1]) for match in PLACEHOLDER.finditer(text[len(start) : len(turn)])]
            if text.startswith(turn) and found == own:
                turns.append((len(start), len(turn)))
        past_thoughts = {
            place for place, owner in enumerate(owners) if messages[owner]["role"] == "assistant"
        }
        lost = [
            place
            for place in range(len(contents))
            if place not in kept and place not in past_thoughts
        ]
        if lost or kept != sorted(set(kept)):
            raise RowError(
                "template_alters", "the chat template drops, repeats or reorders a message"
            )
        return _Rendering(text, contents, cuts, turns)

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        self.require_chat_template()
        from jinja2 import TemplateError

        try:
            return str(
                self._hf.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TemplateError as error:
            raise RowError(
                "template_refused", f"the chat template refuses the conversation: {error}"
            ) from None

    def _chunks(self, text: str, contents: Sequence[str], cuts: Sequence[int]) -> Iterator[_Chunk]:
        """Tokens of a rendered text: each control token of the template alone, all between them in one piece up to a cut."""
        edges = sorted({0, *cuts, len(text)})
        for first, last in itertools.pairwise(edges):
            plain, plain_offset, position = "", first, first
            for match in self._placeholder_or_marker.finditer(text[first:last]):
                plain += text[position : first + match.start()]
                position = first + match.end()
                if match[1] is not None:
                    plain += contents[int(match[1])]
                    continue
                if plain:
                    yield _Chunk(plain_offset, self.encode_text(plain), is_control=False)
                yield _Chunk(first + match.start(), [self._control[match[0]]], is_control=True)
                plain, plain_offset = "", position
            plain += text[position:last]
            if plain:
                yield _Chunk(plain_offset, self.encode_text(plain), is_control=False)

    def _check_template(self) -> int:
        """The token that ends an assistant's turn. Raises ConfigError for a template we cannot train with."""
        try:
            sample = self.encode_conversation(PROBE_CONVERSATION)
            expected = self._hf.encode(
                self._hf.apply_chat_template(PROBE_CONVERSATION, tokenize=False),
                add_special_tokens=False,
            )
        except Exception as error:  # whatever the template does wrong, the user has to mend it
            raise ConfigError(
                f"data.tokenizer: the chat template in {self.directory} cannot be used ({error}): use another."
            ) from error
        if expected[: sample.num_tokens] != sample.token_ids.tolist():
            raise ConfigError(
                f"data.tokenizer: {self.directory}'s chat template rewrites the messages: use another one."
            )
        return int(sample.token_ids[-1])


def _masked(messages: Sequence[Message]) -> tuple[list[Message], list[str], list[int]]:
    """Messages with placeholders, the texts they stand for, and the message that each text belongs to.

    White space at the ends of a text stays outside, so that a template may trim it.
    """
    masked: list[Message] = []
    contents: list[str] = []
    owners: list[int] = []
    for index, message in enumerate(messages):
        thinks = message["role"] == "assistant"
        parts = (
            re.split("(" + "|".join(THINK_MARKERS) + ")", message["content"])
            if thinks
            else [message["content"]]
        )
        shown = ""
        for part in parts:
            core = part.strip()
            if not core or (thinks and core in THINK_MARKERS):
                shown += part
                continue
            before, after = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :]
            shown += f"{before}\U000f0000{len(contents)}\U000f0001{after}"
            contents.append(core)
            owners.append(index)
        masked.append({"role": message["role"], "content": shown})
    return masked, contents, owners
