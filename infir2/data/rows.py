"""What a row must hold for each use, and what becomes of the rows that do not."""

import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infir2.config.schema import SourceSection
from infir2.data.chat import ChatTokenizer
from infir2.data.indexed import IndexedDocuments
from infir2.data.sources import RowError, Source
from infir2.data.types import Message
from infir2.errors import DataError

RowKind = Literal["documents", "messages", "prompts"]
ROLES = ("system", "user", "assistant")


def open_source(section: SourceSection, kind: RowKind) -> Source:
    """Open a source and check that each file has the fields of the kind.

    Raises DataError naming the file, or the missing field and the fields that are there.
    """
    fields = _fields(section, kind)
    source = Source(section.path, {*fields, "difficulty"})
    for file in source.files:
        if isinstance(file, IndexedDocuments) and kind != "documents":
            raise DataError(
                f"{file.path} holds tokens of documents, which only `infir2 cpt` trains on: name a file with {kind}."
            )
        missing = [field for field in fields if file.fields and field not in file.fields]
        if missing == ["messages"]:
            hint = "convert it, or set prompt_field and solution_field of the source"
        else:
            hint = f"set the source's field keys to its names, for {kind}"
        if missing:
            raise DataError(
                f"{file.path} has no field `{missing[0]}` (it has {', '.join(sorted(file.fields))}): {hint}."
            )
    return source


def parse_document(row: dict[str, Any], section: SourceSection) -> str:
    """The text of a document. Raises RowError."""
    return _text(row, section.text_field)


def document_tokens(
    row: dict[str, Any], section: SourceSection, tokenizer: ChatTokenizer
) -> np.ndarray:
    """Tokens int32 [n] of a document with its end: of its text, or those an indexed file holds. Raises RowError."""
    if "token_ids" not in row:
        return np.asarray(tokenizer.encode_document(parse_document(row, section)), dtype=np.int32)
    token_ids: np.ndarray = row["token_ids"]
    if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < tokenizer.vocab_size:
        raise RowError(
            "bad_token",
            f"tokens {token_ids.min()} to {token_ids.max()}, and the tokenizer has {tokenizer.vocab_size}",
        )
    ended = len(token_ids) and int(token_ids[-1]) in tokenizer.eos_token_ids
    return np.append(token_ids, [] if ended else [tokenizer.eod_token_id]).astype(np.int32)


def check_same_tokenizer(source: Source, tokenizer: ChatTokenizer) -> None:
    """Raise DataError for an indexed file that says it was made with another tokenizer."""
    for file in source.files:
        if isinstance(file, IndexedDocuments) and file.about.get("tokenizer") not in (
            None,
            tokenizer.document_fingerprint,
        ):
            where = tokenizer.directory
            raise DataError(
                f"{file.path} was made with another tokenizer than {where}: set data.tokenizer to that one, or tokenise again."
            )


def parse_conversation(
    row: dict[str, Any], section: SourceSection, system_prompt: str = ""
) -> list[Message]:
    """The messages to train on, ending with the last assistant turn: nothing after it is a target. Raises RowError."""
    if section.solution_field:
        question, solution = _text(row, section.prompt_field), _text(row, section.solution_field)
        if section.reasoning_field:
            solution = f"<think>\n{_text(row, section.reasoning_field)}\n</think>\n\n{solution}"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": solution},
        ]
    else:
        messages = _messages(row, "messages")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise RowError("no_trained_tokens", "no assistant message")
    return _with_system(messages, system_prompt)


def parse_prompt(
    row: dict[str, Any], section: SourceSection, system_prompt: str = ""
) -> tuple[list[Message], str, int | None]:
    """Messages, reference answer and difficulty (None if the row has no number there) of a prompt. Raises RowError."""
    if isinstance(row.get(section.prompt_field), list):
        messages = _messages(row, section.prompt_field)
        if messages[-1]["role"] == "assistant":
            raise RowError("bad_role", "a prompt must not end with an assistant message")
    else:
        messages = [{"role": "user", "content": _text(row, section.prompt_field)}]
    answer = _present(row, section.answer_field)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RowError("bad_field", f"`{section.answer_field}` is neither text nor a number")
    if not str(answer).strip():
        raise RowError("empty", f"`{section.answer_field}` is empty")
    difficulty = row.get("difficulty")
    known = isinstance(difficulty, int | float) and not isinstance(difficulty, bool)
    return _with_system(messages, system_prompt), str(answer), int(difficulty) if known else None  # type: ignore[arg-type]


