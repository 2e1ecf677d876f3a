"""Random access to the rows of JSON text: lines, one array, or pretty-printed objects.

The file is memory-mapped, with the byte offsets of each row; a compressed file is first
decompressed into a temporary file. A row is parsed when it is read.
"""

import contextlib
import json
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infir2.data.decompress import decompress
from infir2.data.types import MAX_ROW_BYTES, RowError
from infir2.errors import DataError
from infir2.files import require_regular

FIRST_ROWS = 20  # rows from which the fields of a file are known
CHUNK_BYTES = 1 << 24
STRUCTURE_BYTES = 1 << 21  # smaller: it needs several integers per byte
BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(rb"(?:[ \t\r\n]|\xef\xbb\xbf)*+")
_ESCAPE = re.compile(rb"\\*+.", re.DOTALL)
_DEPTH = np.zeros(256, np.int64)  # byte -> change of the depth
_DEPTH[list(b"[{")], _DEPTH[list(b"]}")] = 1, -1
_IS_INDENT = np.isin(np.arange(256), list(b" \t\xef"))
_IS_MARK = np.isin(np.arange(256), list(b"[]{},"))
_UTF32 = re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff|(?:\0{3}[\t\n\r -~]){2}|(?:[\t\n\r -~]\0{3}){2}")
_UTF16 = re.compile(rb"\xff\xfe|\xfe\xff|(?:\0[\t\n\r -~]){2}|(?:[\t\n\r -~]\0){2}")
_BINARY = re.compile(rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ\0|PK\x03\x04|PAR1|.*\0", re.DOTALL)


class _Spans(NamedTuple):
    """Where the rows are: byte offsets [R] of their first byte and after their last one.

    `numbers` [R] are their lines, or their numbers in the array, from 1.
    """

    starts: np.ndarray
    ends: np.ndarray
    numbers: Sequence[int] | np.ndarray


class JsonRows:
    """The rows of a .jsonl, .ndjson or .json file, which may be compressed (.gz, .zst).

    Rows are the objects of one array, or one object per line, or pretty-printed objects. A line
    ends with LF, CR LF or CR; blank lines are no rows. A byte order mark may begin any row.

    Raises:
        DataError: the file is not UTF-8 text, or not a complete compressed file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = require_regular(path)
        self._bytes = np.zeros(0, np.uint8)
        if path.suffix.lower() in (".gz", ".zst"):
            with decompress(path) as file:  # the mapping stays valid
                if file.tell():
                    self._bytes = np.memmap(file, dtype=np.uint8, mode="r")
        elif size:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self.num_bytes, self._bytes_read = len(self._bytes), 0
        check_is_utf8(path, self._bytes[:4096].tobytes())
        self._spans = _find_rows(self._bytes)
        self.fields = self._first_fields()

    def __len__(self) -> int:
        return len(self._spans.starts)

    def number(self, index: int) -> int:
        return int(self._spans.numbers[index])

    def read(self, index: int) -> dict[str, Any]:
        start, end = int(self._spans.starts[index]), int(self._spans.ends[index])
        if end - start > MAX_ROW_BYTES:
            raise RowError("too_large", f"{end - start:,} bytes, more than {MAX_ROW_BYTES:,}")
        text = self._bytes[start:end].tobytes()
        self._bytes_read += end - start
        if self._bytes_read > MAX_ROW_BYTES:
            _release(self._bytes)
            self._bytes_read = 0
        if b"\0" in text:
            raise RowError("nul_byte", "a NUL byte in the row")
        try:
            row = json.loads(text.strip().removeprefix(BOM).decode())
        except UnicodeDecodeError as error:
            raise RowError("bad_utf8", f"byte {error.start} of the row is not UTF-8") from None
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


def check_is_utf8(path: Path, head: bytes) -> None:
    """Raise DataError if a file of text begins as UTF-16, UTF-32 or as binary data."""
    for pattern, name in ((_UTF32, "UTF-32"), (_UTF16, "UTF-16")):
        if pattern.match(head):
            raise DataError(
                f"{path} is {name} text: convert it to UTF-8, such as with iconv -f {name} -t "
                "UTF-8."
            )
    text = head[_blank_end(head) :]
    if not text.startswith(b"{") and _BINARY.match(text):
        raise DataError(
            f"{path} is not text but a binary file: a compressed file must be named .jsonl.gz or "
            ".jsonl.zst."
        )


def _find_rows(data: np.ndarray) -> _Spans:
    first = _blank_end(data)
    head = data[first : first + 4096].tobytes()
    spans = None
    if head.startswith(b"["):
        spans = _elements(data, first)
    elif head[:1] == b"{" and head[1:].split(b"\n")[0].strip() == b"" and b"\n" in head:
        spans = _objects(data, first)  # json.dumps(indent=...) and jq write the first { alone
    return spans or _lines(data)


def _elements(data: np.ndarray, first: int) -> _Spans | None:
    """Elements of the array that begins at `first`; None if there is anything after it."""
    starts, ends = [np.array([first + 1])], []
    for offsets, depths in _structure(data, first):
        closed = np.flatnonzero(depths == 0)[:1]
        if len(closed):
            offsets, depths = offsets[: closed[0] + 1], depths[: closed[0] + 1]
        commas = offsets[(depths == 1) & (data[offsets] == ord(","))]
        starts.append(commas + 1)
        ends += [commas, offsets[closed]]
        if len(closed):
            break
    spans = _spans(np.concatenate(starts), np.concatenate(ends))
    if len(spans.ends) < len(spans.starts) or _blank_end(data, spans.ends[-1] + 1) < len(data):
        return None  # damaged, or no array: its lines are quarantined
    if _blank_end(data, spans.starts[-1]) >= spans.ends[-1]:  # empty, or after a last comma
        return _spans(spans.starts[:-1], spans.ends[:-1])
    return spans


def _objects(data: np.ndarray, first: int) -> _Spans:
    """Objects on several lines each."""
    closed = [
        offsets[(depths == 0) & (data[offsets] != ord(","))] + 1
        for offsets, depths in _structure(data, first)
    ]
    ends = np.concatenate(closed)
    starts = np.append(first, ends)
    if _blank_end(data, starts[-1]) == len(data):
        return _spans(starts[:-1], ends)
    return _spans(starts, np.append(ends, len(data)))


def _structure(data: np.ndarray, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, by chunk, the offsets of brackets and commas outside of strings, and depths after."""
    depth, in_string = 0, 0
    while first < len(data):
        end = _end_of_escape(data, first + STRUCTURE_BYTES)
        chunk = data[first:end]
        quotes = _quotes(chunk)
        marks = np.flatnonzero(_IS_MARK[chunk])
        marks = marks[(np.searchsorted(quotes, marks) + in_string) % 2 == 0]
        depths = depth + np.cumsum(_DEPTH[chunk[marks]])
        yield marks + first, depths
        _release(data)
        depth = int(depths[-1]) if len(marks) else depth
        first, in_string = end, (in_string + len(quotes)) % 2


def _quotes(chunk: np.ndarray) -> np.ndarray:
    """Offsets of the quotation marks that no backslash escapes."""
    is_quote = chunk == ord('"')
    slashes = np.flatnonzero(chunk == ord("\\"))
    order = np.arange(len(slashes))
    run_starts = np.maximum.accumulate(np.where(np.diff(slashes, prepend=-2) > 1, order, 0))
    escaped = slashes[(order - run_starts) % 2 == 0] + 1
    is_quote[escaped[escaped < len(chunk)]] = False
    return np.flatnonzero(is_quote)


def _end_of_escape(data: np.ndarray, offset: int) -> int:
    """The first offset from `offset` on that is not inside a run of backslashes or after one."""
    match = _ESCAPE.match(data.data, offset)
    return match.end() if match else len(data)


def _spans(starts: np.ndarray, ends: np.ndarray) -> _Spans:
    return _Spans(starts, ends, range(1, len(starts) + 1))


def _lines(data: np.ndarray) -> _Spans:
    """The lines that are not blank."""
    none = np.zeros(0, np.int64)
    parts, start, lines = [(none, none, none)], 0, 0
    for breaks in _line_breaks(data):
        starts = np.append(start, breaks[:-1])
        first = data[starts]
        kept = (first != ord("\n")) & (first != ord("\r"))
        for line in np.flatnonzero(_IS_INDENT[first]):
            kept[line] = _blank_end(data, starts[line], breaks[line]) < breaks[line]
        parts.append((starts[kept], breaks[kept], lines + 1 + np.flatnonzero(kept)))
        start, lines = int(breaks[-1]), lines + len(starts)
    starts, ends, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _Spans(starts, ends, range(1, lines + 1) if len(starts) == lines else numbers)


def _line_breaks(data: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the byte offsets after the ends of the lines, in several arrays of at least one."""
    last = 0
    for first in range(0, len(data), CHUNK_BYTES):
        chunk = data[first : first + CHUNK_BYTES]
        breaks = np.flatnonzero(chunk == ord("\n")) + first + 1
        returns = np.flatnonzero(chunk == ord("\r")) + first + 1
        if len(returns):  # \r ends a line, unless it is a part of \r\n
            alone = data[np.minimum(returns, len(data) - 1)] != ord("\n")
            breaks = np.sort(np.concatenate([breaks, returns[alone]]))
        _release(data)
        if len(breaks):
            last = int(breaks[-1])
            yield breaks
    if last < len(data):
        yield np.array([len(data)])


def _blank_end(data: bytes | np.ndarray, start: int = 0, end: int | None = None) -> int:
    """The offset after the white space and byte order marks at `start`."""
    text = data if isinstance(data, bytes) else data.data
    match = _BLANK.match(text, start, len(data) if end is None else end)
    assert match is not None  # it matches nothing, too
    return match.end()


def _release(data: np.ndarray) -> None:
    """Give back the pages of a memory map that were read; they would count as our memory."""
    if isinstance(data.base, mmap.mmap):
        data.base.madvise(mmap.MADV_DONTNEED)
