"""The rows of a source: one file, or the files of a directory.

Files are .jsonl, .ndjson or .json (also .gz or .zst), .parquet, .txt or indexed tokens, in lower or
upper case.
"""

import bisect
import itertools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from infir2.data.indexed import IndexedDocuments, is_indexed
from infir2.data.json_rows import JsonRows, check_is_utf8
from infir2.data.parquet import ParquetConverter, ParquetRows
from infir2.data.types import RowError, Rows
from infir2.errors import DataError
from infir2.files import open_regular, read_regular, require_regular

JSON_SUFFIXES = tuple(
    end + packed for packed in (".gz", ".zst", "") for end in (".jsonl", ".ndjson", ".json")
)
SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".idx")
METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|(.+_)?config|tokenizer|vocab|added_tokens"
    r"|special_tokens_map|.+\.index)\.json",
    re.IGNORECASE,
)
SPLIT = re.compile(
    r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?=[-_.]|$)", re.IGNORECASE
)
_HUB = re.compile(r"(?:(?:https?:/+huggingface\.co/|hf:/+)datasets/)?([\w-][\w.-]*/[\w.-]+)/?")
MAX_TEXT_BYTES = 1 << 30


class TextFile:
    """A .txt file: one row, {"text": its content}; a blank file has no row."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes, self.fields = path, require_regular(path), frozenset({"text"})
        with open_regular(path, MAX_TEXT_BYTES) as file:
            head = file.read(4096)
        check_is_utf8(path, head)
        self._num_rows = int(self.num_bytes > len(head) or bool(head.strip()))

    def __len__(self) -> int:
        return self._num_rows

    def number(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> dict[str, Any]:
        try:
            return {"text": read_regular(self.path, MAX_TEXT_BYTES).decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise RowError("bad_utf8", f"byte {error.start} of the file is not UTF-8") from None


class Source:
    """All rows of a source: one file, or the files of a directory in the order of their names.

    Args:
        path: file, directory, or prefix of an indexed data set.
        columns: fields to read from Parquet files.

    Raises:
        DataError: the path does not exist, or a file cannot be read.
    """

    def __init__(self, path: str | Path, columns: Collection[str] = ()) -> None:
        self.path = Path(path)
        with ParquetConverter() as converter:
            self.files = [_open(file, columns, converter) for file in _find(self.path, columns)]
        self._ends = list(itertools.accumulate(len(file) for file in self.files))
        if not len(self):
            raise DataError(f"{path} has no row: add rows, or remove it from the sources.")

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the uncompressed rows of all files."""
        return sum(file.num_bytes for file in self.files)

    def read(self, index: int) -> dict[str, Any]:
        """Return row `index`, counted over all files. Raises RowError for an unusable row."""
        file, first = self._locate(index)
        return file.read(index - first)

    def location(self, index: int) -> tuple[Path, int]:
        """Return the file of a row, and its line, or its number in a file without lines."""
        file, first = self._locate(index)
        return file.path, file.number(index - first)

    def origin(self, index: int) -> str:
        """Return "file:line" of a row."""
        path, line = self.location(index)
        return f"{path}:{line}"

    def _locate(self, index: int) -> tuple[Rows, int]:
        number = bisect.bisect_right(self._ends, index)
        return self.files[number], self._ends[number - 1] if number else 0


def _find(path: Path, columns: Collection[str]) -> list[Path]:
    """Return the files of a source. Raises DataError."""
    try:
        if is_indexed(path):
            return [path]
        if not path.exists():
            raise DataError(f"data source {path} does not exist: {missing_advice(path)}.")
        return _find_in_directory(path, columns) if path.is_dir() else [path]
    except OSError as error:
        raise _unreadable(path, error) from None


def missing_advice(path: Path) -> str:
    """What to do about a path that does not exist; users of other stacks write names of the hub."""
    hub = _HUB.fullmatch(str(path))
    is_file = path.name.lower().endswith((*SUFFIXES, ".txt", ".bin"))
    if not hub or is_file or Path(hub[1].split("/")[0]).exists():
        return "name a file or a directory with data"
    return (
        "infir2 downloads nothing; if it is a data set of the hub, hf download --repo-type "
        f"dataset {hub[1]} --local-dir DIR, then name DIR or a file in it"
    )


def _find_in_directory(directory: Path, columns: Collection[str]) -> list[Path]:
    found = [
        file
        for file in sorted(directory.rglob("*"))
        if not _is_ignored(directory, file) and not file.is_dir()
    ]
    # A .txt file next to other data files is usually a license or a readme: skip it.
    for suffixes in (SUFFIXES, (".txt",) if "text" in columns else ()):
        files = [file for file in found if file.name.lower().endswith(suffixes)]
        if files:
            _check_read_once(directory, files)
            return files
    raise DataError(
        f"directory {directory} has no .jsonl, .json, .parquet or .idx file: fix the path."
    )


def _is_ignored(directory: Path, file: Path) -> bool:
    """Whether a file is hidden, as macOS's "._" files are, lists unusable rows or has no rows."""
    hidden = any(part.startswith(".") for part in file.relative_to(directory).parts)
    no_rows = METADATA.fullmatch(file.name) or (
        file.name.endswith(".json") and file.with_suffix(".idx").exists()  # PREFIX.json
    )
    return hidden or bool(no_rows) or f".{file.name}".endswith(".quarantine.jsonl")


def _check_read_once(directory: Path, files: list[Path]) -> None:
    """Raise DataError for files with the same rows, or of several splits."""
    stems: dict[Path, Path] = {}
    splits: dict[str, Path] = {}
    for file in files:
        other = stems.setdefault(_stem(file), file)
        if other is not file:
            raise DataError(
                f"{other} and {file} seem to contain the same rows: name one of them as the source."
            )
        for part in file.relative_to(directory).parts:
            if match := SPLIT.search(part):
                splits.setdefault(match[1].lower(), file)
    if "train" in splits and len(splits) > 1:
        held_out = next(file for split, file in splits.items() if split != "train")
        raise DataError(
            f"{directory} contains a training split and another ({splits['train']}, {held_out}): "
            "name the files or a directory of one split as sources."
        )


def _stem(file: Path) -> Path:
    """The path that two formats of the same rows have in common."""
    suffix = next(end for end in (*SUFFIXES, ".txt") if file.name.lower().endswith(end))
    name = file.name[: -len(suffix)]
    return file.with_name(name.removesuffix("_text_document") if suffix == ".idx" else name)


def _open(path: Path, columns: Collection[str], converter: ParquetConverter) -> Rows:
    name = path.name.lower()
    try:
        if name.endswith(JSON_SUFFIXES):
            return JsonRows(path)
        if name.endswith(".parquet"):
            return ParquetRows(path, columns, converter)
        if is_indexed(path) or name.endswith((".idx", ".bin")):
            return IndexedDocuments(path)
        if name.endswith(".txt"):
            return TextFile(path)
        require_regular(path)
    except OSError as error:  # of an indexed data set, one of two files
        raise _unreadable(Path(str(error.filename or path)), error) from None
    if name.endswith((".csv", ".tsv", ".xlsx")):
        raise DataError(
            f"{path} is a table, which is not read: write it as .jsonl or .parquet, such as by "
            "pandas.read_csv(FILE).to_json(FILE, orient='records', lines=True)."
        )
    raise DataError(
        f"{path} has an unknown file type: a source is a .jsonl, .ndjson or .json file (also .gz "
        "or .zst), a .parquet, .txt or .idx file, or a directory of such files."
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read ({error.strerror or error}): fix the file, or the path."
    )
