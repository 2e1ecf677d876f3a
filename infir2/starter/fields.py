"""What kind of rows a source has, and under which names, found from its first usable row."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infir2.config.schema import SourceSection
from infir2.data.indexed import is_indexed
from infir2.data.messages import decode_messages, find
from infir2.data.rows import RowKind
from infir2.data.sources import Source, missing_advice
from infir2.data.types import RowError
from infir2.errors import DataError

# Names in the order in which they are looked for.
MESSAGES = ("messages", "conversations", "conversation", "dialog")
QUESTIONS = ("prompt", "problem", "question", "instruction", "query")
ANSWERS = ("label", "answer", "final_answer", "ground_truth", "reward_model.ground_truth")
SOLUTIONS = ("solution", "response", "completion", "output", "generated_solution")
TEXTS = ("text", "content", "document")
_TRIED_ROWS = 20
KIND_OF_TASK: dict[str, RowKind] = {"cpt": "documents", "sft": "messages", "rl": "prompts"}


def detect(path: Path, kind: RowKind | None = None) -> tuple[RowKind, SourceSection]:
    """The kind of a source's rows and a section that names its fields.

    Args:
        path: as in `data.sources`.
        kind: what the rows should be; None to find out.

    Raises:
        DataError: the source cannot be read, or its rows are none of the kind.
    """
    _require(path)
    row = _first_row(Source(path))
    for candidate in (kind,) if kind else ("messages", "prompts", "documents"):
        assert candidate is not None
        fields = _fields(row, candidate, asked=kind is not None)
        if fields is not None:
            return candidate, SourceSection.model_validate({"path": str(path), **fields})
    wanted = {
        "messages": f"conversations ({_listed(MESSAGES)}, or a question and {_listed(SOLUTIONS)})",
        "prompts": f"prompts with answers ({_listed(QUESTIONS)}; {_listed(ANSWERS)})",
        "documents": f"documents ({_listed(TEXTS)})",
    }
    kinds = wanted[kind] if kind else "; ".join(wanted.values())
    raise DataError(
        f"{path}: its rows have the fields {', '.join(sorted(row))}, and none of those of {kinds}; "
        "rename a field, or name it in the recipe with the source's ..._field keys."
    )


def asks_for_answer_line(section: SourceSection) -> bool:
    """Whether the first prompt of a source wants a last line `Answer: ...` and no box."""
    prompt = str(find(_first_row(Source(Path(section.path))), section.prompt_field))
    return "Answer:" in prompt and "boxed" not in prompt


def _require(path: Path) -> None:
    """Raise DataError for a path that does not exist."""
    if path.exists() or is_indexed(path):
        return
    raise DataError(f"{path} does not exist; {missing_advice(path)}.")


def _first_row(source: Source) -> dict[str, Any]:
    error: RowError | None = None
    for index in range(min(_TRIED_ROWS, len(source))):
        try:
            return source.read(index)
        except RowError as caught:
            error = caught
    raise DataError(f"{source.path}: its first rows are unusable ({error}); fix the file.")


def _fields(row: dict[str, Any], kind: RowKind, asked: bool) -> dict[str, str] | None:
    """The ..._field keys for rows of this kind; None if the row has no such fields.

    `asked`: the rows should be of this kind, so that an answer may be what to train on.
    """
    if kind == "documents":
        found = "text" if "token_ids" in row else _first(row, TEXTS)
        return {"text_field": found} if found else None
    question = _first(row, QUESTIONS)
    if kind == "prompts":
        answer = _first(row, ANSWERS)
        return {"prompt_field": question, "answer_field": answer} if question and answer else None
    for name in MESSAGES:
        if isinstance(decode_messages(row.get(name)), list):
            return {"messages_field": name}
    solution = _first(row, SOLUTIONS + ANSWERS if asked else SOLUTIONS)
    return {"prompt_field": question, "solution_field": solution} if question and solution else None


def _first(row: dict[str, Any], names: Sequence[str]) -> str:
    return next((name for name in names if _has(row, name)), "")


def _has(row: dict[str, Any], name: str) -> bool:
    try:
        return find(row, name) != ""
    except RowError:
        return False


def _listed(names: Sequence[str]) -> str:
    return " or ".join(itertools.islice(names, 3))
