"""Parse rows into documents, conversations and prompts; count and list unusable rows."""

import math
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infir2.config.schema import SourceSection
from infir2.data.chat import ChatTokenizer
from infir2.data.indexed import IndexedDocuments
from infir2.data.labels import Labels
from infir2.data.messages import (
    REASONING_KEYS,
    decode_messages,
    find,
    messages,
    question,
    text,
    with_row_thought,
)
from infir2.data.sources import Source
from infir2.data.types import Message, RowError
from infir2.errors import DataError
from infir2.files import JsonLinesWriter, disk_errors, read_json_lines, truncate_torn_line

RowKind = Literal["documents", "messages", "prompts"]


def open_source(section: SourceSection, kind: RowKind, labels: Labels | None = None) -> Source:
    """Open a source and check that each file has the fields that `kind` requires.

    `labels` says what prompts need (None: an answer).

    Raises:
        DataError: a file cannot be read, or lacks a field; the sentence lists the fields it has.
    """
    labels = labels or Labels()
    fields = _fields(section, kind, labels)
    named = [*fields, section.answer_field]
    columns = {*named, *(field.split(".")[0] for field in named), "difficulty"}
    columns |= set(REASONING_KEYS if kind == "messages" else ())
    columns |= {"input"} if "instruction" in fields else set()
    source = Source(section.path, () if labels.need_whole_rows else columns)
    for file in source.files:
        if isinstance(file, IndexedDocuments) and kind != "documents":
            raise DataError(
                f"{file.path} contains tokenized documents, which only `infir2 cpt` trains on: "
                f"name a file with {kind}."
            )
        missing = [
            field
            for field in fields
            if file.fields and not file.fields & {field, field.split(".")[0]}
        ]
        if missing:
            fields_found = ", ".join(sorted(file.fields))
            raise DataError(
                f"{file.path} has no field `{missing[0]}` (it has {fields_found}): "
                f"{_field_advice(kind, file.fields, _key_of(missing[0], section, labels))}."
            )
    return source


_KEYS: dict[RowKind, str] = {
    "documents": "set text_field of the source (infir2 tokenize: --text-field)",
    "messages": "set messages_field of the source, or set prompt_field and solution_field",
    "prompts": "set prompt_field and answer_field of the source",
}
_TYPICAL: dict[RowKind, tuple[str, str]] = {  # a field of such rows, and what they are for
    "messages": ("messages", "conversations, for infir2 sft"),
    "prompts": ("label", "prompts with answers, for infir2 rl and eval"),
    "documents": ("text", "documents, for infir2 cpt"),
}


def _key_of(field: str, section: SourceSection, labels: Labels) -> str:
    """The key that names a missing field, if rows of the kind may do without it."""
    if field in (section.prompt_field, section.answer_field, section.messages_field):
        return ""
    keys = {labels.field: "rl.reward_field", section.reasoning_field: "reasoning_field"}
    return keys.get(field, "")


def _field_advice(kind: RowKind, fields: Collection[str], key: str = "") -> str:
    """What to do about rows without the fields that `kind` requires, or that `key` names."""
    if key:
        return f"{key} names it: name a field that every row has, or remove the key"
    advice = f"{_KEYS[kind]}, or convert the file"
    for other, (field, meaning) in _TYPICAL.items():
        if other != kind and field in fields:
            return f"these look like {meaning}; {advice}"
    return advice


def parse_document(row: dict[str, Any], section: SourceSection) -> str:
    """Return the text of a document.

    Raises:
        RowError: the text is missing, empty or not valid.
    """
    return text(row, section.text_field)


def document_tokens(
    row: dict[str, Any], section: SourceSection, tokenizer: ChatTokenizer
) -> np.ndarray:
    """Return the tokens of a document, int32 [n], ending with an end-of-document token.

    A row of an indexed file is tokenized already; an end token is appended if there is none.

    Raises:
        RowError: the text is unusable, or a token is outside the tokenizer's vocabulary.
    """
    if "token_ids" not in row:
        return np.asarray(tokenizer.encode_document(parse_document(row, section)), dtype=np.int32)
    token_ids: np.ndarray = row["token_ids"]
    if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < tokenizer.vocab_size:
        raise RowError(
            "bad_token",
            f"tokens {token_ids.min()} to {token_ids.max()}, but the tokenizer has "
            f"{tokenizer.vocab_size}",
        )
    ended = len(token_ids) and int(token_ids[-1]) in tokenizer.eos_token_ids
    return np.append(token_ids, [] if ended else [tokenizer.eod_token_id]).astype(np.int32)


def check_same_tokenizer(source: Source, tokenizer: ChatTokenizer) -> None:
    """Raise DataError for an indexed file that was written with another tokenizer."""
    for file in source.files:
        if not isinstance(file, IndexedDocuments):
            continue
        fingerprint = file.about.get("tokenizer")
        if fingerprint not in (None, tokenizer.document_fingerprint):
            raise DataError(
                f"{file.path} was tokenized with another tokenizer than {tokenizer.directory}: "
                "set data.tokenizer to that tokenizer, or tokenize the text again."
            )


