"""Megatron's indexed data sets: `PREFIX.bin` holds token ids one document after another, `PREFIX.idx` says where each begins.

The index, little-endian: `MMIDIDX\\0\\0`, version 1 (u64), code of the token dtype (u8), S sequences (u64), D + 1 document bounds
(u64); then lengths in tokens [S] (i32), offsets in bytes [S] (i64), and bounds [D + 1] (i64): document d is the sequences
bounds[d] to bounds[d + 1]. Files written here have one sequence per document. Files that `infir2 tokenize` wrote come with a
`PREFIX.json` that names their tokenizer.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from infir2.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
TEXT_BYTES_PER_TOKEN = 4  # of files that do not say how much text they were made from


def is_indexed(path: Path) -> bool:
    """Whether `path` is a prefix, a .bin or an .idx file of an indexed data set."""
    return prefix_of(path).with_name(prefix_of(path).name + ".idx").is_file()


def prefix_of(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """The dtype that Megatron too chooses for a vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


def write_index(path: Path, dtype: type[np.integer[Any]], lengths: np.ndarray) -> None:
    """Write the .idx of documents of `lengths` tokens [D] that lie one after another in a .bin of `dtype`, synced."""
    sizes = np.asarray(lengths, dtype=np.int64)
    offsets = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    code = next(code for code, known in DTYPES.items() if known is dtype)
    with path.open("xb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(sizes), len(sizes) + 1))
        for part in (
            sizes.astype("<i4"),
            offsets.astype("<i8"),
            np.arange(len(sizes) + 1, dtype="<i8"),
        ):
            file.write(part.tobytes())
        file.flush()
        os.fsync(file.fileno())


class IndexedDocuments:
    """The documents of one data set, by memory map; each row is `{"token_ids": integers [n]}`.

    Example: `IndexedDocuments(Path("corpus")).read(0)["token_ids"]`. `about` is the content of PREFIX.json, {} without one.
    Raises DataError for an index that is damaged, or that does not fit its .bin.
    """

    def __init__(self, path: Path) -> None:
        prefix = prefix_of(path)
        self.path, index = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
        self.fields: frozenset[str] = frozenset()
        self._read_index(index)
        side = prefix.with_name(prefix.name + ".json")
        try:
            self.about: dict[str, Any] = (
                dict(json.loads(side.read_text(encoding="utf-8"))) if side.is_file() else {}
            )
        except (ValueError, TypeError):
            raise DataError(f"{side} is not readable JSON: remove it, or tokenise again.") from None
        self.num_bytes = int(
            self.about.get("source_bytes") or TEXT_BYTES_PER_TOKEN * len(self._tokens)
        )

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def read(self, index: int) -> dict[str, Any]:
        first, last = self._bounds[index], self._bounds[index + 1]
        size = self._tokens.itemsize
        places = zip(self._offsets[first:last], self._lengths[first:last], strict=True)
        parts = [self._tokens[start // size :][:length] for start, length in places]
        return {
            "token_ids": parts[0]
            if len(parts) == 1
            else np.concatenate(parts)
            if parts
            else self._tokens[:0]
        }

    def _read_index(self, path: Path) -> None:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(
                f"{path} is not the index of a Megatron data set: mend the path in the recipe, or copy the file again."
            )
        _, version, code, sequences, bounds = HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise DataError(
                f"{path} has version {version} and dtype code {code}: only integer tokens of version 1 can be read."
            )
        size, expected = path.stat().st_size, HEADER.size + 12 * sequences + 8 * bounds
        if size not in (
            expected,
            expected + sequences,
        ):  # one byte per sequence more: modes, which plain text does not need
            raise DataError(
                f"{path} has {size} bytes, but its header calls for {expected}: it was cut or changed, copy it again."
            )
        if bounds < 2 or not self.path.is_file() or not self.path.stat().st_size:
            raise DataError(
                f"{path} lists no document, or {self.path.name} is missing or empty: copy both files again."
            )
        data = np.memmap(path, dtype=np.uint8, mode="r")[HEADER.size :]
        self._lengths = data[: 4 * sequences].view("<i4")
        self._offsets = data[4 * sequences : 12 * sequences].view("<i8")
        self._bounds = data[12 * sequences : 12 * sequences + 8 * bounds].view("<i8")
        num_bytes, dtype = self.path.stat().st_size, np.dtype(DTYPES[code]).newbyteorder("<")
        if num_bytes % dtype.itemsize or not self._fits(num_bytes, dtype.itemsize):
            raise DataError(
                f"{path} does not fit {self.path.name} ({num_bytes} bytes): one of them was cut or changed, copy both again."
            )
        self._tokens = np.memmap(self.path, dtype=dtype, mode="r")

    def _fits(self, num_bytes: int, itemsize: int) -> bool:
        """Whether every sequence lies inside the .bin and the bounds rise from 0 to the number of sequences."""
        ends = self._offsets + self._lengths.astype(np.int64) * itemsize
        inside = (
            (self._lengths >= 0)
            & (self._offsets >= 0)
            & (self._offsets <= num_bytes)
            & (ends <= num_bytes)
        )
        rising = (
            self._bounds[0] == 0
            and self._bounds[-1] == len(self._lengths)
            and bool((np.diff(self._bounds) >= 0).all())
        )
        return rising and bool((inside & (self._offsets % itemsize == 0)).all())
