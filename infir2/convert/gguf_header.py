"""Checks of a GGUF file's header before transformers reads it.

The library (gguf) trusts the counts in the header: an array of 2^60 values keeps it busy and fills
the memory, because a read behind the end of the file is not an error there. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO

from infir2.errors import CheckpointError
from infir2.files import open_regular

MAX_ENTRIES = 1 << 16  # settings, and tensors
MAX_VALUES = 1 << 21  # in all arrays together; a vocabulary is a few arrays of 2^18
MAX_NAME_BYTES = 1 << 16
MAX_DIMENSIONS = 4
SEEK_BYTES = 1 << 16
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def check_gguf_header(path: Path) -> None:
    """Raise CheckpointError for a file that is no GGUF, or that claims more than it holds."""
    try:
        with open_regular(path) as file:
            _Header(file, path.stat().st_size).check()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is not a GGUF file that can be read ({error}); copy it again."
        ) from error


class _Header:
    """Reads a header in order; every method raises ValueError for what cannot be."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file, self._num_bytes, self._num_values = file, num_bytes, 0
        self._left = num_bytes

    def check(self) -> None:
        magic, version, num_tensors, num_settings = self._numbers("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin as GGUF version 2 or 3, little-endian")
        if max(num_tensors, num_settings) > MAX_ENTRIES:
            raise ValueError(f"it claims {num_tensors:,} tensors and {num_settings:,} settings")
        for _ in range(num_settings):
            self._skip_string(MAX_NAME_BYTES)
            self._skip_value(*self._numbers("<I"))
        for _ in range(num_tensors):
            self._check_tensor()

    def _numbers(self, form: str) -> tuple:
        data = self._file.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise ValueError("it ends in its header")
        self._left -= len(data)
        return struct.unpack(form, data)

    def _skip(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise ValueError(f"it claims {num_bytes:,} bytes, more than it holds")
        if num_bytes < SEEK_BYTES:  # a seek drops what is buffered
            self._file.read(num_bytes)
        else:
            self._file.seek(num_bytes, 1)

    def _skip_string(self, max_bytes: int) -> None:
        (num_bytes,) = self._numbers("<Q")
        if num_bytes > max_bytes:
            raise ValueError(f"it has a name of {num_bytes:,} bytes")
        self._skip(num_bytes)

    def _skip_value(self, kind: int) -> None:
        if kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self._skip_string(self._num_bytes)
        elif kind == _ARRAY:
            self._skip_array(*self._numbers("<IQ"))
        else:
            raise ValueError(f"it has a setting of type {kind}")

    def _skip_array(self, kind: int, count: int) -> None:
        self._num_values += count
        if self._num_values > MAX_VALUES:
            raise ValueError(f"its arrays claim {self._num_values:,} values")
        if kind in _SCALAR_BYTES:
            self._skip(count * _SCALAR_BYTES[kind])
        elif kind == _STRING:
            for _ in range(count):
                self._skip_string(self._num_bytes)
        else:
            raise ValueError(f"it has an array of type {kind}")

    def _check_tensor(self) -> None:
        self._skip_string(MAX_NAME_BYTES)
        (num_dimensions,) = self._numbers("<I")
        if num_dimensions > MAX_DIMENSIONS:
            raise ValueError(f"it has a tensor of {num_dimensions:,} dimensions")
        shape = self._numbers(f"<{num_dimensions}Q")
        _, start = self._numbers("<IQ")
        if start > self._num_bytes or math.prod(shape) > 8 * self._num_bytes:  # a bit per value
            raise ValueError(f"it claims a tensor of shape {list(shape)}, more than it holds")