def parse_conversation(
    row: dict[str, Any], section: SourceSection, system_prompt: str = ""
) -> list[Message]:
    """Return the messages of a conversation up to its last assistant turn.

    Later messages are removed, because they are neither targets nor context of a target. A thought
    beside the messages belongs to the assistant's message (`with_row_thought`).

    Raises:
        RowError: the row has no valid messages, or none of the assistant.
    """
    if section.solution_field:
        solution = text(row, section.solution_field)
        turns: list[Message] = [
            {"role": "user", "content": question(row, section.prompt_field)},
            {"role": "assistant", "content": solution},
        ]
    else:
        turns = messages(row, section.messages_field)
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise RowError("no_trained_tokens", "no assistant message")
    named = (section.prompt_field, section.solution_field, section.messages_field)
    turns = with_row_thought(turns, row, section.reasoning_field, named)
    return _with_system(turns, system_prompt)


def parse_prompt(
    row: dict[str, Any], section: SourceSection, system_prompt: str = ""
) -> tuple[list[Message], str, int | None]:
    """Return the messages, the reference answer and the difficulty of a prompt.

    The difficulty is None unless the row has a finite number in its `difficulty` field.

    Raises:
        RowError: the question or the answer is missing or not valid.
    """
    answer, _ = Labels().read(row, section.answer_field)
    return parse_question(row, section, system_prompt), answer, parse_difficulty(row)


def parse_question(
    row: dict[str, Any], section: SourceSection, system_prompt: str = ""
) -> list[Message]:
    """Return the messages of a prompt. Raises RowError if the question is missing or not valid."""
    if isinstance(decode_messages(find(row, section.prompt_field)), list):
        turns = messages(row, section.prompt_field)
        if turns[-1]["role"] == "assistant":
            raise RowError("bad_role", "a prompt must not end with an assistant message")
    else:
        turns = [{"role": "user", "content": question(row, section.prompt_field)}]
    return _with_system(turns, system_prompt)


def parse_difficulty(row: dict[str, Any]) -> int | None:
    """Return the finite number in the row's field `difficulty`, or None."""
    value = row.get("difficulty")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isinstance(value, int) else int(value) if math.isfinite(value) else None


class Quarantine:
    """Counts unusable rows by source and reason, and lists them in a JSON Lines file.

    A line of the file is {"origin": "data/sft.jsonl:17", "reason": "bad_json", "detail": "..."}. A
    row that an earlier run listed in the same file is not listed again.

    Args:
        max_fraction: largest allowed fraction of unusable rows in a source.
        path: the file; None lists nothing.
    """

    def __init__(self, max_fraction: float, path: Path | None = None) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self._max_fraction = max_fraction
        self._file = JsonLinesWriter(path) if path is not None else None
        self._listed = _listed_origins(path) if path is not None else set()

    def add(self, source: Source, index: int, error: RowError) -> None:
        """Count and list a row.

        Raises:
            DataError: the source has more unusable rows than allowed.
        """
        counts = self.counts.setdefault(str(source.path), Counter())
        counts[error.reason] += 1
        origin = source.origin(index)
        if self._file is not None:
            row = {"origin": origin, "reason": error.reason, "detail": str(error)}
            # Without a row this still writes lines that a full disk refused.
            self._file.append(*([row] if origin not in self._listed else []))
            self._listed.add(origin)
        if counts.total() > self._max_fraction * len(source):
            reasons = ", ".join(f"{number} {reason}" for reason, number in counts.most_common())
            raise DataError(
                f"{source.path}: {counts.total()} of {len(source)} rows are unusable "
                f"({reasons}; the last is {origin}: {error}), more than the allowed fraction of "
                f"{self._max_fraction:g}: fix the rows, or raise data.max_quarantined_fraction "
                "(infir2 tokenize: --max-quarantined-fraction)."
            )

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {source: dict(counts) for source, counts in self.counts.items()}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        self.counts = {source: Counter(counts) for source, counts in state.items()}


def _listed_origins(path: Path) -> set[str]:
    """Return the origins in a quarantine file; remove a partial last line."""
    with disk_errors(f"{path}: cannot be used"):
        if not os.path.lexists(path):  # nor its directory, perhaps: `append` says what is wrong
            return set()
        truncate_torn_line(path)
        rows = read_json_lines(path)
    return {row["origin"] for row in rows if isinstance(row.get("origin"), str)}


def _fields(section: SourceSection, kind: RowKind, labels: Labels) -> list[str]:
    if kind == "documents":
        return [section.text_field]
    if kind == "prompts":
        answer = section.answer_field if labels.are_required else ""
        return [field for field in (section.prompt_field, answer, labels.field) if field]
    turns = (section.prompt_field, section.solution_field)
    required = turns if section.solution_field else (section.messages_field,)
    return [field for field in (*required, section.reasoning_field) if field]


def _with_system(turns: list[Message], system_prompt: str) -> list[Message]:
    if not system_prompt or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system_prompt}, *turns]
