"""Checks of a tokenizer's files before the library reads them.

The library (Rust) trusts its files: an id or a padding of 10^9 asks for that much memory, which
aborts the process; thousands of added tokens take time that grows with their square; and what it
calls impossible is a panic, whose exception is not an `Exception`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infir2.data.tokenizer_speed import check_growth
from infir2.data.types import RowError
from infir2.errors import ConfigError, UserError, first_line
from infir2.files import read_json_object

MAX_ID = 2**24  # the largest vocabularies have 2^18 tokens
MAX_PADDING = 2**20
MAX_ADDED = 10_000
MAX_TEXT = 10_000
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_tokenizer_files(directory: Path) -> None:
    """Raise ConfigError for files that are no JSON objects, or ask for absurd amounts of memory."""
    path = directory / "tokenizer.json"
    content = read_object(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict) and not all(map(_is_id, vocabulary.values())):
        raise ConfigError(
            f"data.tokenizer: {path}: model.vocab has an id that is not below {MAX_ID:,}."
        )
    for key, value in content.items():
        if key != "model":
            _check_sizes(path, key, value, MAX_PADDING if key == "padding" else MAX_ID)
    with library_errors(directory):
        check_growth(content, path)
    for name in _SIDE_FILES:
        if (directory / name).exists():
            for key, value in read_object(directory / name).items():
                _check_added(directory / name, key, value)


@contextlib.contextmanager
def library_errors(directory: Path) -> Iterator[None]:
    """Whatever the tokenizer library raises as a ConfigError, panics included."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ConfigError(
            f"data.tokenizer: {directory} cannot be loaded ({first_line(error)}); "
            "copy the files again."
        ) from error


@contextlib.contextmanager
def panics_are_row_errors() -> Iterator[None]:
    """A panic of the library as RowError: a regular expression may give up on one text only."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        detail = f"the tokenizer gives up on the text ({first_line(error)})"
        raise RowError("tokenizer_failed", detail) from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of at most 64 MiB. Raises ConfigError naming the file."""
    return read_json_object(
        path, lambda problem: ConfigError(f"data.tokenizer: {problem}; copy the files again.")
    )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < MAX_ID


def _check_sizes(path: Path, key: str, value: Any, largest: int) -> None:
    """Refuse an integer above `largest`, long texts and too many tokens, anywhere in `value`."""
    found = [value]
    while found:
        value = found.pop()
        _check_added(path, key, value)
        if isinstance(value, int) and abs(value) > largest:
            raise ConfigError(f"data.tokenizer: {path}: {key} has a number above {largest:,}.")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise ConfigError(
                f"data.tokenizer: {path}: {key} has a text of {len(value):,} characters."
            )
        if isinstance(value, dict):  # a table of characters, which is long
            found += [item for name, item in value.items() if name != "precompiled_charsmap"]
        elif isinstance(value, list):
            found += value


def _check_added(path: Path, key: str, value: Any) -> None:
    if isinstance(value, list | dict) and len(value) > MAX_ADDED:
        raise ConfigError(
            f"data.tokenizer: {path}: {key} has {len(value):,} entries; "
            f"more than {MAX_ADDED:,} added tokens would take minutes to load."
        )
