"""A user's files of a benchmark: find them, check every row, and copy them for evalscope."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from infir2.data.sources import JSON_SUFFIXES, METADATA, SPLIT, Source
from infir2.data.types import RowError
from infir2.errors import DataError, disk_reason, first_line
from infir2.evaluate.benchmarks import BENCHMARKS, Benchmark, Row, plain_word
from infir2.files import read_regular

SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".csv")
MAX_CSV_BYTES = 1 << 30
Window = tuple[datetime, datetime]


@dataclass(frozen=True)
class Copied:
    """What was copied: the questions in evalscope's order, the files they are from, a SHA-256."""

    benchmark: Benchmark
    directory: Path
    questions: tuple[str, ...]
    files: tuple[Path, ...]
    fingerprint: str


def copy_benchmark(
    benchmark: Benchmark, data: Path, to: Path, window: Window | None = None, alone: bool = False
) -> Copied:
    """Copy the benchmark's questions from `data`, a file or a directory, into the directory `to`.

    A question that several files repeat is copied once. `window` keeps the questions of contests
    from its first to its last moment. `alone`: no other benchmark is in `data`, whatever the names.

    Raises:
        DataError: there are no such files or questions, or a row is not usable.
    """
    files = find_files(benchmark, data, alone)
    rows = list(_in_window(_rows(benchmark, files), window))
    if not rows:
        span = f" between {window[0]:%Y-%m-%d} and {window[1]:%Y-%m-%d}" if window else ""
        raise DataError(
            f"{data} has no question of {benchmark.name}{span}: name files that have some."
        )
    to.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    if benchmark.file.endswith(".parquet"):
        _write_parquet(to / benchmark.file, rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (to / benchmark.file).write_text(text, encoding="utf-8")
    if benchmark.card:
        (to / "README.md").write_text(benchmark.card)
    questions = tuple(row[benchmark.key] for row in rows)
    return Copied(benchmark, to, questions, tuple(files), digest.hexdigest())


def find_files(benchmark: Benchmark, data: Path, alone: bool = False) -> list[Path]:
    """The files of a benchmark in `data`, by their names and those of their directories.

    Raises DataError with the names that are there.
    """
    try:
        if data.is_dir():
            return _find_in_directory(benchmark, data, alone)
        if data.exists():
            return [data]
        parent = next(each for each in data.absolute().parents if each.is_dir())
        there = _listed(parent)
    except OSError as error:
        raise DataError(f"{data} cannot be read ({disk_reason(error)}).") from None
    raise DataError(f"--data: {data} does not exist; {parent} has {there}.")


def find_data_files(data: Path) -> list[Path]:
    """All data files at or below a path, whatever their names. Raises DataError without one."""
    found = _data_files(data) if data.exists() else []
    if not found:
        raise DataError(
            f"--data: {data} does not exist, or has no data files; name a file or directory of "
            "questions."
        )
    return found


def _find_in_directory(benchmark: Benchmark, data: Path, alone: bool) -> list[Path]:
    for word in benchmark.words:
        named = sorted(each for each in data.iterdir() if plain_word(_stem(each)) == word)
        found = [file for each in named for file in _data_files(each)]
        if found:
            return _preferred(benchmark, found)
    near = sorted(each for each in data.iterdir() if _is_named(benchmark, each))
    near = [each for each in near if _data_files(each)]
    if len(near) > 1 and not _is_one_set(near):
        raise DataError(
            f"--data: {data} has several that may be {benchmark.name} "
            f"({', '.join(each.name for each in near)}): name one of them."
        )
    found = [file for each in near for file in _data_files(each)]
    foreign = [each for each in data.iterdir() if _is_of_another(benchmark, each)]
    if not found and (alone or _is_named(benchmark, data.absolute())) and not foreign:
        found = _data_files(data)
    if found:
        return _preferred(benchmark, found)
    raise DataError(f"--data: {data} has no data of {benchmark.name}; it has {_listed(data)}.")


def _is_one_set(paths: Sequence[Path]) -> bool:
    """Whether all are files, such as the configurations or formats of one data set."""
    return all(path.is_file() for path in paths)


def _is_named(benchmark: Benchmark, path: Path) -> bool:
    return any(word in plain_word(_stem(path)) for word in benchmark.words)


def _is_of_another(benchmark: Benchmark, path: Path) -> bool:
    others = (each for each in BENCHMARKS.values() if each is not benchmark)
    return any(_is_named(other, path) for other in others)


def _stem(path: Path) -> str:
    """The name without the ending of a data file."""
    name = path.name.lower()
    suffix = next((end for end in SUFFIXES if name.endswith(end)), "")
    return name[: len(name) - len(suffix)]


def _data_files(path: Path) -> list[Path]:
    """The data files at or below a path; of several splits only the test split."""
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [
        file
        for file in found
        if file.name.lower().endswith(SUFFIXES)
        and not METADATA.fullmatch(file.name)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    splits = {file: _split(file, path) for file in files}
    tested = [file for file in files if splits[file] == "test"]
    return tested or files


def _split(file: Path, root: Path) -> str:
    """The split that the file's name or a directory's says; LiveCodeBench numbers test2, test3."""
    for part in (file.name, *file.relative_to(root).parts[:-1]):
        if match := SPLIT.search(part.lower().rstrip("0123456789")) or SPLIT.search(part):
            return match[1].lower()
        if _stem(Path(part)).rstrip("0123456789") == "test":
            return "test"
    return ""


def _preferred(benchmark: Benchmark, files: list[Path]) -> list[Path]:
    """The files of the configuration that is this benchmark, if names tell."""
    for word in benchmark.prefer:
        chosen = [file for file in files if word in plain_word("".join(file.parts[-3:]))]
        if chosen:
            return chosen
    return files


def _listed(directory: Path) -> str:
    names = sorted(each.name for each in directory.iterdir() if not each.name.startswith("."))
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


def _rows(benchmark: Benchmark, files: Sequence[Path]) -> Iterator[Row]:
    """The converted rows of all files, each question once. Raises DataError."""
    seen: dict[str, tuple[str, Row]] = {}
    for file in files:
        for origin, row in read_rows(file):
            try:
                converted = benchmark.convert(row)
            except RowError as error:
                raise DataError(f"{origin} {error}: {benchmark.name} needs it.") from None
            question = " ".join(converted[benchmark.key].split())
            first, known = seen.setdefault(question, (origin, converted))
            if known is converted:
                yield converted
            elif _plain_answer(known) != _plain_answer(converted):
                raise DataError(
                    f"{first} and {origin} have the same question with different answers: "
                    "name one of the files as --data."
                )


def _plain_answer(row: Row) -> str:
    """The answer without the leading zeros that a file may have as text and another not."""
    answer = str(row.get("answer")).strip()
    return answer.lstrip("0") or "0" if answer.isdigit() else answer


def read_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """("file:line", row) of each row. Raises DataError."""
    if file.name.lower().endswith(".csv"):
        yield from _read_csv(file)
        return
    source = Source(file)
    for index in range(len(source)):
        try:
            yield source.origin(index), source.read(index)
        except RowError as error:
            raise DataError(f"{source.origin(index)}: {error}; fix the row.") from None


def _read_csv(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        text = read_regular(file, MAX_CSV_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}: convert it.") from None
    csv.field_size_limit(MAX_CSV_BYTES)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{file}:{reader.line_num} has another number of fields than its header."
                )
            yield f"{file}:{reader.line_num}", dict(row)
    except csv.Error as error:
        line = reader.line_num + 1
        raise DataError(f"{file}:{line} is not CSV ({first_line(error)}).") from None


def _in_window(rows: Iterator[Row], window: Window | None) -> Iterator[Row]:
    for row in rows:
        if not window or window[0] <= datetime.fromisoformat(row["contest_date"]) <= window[1]:
            yield row


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One row at a time: together, decoded tests may be larger than an Arrow array of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in rows[0]])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for row in rows:
            writer.write_table(pa.Table.from_pylist([row], schema))