class Quarantine:
    """Counts unusable rows by source and reason, lists them in a file, and stops above a share of a source's rows.

    Each line of the file: {"origin": "data/sft.jsonl:17", "reason": "bad_json", "detail": ...}. A row listed by an
    earlier run into the same file is not listed again.
    """

    def __init__(self, max_fraction: float, path: Path | None = None) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self._max_fraction, self._path = max_fraction, path
        self._listed = _listed(path) if path is not None and path.exists() else set()

    def add(self, source: Source, index: int, error: RowError) -> None:
        """Count a row. Raises DataError when the source now has more unusable rows than allowed."""
        counts = self.counts.setdefault(str(source.path), Counter())
        counts[error.reason] += 1
        origin = source.origin(index)
        if self._path is not None and origin not in self._listed:
            self._listed.add(origin)
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(
                        json.dumps({"origin": origin, "reason": error.reason, "detail": str(error)})
                        + "\n"
                    )
            except OSError:  # a full disk does not end a run here: the row is counted, and listed when it is met again
                self._listed.discard(origin)
        if counts.total() > self._max_fraction * len(source):
            reasons = ", ".join(f"{number} {reason}" for reason, number in counts.most_common())
            raise DataError(
                f"{source.path}: {counts.total()} of {len(source)} rows are unusable ({reasons}; the last is {origin}: {error}), more than "
                f"the allowed share of {self._max_fraction:g}: mend the rows, or raise data.max_quarantined_fraction."
            )

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {source: dict(counts) for source, counts in self.counts.items()}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        self.counts = {source: Counter(counts) for source, counts in state.items()}


def _listed(path: Path) -> set[str]:
    """Origins that a quarantine file names. A last line cut by a kill is cut off, a damaged one lists nothing."""
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
    found = set()
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found.add(json.loads(line)["origin"])
    return found


def _fields(section: SourceSection, kind: RowKind) -> list[str]:
    if kind == "documents":
        return [section.text_field]
    if kind == "prompts":
        return [section.prompt_field, section.answer_field]
    fields = (section.prompt_field, section.solution_field, section.reasoning_field)
    return [field for field in fields if field] if section.solution_field else ["messages"]


def _present(row: dict[str, Any], field: str) -> Any:
    if field not in row:
        raise RowError("missing_field", f"no field `{field}`")
    if row[field] is None:
        raise RowError("null_field", f"`{field}` is null")
    return row[field]


def _text(row: dict[str, Any], field: str) -> str:
    value = _present(row, field)
    if not isinstance(value, str):
        raise RowError("bad_field", f"`{field}` is not a text")
    return _clean(value, field)


def _clean(text: str, field: str) -> str:
    if not text.strip():
        raise RowError("empty", f"`{field}` is empty")
    if "\0" in text:
        raise RowError("nul_byte", f"`{field}` holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("bad_utf8", f"`{field}` holds half of a surrogate pair") from None
    return text


def _messages(row: dict[str, Any], field: str) -> list[Message]:
    value = _present(row, field)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RowError("bad_field", f"`{field}` is not a list of messages")
    if not value:
        raise RowError("empty", f"`{field}` is an empty list")
    messages = []
    for message in value:
        role = _present(message, "role")
        if role not in ROLES:
            raise RowError("bad_role", f"role {role!r} is not one of {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise RowError("bad_field", "tool calls cannot be trained on")
        content = _text(message, "content")
        if thought := message.get("reasoning_content"):  # some data sets keep the thought apart
            content = f"<think>\n{_clean(str(thought), 'reasoning_content')}\n</think>\n\n{content}"
        messages.append({"role": role, "content": content})
    return messages


def _with_system(messages: list[Message], system_prompt: str) -> list[Message]:
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
