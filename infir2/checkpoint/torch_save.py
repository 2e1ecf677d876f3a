"""Files of `torch.save`, read without torch.load.

Such a file is a zip archive of uncompressed members: a pickle `data.pkl`, and the bytes of each
storage in `data/N`. torch.load would unpack compressed members of any size and run what the pickle
names, from a list that allows for example `bytearray(10**12)`. Here a compressed member is refused,
and no more is allocated than the file has bytes.
"""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from infir2.checkpoint.pickles import DTYPES, decode_pickle, is_foreign, is_tensor
from infir2.errors import CheckpointError
from infir2.files import open_regular
from infir2.pickles import MAX_BYTES, Record, is_record

# Of the zip archive's list of members; one tensor needs less than 1 KiB.
MAX_LIST_BYTES, MAX_TENSOR_LIST_BYTES = 2**24, 2**17
MAX_TENSOR_PICKLE_BYTES = 2**16
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# Functions that rebuild a tensor, with the number of their arguments.
_REBUILD = {"torch._utils._rebuild_tensor_v2": 6, "torch._utils._rebuild_tensor_v3": 7}
_STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


def read_torch_save(path: Path) -> Any:
    """The object of a file, its tensors and other objects as `Record`s. Raises CheckpointError."""
    try:
        with open_regular(path) as file:
            archive = _Archive(_FilePart(file, 0, path.stat().st_size, MAX_LIST_BYTES))
            data = archive.read("data.pkl", MAX_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a file of torch.save ({error})."
        ) from error
    return decode_pickle(data, path, is_foreign)


def read_saved_tensor(file: BinaryIO, start: int, length: int) -> Tensor:
    """The tensor that `torch.save` wrote to bytes [start, start + length) of a file.

    Raises OSError, ValueError, and CheckpointError for its pickle.
    """
    archive = _Archive(_FilePart(file, start, length, MAX_TENSOR_LIST_BYTES))
    pickled = archive.read("data.pkl", MAX_TENSOR_PICKLE_BYTES)
    storage, offset, size, stride, dtype = _layout(decode_pickle(pickled, "data.pkl", is_tensor))
    if archive.read_if_present("byteorder", 16) not in (None, b"little"):
        raise ValueError("its bytes are not little-endian")
    values = archive.read_storage(storage, dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(values):
        raise ValueError(f"its shape {size} does not fit its {len(values)} values")
    return values.as_strided(size, stride, offset)


def _layout(value: Any) -> tuple[str, int, tuple[int, ...], tuple[int, ...], torch.dtype]:
    """(storage, offset in values, shape, strides in values, dtype) of a pickled tensor."""
    if not isinstance(value, Record) or len(value.args or ()) != _REBUILD.get(value.name):
        raise ValueError("it is not a plain tensor")
    assert value.args is not None
    storage, offset, size, stride = value.args[:4]
    pid = storage.args[0] if is_record(storage, "") else None
    if not isinstance(pid, tuple) or len(pid) != 5 or not isinstance(pid[2], str):
        raise ValueError("its tensor has no storage")
    dtypes, named = (_STORAGE_DTYPES, pid[1]) if len(value.args) == 6 else (DTYPES, value.args[6])
    dtype = dtypes.get(named.name) if isinstance(named, Record) else None
    if dtype is None:
        raise ValueError("its tensor has an unknown dtype")
    shape, strides = dimensions(size), dimensions(stride)
    if type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise ValueError("its tensor has no valid shape")
    return pid[2], offset, shape, strides, dtype


def dimensions(value: Any) -> tuple[int, ...]:
    """A shape, offset or stride: a tuple or `torch.Size` of at most 16 integers from 0 to 2**62.

    Raises ValueError for any other value.
    """
    if is_record(value, "torch.Size") and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple) or len(value) > 16:
        raise ValueError("a shape in it is not a list of at most 16 integers")
    if not all(type(number) is int and 0 <= number <= 2**62 for number in value):
        raise ValueError("a shape in it has an entry that is no size")
    return value


class _Archive:
    """A zip archive in a part of a file; raises OSError or ValueError for a damaged one."""

    def __init__(self, part: "_FilePart") -> None:
        self._part = part
        try:
            members = zipfile.ZipFile(self._part).infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
            raise ValueError(f"it is not a zip archive: {error}") from error
        pickles = [name for info in members if (name := info.filename).endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        self._folder = pickles[0].removesuffix("data.pkl")
        self._members = {info.filename: info for info in members}

    def read(self, name: str, max_bytes: int) -> bytes:
        """The content of a member of at most `max_bytes`."""
        size = self._seek(name)
        if size > max_bytes:
            raise ValueError(f"its {name} has {size:,} bytes")
        return self._part.file.read(size)

    def read_if_present(self, name: str, max_bytes: int) -> bytes | None:
        return self.read(name, max_bytes) if self._folder + name in self._members else None

    def read_storage(self, name: str, dtype: torch.dtype) -> Tensor:
        """The values of a storage: [N]."""
        size = self._seek(f"data/{name}")
        if size % dtype.itemsize:
            raise ValueError(f"its storage of {size} bytes does not hold values of {dtype}")
        data = torch.empty(size, dtype=torch.uint8)
        if cast(io.BufferedReader, self._part.file).readinto(data.numpy().data) != size:
            raise ValueError("it is truncated")
        return data.view(dtype)

    def _seek(self, name: str) -> int:
        """Seek to the content of a member; returns its size."""
        info = self._members.get(self._folder + name)
        if info is None:
            raise ValueError(f"it has no {name[:200]}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its {name[:200]} is compressed, which torch.save never does")
        self._part.seek(info.header_offset)
        header = self._part.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise ValueError(f"its {name[:200]} is not where the archive says")
        _, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        position = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
        if position + info.file_size > self._part.length:
            raise ValueError("it is truncated")
        self._part.seek(position)
        return info.file_size


class _FilePart(io.RawIOBase):
    """Bytes [start, start + length) of a file, of which zipfile reads the list of members."""

    def __init__(self, file: BinaryIO, start: int, length: int, max_read_bytes: int) -> None:
        self.file, self._start, self.length, self._position = file, start, length, 0
        self._max_read_bytes = max_read_bytes

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if origin + offset < 0:
            raise OSError("a position in it lies before its start")
        self._position = origin + offset
        self.file.seek(self._start + self._position)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        size = min(size if size >= 0 else self.length, max(0, self.length - self._position))
        if size > self._max_read_bytes:
            raise OSError("its list of members is too large")
        self.file.seek(self._start + self._position)
        data = self.file.read(size)
        self._position += len(data)
        return data
