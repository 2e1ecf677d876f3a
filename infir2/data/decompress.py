"""Decompress a .gz or .zst file into a temporary file, within a bound."""

import gzip
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from infir2.errors import DataError, first_line
from infir2.files import open_regular

CHUNK_BYTES = 1 << 22
# Text rarely shrinks to less than a 30th. Only a file made to fill a disk, such as one of zeros,
# exceeds this ratio (zlib's maximum is 1,032) with so many bytes.
MAX_RATIO = 250
FREE_BYTES = 1 << 28


def decompress(path: Path) -> BinaryIO:
    """Return an open temporary file with the content of a .gz or .zst file; closing deletes it.

    Raises:
        DataError: the file is damaged, or unpacks to more than MAX_RATIO times its size.
        OSError: the file cannot be read, or the disk is full.
    """
    # The caller's memory map keeps the file.
    file = cast(BinaryIO, tempfile.TemporaryFile(prefix="infir2-"))  # noqa: SIM115
    with open_regular(path) as packed:
        limit = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
        for chunk in _chunks(path, packed):
            file.write(chunk)
            if file.tell() > limit:
                raise DataError(
                    f"{path} unpacks to more than {limit:,} bytes, {MAX_RATIO} times its size, "
                    "which no text does: remove it from the sources."
                )
    file.flush()
    return file


def _chunks(path: Path, packed: BinaryIO) -> Iterator[bytes]:
    """Yield the content in pieces of at most CHUNK_BYTES."""
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(packed) as stream:
                yield from iter(lambda: stream.read(CHUNK_BYTES), b"")
        else:
            yield from _zstd_chunks(packed)
    except (EOFError, gzip.BadGzipFile, zlib.error, ZstdError) as error:
        kind = "gzip" if path.suffix.lower() == ".gz" else "zstd"
        raise DataError(
            f"{path} is not a complete {kind} file ({first_line(error)}): "
            "copy or compress it again."
        ) from None


class ZstdError(Exception):
    """Arrow's error for data that is not zstd, or ends too early."""


def _zstd_chunks(packed: BinaryIO) -> Iterator[bytes]:
    import pyarrow as pa

    if not packed.peek(1):  # type: ignore[attr-defined]
        return
    stream: Any = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd")
    while True:
        try:
            chunk = stream.read(CHUNK_BYTES)
        except (pa.ArrowException, OSError) as error:
            raise ZstdError(first_line(error)) from None
        if not chunk:
            return
        yield chunk
