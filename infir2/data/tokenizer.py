"""A Hugging Face tokenizer whose control tokens never come from data.

A control token is an added token that is flagged as special, or one in the form `<|...|>` that the
chat template writes. Its characters in a document or a message are encoded as plain text, so that
data cannot end a document or forge a turn. Any other added word, such as Qwen3's `<think>` and
`<tool_call>` or a user's `<answer>`, becomes its token as in transformers.
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2.config.data_sections import DocumentBos
from infir2.data.rendering import THINK_MARKERS
from infir2.data.tokenizer_files import check_tokenizer_files, library_errors, panics_are_row_errors
from infir2.data.tokenizer_speed import check_speed
from infir2.errors import ConfigError

# Text whose tokens identify a tokenizer: digits, code, white space, accents, other scripts, emoji.
FINGERPRINT_TEXT = (
    "It's 1,234.5 in ``x = {'a': [0x1F]}\n\t  return``;"
    "  naïve Größe 数学 текст 👩‍🔬 $\\frac{1}{2}$ <|im_end|>\r\n "
)
EOD_MARKERS = ("<|endoftext|>", "<|end_of_text|>")
_MARKER_FORM = re.compile(r"<[|｜].*[|｜]>")


@dataclass(frozen=True)
class AddedToken:
    """An added token; white space beside it belongs to it where the tokenizer says so."""

    id: int
    strips_left: bool
    strips_right: bool


class DocumentTokenizer:
    """A Hugging Face tokenizer for documents. No pad token is required.

    Args:
        directory: has tokenizer.json and tokenizer_config.json.
        document_bos: whether a document begins with the BOS token; "tokenizer": if transformers
            puts it before a text.

    Raises:
        ConfigError: a file is missing or broken, or there is no BOS token for "always".
    """

    def __init__(self, directory: Path, document_bos: DocumentBos = "tokenizer") -> None:
        from tokenizers import Tokenizer

        self.directory = directory
        self._hf, specification = _load(directory)
        added, unknown = specification["added_tokens"], specification["model"].get("unk_token")
        markers = [
            entry
            for entry in added
            if (entry["special"] or entry["content"].strip()) and entry["content"] != unknown
        ]
        template = json.dumps(self._hf.chat_template or "", ensure_ascii=False)
        control = [
            entry
            for entry in markers
            if entry["special"]
            or (_MARKER_FORM.fullmatch(entry["content"]) and entry["content"] in template)
        ]
        self._special = {entry["content"]: entry["id"] for entry in control}
        self._special_ids = set(self._special.values())
        self._hidden_ids = {
            entry["id"]
            for entry in markers
            if entry["special"] and entry["content"] not in THINK_MARKERS
        }
        # Words that count only between spaces are left to the library.
        self._added = {
            entry["content"]: AddedToken(entry["id"], entry["lstrip"], entry["rstrip"])
            for entry in markers
            if entry["content"] in self._special or not entry["single_word"]
        }
        self._control = _any_of(self._special)
        specification["added_tokens"] = [
            entry | {"special": entry["content"] in self._special} for entry in added
        ]
        with library_errors(directory):
            self._plain = Tokenizer.from_str(json.dumps(specification))
            self._plain.encode_special_tokens = True  # as plain text
            self._plain.no_truncation()  # which a file may ask for, and transformers does not do
            self._plain.no_padding()
            self.vocab_size: int = max(self._hf.get_vocab().values()) + 1
            self._document_start = self._bos(document_bos)
            self._plain.encode(FINGERPRINT_TEXT)  # some files break only here
            check_speed(self._encode_and_decode, specification, directory / "tokenizer.json")

    def _encode_and_decode(self, text: str) -> None:
        """Run every step on a text, those of the decoder too whatever the vocabulary."""
        self.encode_text(text)
        if self._plain.decoder is not None:
            self._plain.decoder.decode([*text])

    def _bos(self, document_bos: DocumentBos) -> list[int]:
        """The tokens before each document: the BOS token, or none."""
        bos = self._hf.bos_token_id
        if document_bos == "always" and bos is None:
            raise ConfigError(
                f"data.document_bos: {self.directory} names no bos_token: set it in "
                'tokenizer_config.json, or use "never".'
            )
        by_transformers = bos is not None and self._hf.encode("a")[:1] == [bos]
        wanted = document_bos == "always" or (document_bos == "tokenizer" and by_transformers)
        return [int(bos)] if wanted else []

    def is_control(self, token_id: int) -> bool:
        """Whether the token is one that text never yields, such as `<|im_end|>`."""
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
        """Return the sha256 of template, control tokens and vocabulary size.

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

        These are the vocabulary, the tokens of FINGERPRINT_TEXT, and the tokens at the document's
        start and end.
        """
        parts = [
            sorted(self._plain.get_vocab().items()),
            self.encode_text(FINGERPRINT_TEXT),
            self.eod_token_id,
            *self._document_start,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of plain text; it never yields a control token.

        Raises:
            RowError: the library fails on this text.
        """
        with panics_are_row_errors():
            token_ids = self._plain.encode(text, add_special_tokens=False).ids
        return self._without_special(text, token_ids)

    def encode_document(self, text: str) -> list[int]:
        """Return the tokens of a document, from BOS (see `document_bos`) to end of document."""
        return [*self._document_start, *self.encode_text(text), self.eod_token_id]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode_document` of each text, faster than one by one.

        The library uses several threads unless TOKENIZERS_PARALLELISM=false. Raises RowError as
        `encode_document` does, without telling for which text.
        """
        with panics_are_row_errors():
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            [
                *self._document_start,
                *self._without_special(text, encoding.ids),
                self.eod_token_id,
            ]
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text without tokens that are flagged as special, except think markers."""
        return self._hf.decode(
            [int(token) for token in token_ids if int(token) not in self._hidden_ids],
            skip_special_tokens=False,
        )

    def token_text(self, token_id: int) -> str:
        """The text of one token, special or not; U+FFFD for a part of a character."""
        return self.tokens_text([token_id])

    def tokens_text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens with the special ones among them."""
        text: str = self._hf.decode(token_ids, skip_special_tokens=False)
        return text

    def _without_special(self, text: str, token_ids: list[int]) -> list[int]:
        """Return `token_ids` of `text`, or an encoding of `text` that has no control token."""
        if self._special_ids.isdisjoint(token_ids):
            return token_ids
        # The vocabulary has markers as ordinary words: split each one after its first character.
        parts, start = [], 0
        for match in self._control.finditer(text):
            parts.append(text[start : match.start() + 1])
            start = match.start() + 1
        pieces = [
            self._plain.encode(part, add_special_tokens=False).ids
            for part in [*parts, text[start:]]
        ]
        token_ids = [token for piece in pieces for token in piece]
        assert self._special_ids.isdisjoint(token_ids)
        return token_ids


def _load(directory: Path) -> tuple[Any, dict[str, Any]]:
    """Return transformers' tokenizer and the content of tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise ConfigError(
                f"data.tokenizer: {directory} has no {name}; "
                "name a directory with both tokenizer files."
            )
    check_tokenizer_files(directory)
    with library_errors(directory):
        hf: Any = PreTrainedTokenizerFast.from_pretrained(str(directory))
        return hf, json.loads(hf.backend_tokenizer.to_str())


def _any_of(words: Sequence[str] | dict[str, Any]) -> re.Pattern[str]:
    """A pattern that matches the longest of the words; none without words."""
    ordered = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")
