"""Megatron's indexed data sets: token ids in `PREFIX.bin`, offsets of documents in `PREFIX.idx`.

The index, little-endian:

    magic        9 bytes   MMIDIDX\\0\\0
    version      u64       1
    dtype code   u8        see DTYPES
    S            u64       number of sequences
    D + 1        u64       number of document bounds
    lengths      i32 [S]   tokens of each sequence
    offsets      i64 [S]   byte offset of each sequence in PREFIX.bin
    bounds       i64 [D+1] document d is the sequences [bounds[d], bounds[d+1])

Files written by `infir2 tokenize` have one sequence per document, and a `PREFIX.json` that names
their tokenizer. Source: megatron/core/datasets/indexed_dataset.py.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from infir2.errors import DataError, first_line
from infir2.files import open_regular, read_regular, require_regular

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
MAX_ABOUT_BYTES = 1 << 20  # of PREFIX.json
TEXT_BYTES_PER_TOKEN = 4  # estimate for files that do not record the size of their text


def is_indexed(path: Path) -> bool:
    """Whether `path` is the prefix, the .bin or the .idx file of an indexed data set."""
    return Path(f"{prefix_of(path)}.idx").is_file()


def prefix_of(path: Path) -> Path:
    """Return the path without .bin or .idx."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """Return the dtype that Megatron uses for a vocabulary of this size."""
    return np.uint16 if vocab_size < 65500 else np.int32


def write_index(path: Path, dtype: type[np.integer[Any]], lengths: np.ndarray) -> None:
    """Write and fsync a new .idx file.

    Args:
        dtype: dtype of the tokens in the .bin file.
        lengths: tokens of each document [D]; the .bin file holds the documents back to back.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    offsets = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    bounds = np.arange(len(sizes) + 1, dtype="<i8")
    code = next(code for code, known in DTYPES.items() if known is dtype)
    with path.open("xb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(sizes), len(sizes) + 1))
        for part in (sizes.astype("<i4"), offsets.astype("<i8"), bounds):
            file.write(part.tobytes())
        file.flush()
        os.fsync(file.fileno())


class IndexedDocuments:
    """The documents of an indexed data set, memory-mapped; a row is {"token_ids": integers [n]}.

    Example: `IndexedDocuments(Path("corpus")).read(0)["token_ids"]`. `about` is the content of
    PREFIX.json, {} if there is none.

    Raises:
        DataError: the index is damaged, or does not match its .bin file.
    """

    def __init__(self, path: Path) -> None:
        prefix = prefix_of(path)
        self.path, index = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
        self.fields: frozenset[str] = frozenset()
        self._read_index(index)
        self.about = _read_about(prefix.with_name(prefix.name + ".json"))
        self.num_bytes = int(
            self.about.get("source_bytes") or TEXT_BYTES_PER_TOKEN * len(self._tokens)
        )

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def number(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> dict[str, Any]:
        first, last = self._bounds[index], self._bounds[index + 1]
        itemsize = self._tokens.itemsize
        parts = [
            self._tokens[offset // itemsize :][:length]
            for offset, length in zip(
                self._offsets[first:last], self._lengths[first:last], strict=True
            )
        ]
        if len(parts) == 1:
            return {"token_ids": parts[0]}
        return {"token_ids": np.concatenate(parts) if parts else self._tokens[:0]}

    def _read_index(self, path: Path) -> None:
        code, sequences, bounds = self._read_header(path)
        data: np.ndarray = np.memmap(path, dtype=np.uint8, mode="r")[HEADER.size :]
        self._lengths = data[: 4 * sequences].view("<i4")
        self._offsets = data[4 * sequences : 12 * sequences].view("<i8")
        self._bounds = data[12 * sequences : 12 * sequences + 8 * bounds].view("<i8")
        num_bytes, dtype = require_regular(self.path), np.dtype(DTYPES[code]).newbyteorder("<")
        if num_bytes % dtype.itemsize or not self._is_consistent(num_bytes, dtype.itemsize):
            raise DataError(
                f"{path} does not match {self.path.name} ({num_bytes} bytes): "
                "one of them is truncated or changed, copy both again."
            )
        self._tokens: np.ndarray = np.zeros(0, dtype)  # an empty file cannot be mapped
        if num_bytes:
            self._tokens = np.memmap(self.path, dtype=dtype, mode="r")

    def _read_header(self, path: Path) -> tuple[int, int, int]:
        """Return the dtype code, the number of sequences and the number of document bounds."""
        with open_regular(path) as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(
                f"{path} is not the index of a Megatron data set: "
                "fix the path, or copy the file again."
            )
        _, version, code, sequences, bounds = HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise DataError(
                f"{path} has version {version} and dtype code {code}: "
                "only integer tokens of version 1 are supported."
            )
        size, expected = path.stat().st_size, HEADER.size + 12 * sequences + 8 * bounds
        # Multimodal files append one byte per sequence, its mode, which text does not need.
        if size not in (expected, expected + sequences):
            raise DataError(
                f"{path} has {size} bytes, but its header requires {expected}: "
                "it is truncated or changed, copy it again."
            )
        if not bounds or not self.path.exists():
            raise DataError(
                f"{path} is damaged, or {self.path.name} is missing: copy both files again."
            )
        return code, sequences, bounds

    def _is_consistent(self, num_bytes: int, itemsize: int) -> bool:
        """Whether each sequence is inside the .bin file and the bounds rise from 0 to S.

        Sequences do not overlap, so that no document is larger than the file.
        """
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
        disjoint = int(self._lengths.astype(np.int64).sum()) * itemsize <= num_bytes
        return rising and disjoint and bool((inside & (self._offsets % itemsize == 0)).all())


def _read_about(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        about = json.loads(read_regular(path, MAX_ABOUT_BYTES))
        if not isinstance(about, dict):
            raise ValueError("not an object")
        source_bytes = about.get("source_bytes", 0)
        if not isinstance(source_bytes, int) or not 0 <= source_bytes < 1 << 63:
            raise ValueError("source_bytes is not a number of bytes")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not readable JSON ({first_line(error)}): "
            "remove it, or tokenize the text again."
        ) from None
    return about
