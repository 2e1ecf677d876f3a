"""Random access to the rows of JSON Lines, Parquet, text and indexed token files.

A .jsonl file is memory-mapped, with one byte offset per line. A .jsonl.gz file is decompressed into
a temporary file, and the requested columns of a .parquet file are written as Arrow into one; the
temporary file is memory-mapped. A .txt file is one row.
"""

import bisect
import contextlib
import gzip
import itertools
import json
import re
import tempfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from infir2.data.indexed import IndexedDocuments, is_indexed
from infir2.errors import DataError, first_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".idx")
FIRST_ROWS = 20  # rows from which the fields of a .jsonl file are known
CHUNK_BYTES = 1 << 26
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.]|$)", re.IGNORECASE)
GZIP_MAGIC = b"\x1f\x8b"


class RowError(Exception):
    """A row that cannot be used, with the reason to count, such as "bad_json", and a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Rows(Protocol):
    """The rows of one file."""

    path: Path
    num_bytes: int  # of the uncompressed rows
    fields: frozenset[str]  # field names in the first rows or in the schema; empty if unknown

    def __len__(self) -> int: ...

    def read(self, index: int) -> dict[str, Any]:
        """Return one row as {field: value}. Raises RowError for an unusable row."""
        ...


class JsonLines:
    """Lines of a .jsonl or .jsonl.gz file.

    Blank lines at the end are ignored; any other blank line is an unusable row.

    Raises:
        DataError: the file is empty, binary or not a complete gzip file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty: add rows, or remove it from the sources.")
        self._bytes = np.memmap(
            _decompress(path) if path.suffix == ".gz" else path, dtype=np.uint8, mode="r"
        )
        self.num_bytes = len(self._bytes)
        head = self._bytes[:4096].tobytes()
        if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and (
            b"\0" in head or head.startswith(GZIP_MAGIC)
        ):
            raise DataError(
                f"{path} is not JSON Lines but a binary file: a compressed file must be named "
                ".jsonl.gz."
            )
        self._starts = self._find_lines()
        self.fields = self._first_fields()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, index: int) -> dict[str, Any]:
        line = self._bytes[self._starts[index] : self._starts[index + 1]].tobytes()
        if not line.strip():
            raise RowError("empty", "a blank line")
        if b"\0" in line:
            raise RowError("nul_byte", "a NUL byte in the line")
        try:
            row = json.loads(line.decode("utf-8-sig" if index == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            raise RowError("bad_utf8", f"byte {error.start} of the line is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise RowError("bad_json", f"not a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise RowError("bad_json", f"a JSON {type(row).__name__} instead of an object")
        return row

    def _first_fields(self) -> frozenset[str]:
        fields: set[str] = set()
        for index in range(min(FIRST_ROWS, len(self))):
            with contextlib.suppress(RowError):
                fields |= self.read(index).keys()
        return frozenset(fields)

    def _find_lines(self) -> np.ndarray:
        """Return the byte offset of each line, then the end of the last line that is not blank."""
        parts = [np.zeros(1, dtype=np.int64)]
        for first in range(0, self.num_bytes, CHUNK_BYTES):
            parts.append(
                np.flatnonzero(self._bytes[first : first + CHUNK_BYTES] == ord("\n")) + first + 1
            )
        starts = np.concatenate(parts)
        if starts[-1] != self.num_bytes:
            starts = np.append(starts, self.num_bytes)
        last = len(starts) - 1
        while last and not self._bytes[starts[last - 1] : starts[last]].tobytes().strip():
            last -= 1
        if not last:
            raise DataError(
                f"{self.path} has only blank lines: add rows, or remove it from the sources."
            )
        return starts[: last + 1]


class ParquetRows:
    """Rows of a .parquet file.

    Only `columns` are read, or all columns if the file has none of them.

    Raises:
        DataError: the file is not readable as Parquet or has no row.
    """

    def __init__(self, path: Path, columns: Collection[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            with (
                pq.ParquetFile(path) as parquet,
                tempfile.NamedTemporaryFile(prefix="infir2-", suffix=".arrow") as file,
            ):
                self.fields = frozenset(parquet.schema_arrow.names)
                names = [
                    name for name in parquet.schema_arrow.names if name in columns
                ] or parquet.schema_arrow.names
                schema = pa.schema(
                    [_without_dictionary(parquet.schema_arrow.field(name)) for name in names]
                )
                with pa.ipc.new_file(file, schema) as writer:
                    for batch in parquet.iter_batches(columns=names):
                        writer.write_batch(batch.select(names).cast(schema))
                file.flush()
                # `infir2 tokenize` reads in forked processes, which have none of Arrow's threads.
                options = pa.ipc.IpcReadOptions(use_threads=False)
                # The mapping stays valid after the temporary file is deleted.
                self._batches = pa.ipc.open_file(pa.memory_map(file.name), options=options)
                self.num_bytes = Path(file.name).stat().st_size
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} cannot be read as Parquet ({first_line(error)}): "
                "write it again, or remove it from the sources."
            ) from None
        sizes = [
            self._batches.get_batch(index).num_rows
            for index in range(self._batches.num_record_batches)
        ]
        self._ends = list(itertools.accumulate(sizes))
        if not sum(sizes):
            raise DataError(f"{path} has no row: add rows, or remove it from the sources.")

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> dict[str, Any]:
        batch = bisect.bisect_right(self._ends, index)
        first = self._ends[batch - 1] if batch else 0
        try:
            return self._batches.get_batch(batch).slice(index - first, 1).to_pylist()[0]
        except UnicodeDecodeError:
            raise RowError("bad_utf8", "a string of the row is not UTF-8") from None


class TextFile:
    """A .txt file: one row, {"text": its content}."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes, self.fields = path, path.stat().st_size, frozenset({"text"})
        if not self.num_bytes:
            raise DataError(f"{path} is empty: add rows, or remove it from the sources.")

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> dict[str, Any]:
        try:
            return {"text": self.path.read_text(encoding="utf-8-sig")}
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
        self.files: list[Rows] = [_open_file(file, columns) for file in _files(self.path, columns)]
        self._ends = list(itertools.accumulate(len(file) for file in self.files))

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
        """Return the file of a row, and its line number, counted from 1."""
        file, first = self._locate(index)
        return file.path, index - first + 1

    def origin(self, index: int) -> str:
        """Return "file:line" of a row."""
        path, line = self.location(index)
        return f"{path}:{line}"

    def _locate(self, index: int) -> tuple[Rows, int]:
        number = bisect.bisect_right(self._ends, index)
        return self.files[number], self._ends[number - 1] if number else 0


def _files(path: Path, columns: Collection[str]) -> list[Path]:
    if path.is_file() or is_indexed(path):
        return [path]
    if not path.exists():
        raise DataError(f"data source {path} does not exist: fix the path in the recipe.")
    # A .txt file next to other data files is usually a license or a readme: skip it.
    for suffixes in (SUFFIXES, (".txt",) if "text" in columns else ()):
        files = sorted(
            file
            for file in path.rglob("*")
            if file.name.endswith(suffixes) and file.is_file() and not _is_ignored(file)
        )
        if files:
            _check_read_once(path, files)
            return files
    raise DataError(
        f"directory {path} has no {', '.join(SUFFIXES)} file: fix the path in the recipe."
    )


def _is_ignored(file: Path) -> bool:
    """Whether a file is hidden (as the "._" files of macOS are) or lists unusable rows."""
    return file.name.startswith(".") or f".{file.name}".endswith(".quarantine.jsonl")


def _check_read_once(directory: Path, files: list[Path]) -> None:
    """Raise DataError for files with the same rows, or of several splits."""
    stems: dict[Path, Path] = {}
    splits: dict[str, Path] = {}
    for file in files:
        suffix = next(end for end in (*SUFFIXES, ".txt") if file.name.endswith(end))
        name = file.name.removesuffix(suffix)
        name = name.removesuffix("_text_document") if suffix == ".idx" else name
        other = stems.setdefault(file.with_name(name), file)
        if other is not file and suffix != ".txt":
            raise DataError(
                f"{other} and {file} seem to contain the same rows: name one of them as the source."
            )
        for part in file.relative_to(directory).parts:
            if match := SPLIT.match(part):
                splits.setdefault(match[1].lower(), file)
    if "train" in splits and len(splits) > 1:
        held_out = next(file for split, file in splits.items() if split != "train")
        raise DataError(
            f"{directory} contains a training split and another ({splits['train']}, {held_out}): "
            "name the files or a directory of one split as sources."
        )


def _open_file(path: Path, columns: Collection[str]) -> Rows:
    try:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            return JsonLines(path)
        if path.suffix == ".parquet":
            return ParquetRows(path, columns)
        if is_indexed(path):
            return IndexedDocuments(path)
        if path.suffix == ".txt":
            return TextFile(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): "
            "fix the file, or the path in the recipe."
        ) from None
    raise DataError(
        f"{path} has an unknown file type: a source is a {', '.join((*SUFFIXES, '.txt'))} file "
        "or a directory of such files."
    )


def _decompress(path: Path) -> Any:
    """Return an open temporary file with the content of a .gz file; closing it deletes it."""
    file = tempfile.TemporaryFile(prefix="infir2-")  # noqa: SIM115 (the memory map keeps it open)
    try:
        with gzip.open(path) as packed:
            while chunk := packed.read(CHUNK_BYTES):
                file.write(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not a complete gzip file ({first_line(error)}): copy or compress it again."
        ) from None
    if not file.tell():
        raise DataError(f"{path} is empty: add rows, or remove it from the sources.")
    file.flush()
    return file


def _without_dictionary(field: Any) -> Any:
    """Return an Arrow field with plain values: an Arrow file allows one dictionary per column."""
    return field.with_type(field.type.value_type) if hasattr(field.type, "index_type") else field
