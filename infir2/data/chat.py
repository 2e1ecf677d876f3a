"""Tokenize documents and conversations, with special tokens only where the chat template puts them.

The chat template renders the conversation with placeholders for the messages' texts
(`rendering.py`). Only in the text around the placeholders does a marker such as `<|im_end|>` become
its special token; the same characters inside a message are encoded as plain text, so that data
cannot forge a turn. `<think>` and `</think>` in an assistant's message are special too, because the
model generates them itself. Between special tokens, the text of template and messages is encoded in
one piece, as an inference engine does.

"Special" here includes all added tokens that are not blank, whether or not tokenizer.json flags
them as special: Qwen3's `<think>` is an added token without the flag.
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

from infir2.data.rendering import PLACEHOLDER, THINK_MARKERS, render
from infir2.data.types import Message, RowError, Sample
from infir2.errors import ConfigError, first_line

# Text whose tokens identify a tokenizer: digits, code, white space, accents, other scripts, emoji.
FINGERPRINT_TEXT = (
    "It's 1,234.5 in ``x = {'a': [0x1F]}\n\t  return``;"
    "  naïve Größe 数学 текст 👩‍🔬 $\\frac{1}{2}$ <|im_end|>\r\n "
)
EOD_MARKERS = ("<|endoftext|>", "<|end_of_text|>")
PROBE_CONVERSATION: list[Message] = [
    {"role": "user", "content": "What is 2+3?"},
    {"role": "assistant", "content": "2+3=5"},
]


@dataclass(frozen=True)
class _Chunk:
    """A special token, or the tokens of the plain text between two of them."""

    offset: int  # of its first character in the rendered text, in which placeholders still stand
    token_ids: list[int]
    is_special: bool


def load_tokenizer(directory: str | Path) -> "ChatTokenizer":
    """Load the tokenizer of a Hugging Face directory.

    Raises:
        ConfigError: a file is missing or broken, or the chat template cannot be trained with.
    """
    return ChatTokenizer(Path(directory))


class ChatTokenizer:
    """A Hugging Face tokenizer with its chat template. No pad token is required.

    A tokenizer without a chat template can encode documents; a conversation raises ConfigError.
    """

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        self.directory = directory
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (directory / name).is_file():
                raise ConfigError(
                    f"data.tokenizer: {directory} has no {name}; "
                    "name a directory with both tokenizer files."
                )
        try:
            self._hf: Any = PreTrainedTokenizerFast.from_pretrained(str(directory))
            specification = json.loads(self._hf.backend_tokenizer.to_str())
        except Exception as error:  # the library raises bare Exception for a broken file
            raise ConfigError(
                f"data.tokenizer: {directory} cannot be loaded ({first_line(error)}); "
                "copy the files again."
            ) from error
        added, unknown = specification["added_tokens"], specification["model"].get("unk_token")
        special = [
            entry
            for entry in added
            if (entry["special"] or entry["content"].strip()) and entry["content"] != unknown
        ]
        self._special = {entry["content"]: entry["id"] for entry in special}
        self._hidden_ids = {
            entry["id"]
            for entry in special
            if entry["special"] and entry["content"] not in THINK_MARKERS
        }
        specification["added_tokens"] = [entry for entry in added if entry not in special]
        self._plain = Tokenizer.from_str(json.dumps(specification))
        self._special_ids = set(self._special.values())
        markers = "|".join(
            re.escape(marker) for marker in sorted(self._special, key=len, reverse=True)
        )
        self._marker = re.compile(markers or "(?!)")
        self._placeholder_or_marker = re.compile(f"{PLACEHOLDER.pattern}|{self._marker.pattern}")
        self.vocab_size: int = max(self._hf.get_vocab().values()) + 1
        self._turn_end = self._check_template() if self._hf.chat_template else None

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

    @property
    def turn_end(self) -> str | None:
        """The token that ends an answer of the chat template; None without a template."""
        return (
            None if self._turn_end is None else str(self._hf.convert_ids_to_tokens(self._turn_end))
        )

    def is_control(self, token_id: int) -> bool:
        """Whether the token is an added one that text never yields, such as `<|im_end|>`."""
        return token_id in self._special_ids or token_id == self._hf.eos_token_id

    @property
    def eod_token_id(self) -> int:
        """The token id after each document: `<|endoftext|>` if there is one, otherwise eos.

        A chat model's eos usually ends a turn, not a document.

        Raises:
            ConfigError: the tokenizer has neither.
        """
        for marker in EOD_MARKERS:
            if marker in self._special:
                return self._special[marker]
        if self._hf.eos_token_id is None:
            raise ConfigError(
                f"data.tokenizer: set eos_token in {self.directory}/tokenizer_config.json; "
                "each document must end with a token."
            )
        return int(self._hf.eos_token_id)

    def fingerprint(self) -> str:
        """Return the sha256 of template, special tokens and vocabulary size.

        Together they determine the tokens of a conversation, except for the vocabulary's entries.
        """
        parts = {  # published fingerprints depend on these names
            "chat_template": self._hf.chat_template,
            "special_tokens": {
                name: str(token) for name, token in self._hf.special_tokens_map.items()
            },
            "control_tokens": self._special,
            "vocab_size": self.vocab_size,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def document_fingerprint(self) -> str:
        """The sha256 of what determines a document's tokens.

        These are the vocabulary, the tokens of FINGERPRINT_TEXT, and the end-of-document token.
        """
        parts = [
            sorted(self._plain.get_vocab().items()),
            self.encode_text(FINGERPRINT_TEXT),
            self.eod_token_id,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def require_chat_template(self) -> None:
        """Raise ConfigError if there is no chat template."""
        if not self._hf.chat_template:
            raise ConfigError(
                f"data.tokenizer: {self.directory} has no chat_template in tokenizer_config.json: "
                "add one, or name another tokenizer."
            )

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of plain text; a marker in it never becomes a special token."""
        return self._without_special(text, self._plain.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode_document` of each text, faster than one by one.

        The library uses several threads unless TOKENIZERS_PARALLELISM=false.
        """
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        pairs = zip(texts, encodings, strict=True)
        return [
            [*self._without_special(text, encoding.ids), self.eod_token_id]
            for text, encoding in pairs
        ]

    def _without_special(self, text: str, token_ids: list[int]) -> list[int]:
        """Return `token_ids` of `text`, or an encoding of `text` that has no special token."""
        if self._special_ids.isdisjoint(token_ids):
            return token_ids
        # The vocabulary has markers as ordinary words: split each one after its first character.
        parts, start = [], 0
        for match in self._marker.finditer(text):
            parts.append(text[start : match.start() + 1])
            start = match.start() + 1
        pieces = [
            self._plain.encode(part, add_special_tokens=False).ids
            for part in [*parts, text[start:]]
        ]
        token_ids = [token for piece in pieces for token in piece]
        assert self._special_ids.isdisjoint(token_ids)
        return token_ids

    def encode_document(self, text: str) -> list[int]:
        """Return the tokens of plain text, followed by the end-of-document token."""
        return [*self.encode_text(text), self.eod_token_id]

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Return the tokens of trusted text, such as a response prefix: markers become special."""
        return [token for chunk in self._chunks(text, [], []) for token in chunk.token_ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text without tokens that are flagged as special, except think markers."""
        return self._hf.decode(
            [int(token) for token in token_ids if int(token) not in self._hidden_ids],
            skip_special_tokens=False,
        )

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[int]:
        """Return the tokens of a conversation; `add_generation_prompt` opens the assistant's turn.

        With the generation prompt, they are a prefix of the tokens of
        `encode_conversation([*messages, answer])`.

        Raises:
            RowError: the template rejects the conversation, or drops a part of it.
            ConfigError: there is no chat template.
        """
        rendering = render(messages, add_generation_prompt, self._apply)
        return [
            token
            for chunk in self._chunks(rendering.text, rendering.contents, rendering.answer_starts)
            for token in chunk.token_ids
        ]

    def encode_conversation(self, messages: Sequence[Message], origin: str = "") -> Sample:
        """Return the tokens and the loss mask of a conversation that ends with an assistant turn.

        The loss mask selects each assistant turn, from the first token after the generation prompt
        to the end-of-turn token. An exception is a turn that the template renders differently once
        the conversation continues (Qwen3 drops the reasoning of past turns): it is context only, as
        it is for an engine. The last turn is always trained.

        Raises:
            RowError: the template rejects the conversation, or drops a part of it.
            ConfigError: there is no chat template.
        """
        assert messages[-1]["role"] == "assistant"
        rendering = render(messages, False, self._apply)
        if len(messages) == 1:
            raise RowError("no_trained_tokens", "an assistant message without a question")
        turns = rendering.trained_turns
        if not turns or turns[-1][1] != len(rendering.text):
            raise RowError(
                "template_alters",
                "the chat template changes the last assistant turn, or the text before it",
            )
        chunks = list(self._chunks(rendering.text, rendering.contents, rendering.answer_starts))
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        mask = _assistant_mask(chunks, turns)
        if True not in mask:
            raise RowError(
                "no_trained_tokens",
                "the chat template has no end token after the assistant's turn",
            )
        # Drop the template's text after the last end token, such as a newline.
        length = len(mask) - mask[::-1].index(True)
        return Sample(
            np.asarray(token_ids[:length], dtype=np.int32),
            np.asarray(mask[:length], dtype=np.bool_),
            origin,
        )

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Render the chat template to text, without tokenizing it."""
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
                "template_refused", f"the chat template rejects the conversation: {error}"
            ) from None

    def _chunks(
        self, text: str, contents: Sequence[str], answer_starts: Sequence[int]
    ) -> Iterator[_Chunk]:
        """Yield the tokens of a rendered text, in order.

        A chunk is one special token of the template, or all text between two special tokens, split
        only where an answer starts. Placeholders are replaced by `contents`.
        """
        edges = sorted({0, *answer_starts, len(text)})
        for first, last in itertools.pairwise(edges):
            plain, plain_offset, position = "", first, first
            for match in self._placeholder_or_marker.finditer(text[first:last]):
                plain += text[position : first + match.start()]
                position = first + match.end()
                if match[1] is not None:
                    plain += contents[int(match[1])]
                    continue
                if plain:
                    yield _Chunk(plain_offset, self.encode_text(plain), is_special=False)
                yield _Chunk(first + match.start(), [self._special[match[0]]], is_special=True)
                plain, plain_offset = "", position
            plain += text[position:last]
            if plain:
                yield _Chunk(plain_offset, self.encode_text(plain), is_special=False)

    def _check_template(self) -> int:
        """Return the token that ends an assistant's turn.

        Raises:
            ConfigError: the template cannot be trained with.
        """
        try:
            sample = self.encode_conversation(PROBE_CONVERSATION)
            expected = self._hf.encode(
                self._hf.apply_chat_template(PROBE_CONVERSATION, tokenize=False),
                add_special_tokens=False,
            )
        except Exception as error:  # a template may fail in any way; the user has to replace it
            raise ConfigError(
                f"data.tokenizer: the chat template in {self.directory} cannot be used ({error}): "
                "use another."
            ) from error
        if expected[: sample.num_tokens] != sample.token_ids.tolist():
            raise ConfigError(
                f"data.tokenizer: the chat template in {self.directory} rewrites the messages: "
                "use another."
            )
        return int(sample.token_ids[-1])


def _declared_ends(directory: Path) -> list[int]:
    """The `eos_token_id` of the model's files, each one or a list; [] without these files."""
    ends: list[int] = []
    for path in (directory / "generation_config.json", directory / "config.json"):
        try:
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"data.tokenizer: {path} is not readable ({first_line(error)}); copy it again."
            ) from error
        ends += [end for end in (eos if isinstance(eos, list) else [eos]) if isinstance(end, int)]
    return ends


def _assistant_mask(chunks: Sequence[_Chunk], turns: Sequence[tuple[int, int]]) -> list[bool]:
    """Return, for each token, whether it is in one of `turns`, up to its last special token.

    That token is the end of turn; the template's text after it is not trained.
    """
    ends = [
        max((c.offset for c in chunks if c.is_special and start <= c.offset < stop), default=-1)
        for start, stop in turns
    ]
    spans = [(start, end) for (start, _), end in zip(turns, ends, strict=True)]
    mask: list[bool] = []
    for chunk in chunks:
        trained = any(start <= chunk.offset <= end for start, end in spans)
        mask += [trained] * len(chunk.token_ids)
    return mask
