"""Tensor files of a checkpoint: safetensors written as a stream and read lazily.

Several processes write their parts into files of their own; an index says where each part lies in its whole tensor, so that
any number of processes, one too, can read any part of it back. One tensor is in host memory at a time, each byte is hashed on
its way out, and every file is synced before the next.
Format: 8 bytes little-endian header length, JSON header padded with spaces to 8 bytes, the tensors' bytes without gaps.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infir2.checkpoint.manifest import FileEntry
from infir2.errors import CheckpointCorruptError, CheckpointError

SHARD_BYTES = 2**30
INDEX = "index.json"
_WRITE_BYTES = 2**26

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Place(NamedTuple):
    """Where a process's part of a tensor lies in the whole.

    Example: rows 128 to 255 of a [512, 64] weight: `Place(shape=(512, 64), offset=(128, 0), size=(128, 64), owned=True)`.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    owned: bool = True  # of all processes with this part, the one that saves it

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part as an index of the whole."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.size, strict=True))


WHOLE_NUMBER = Place((), (), ())


class HashedFile:
    """A new file that counts and hashes what is written, synced to the disk on close."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(max_workers=1)  # both let go of the interpreter's lock: hash and write at once
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        hashing = self._hasher.submit(self._hash.update, data)
        try:
            self._file.write(data)
        finally:
            hashing.result()
        self._size += len(data)

    def close(self) -> FileEntry:
        self._hasher.shutdown()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close without caring for the content: the caller is about to remove the file."""
        self._hasher.shutdown()
        try:
            self._file.close()
        except OSError:
            self._file.detach().close()


def write_file(path: Path, data: bytes) -> FileEntry:
    """Write a small file as a whole, synced."""
    file = HashedFile(path)
    try:
        file.write(data)
        return file.close()
    except BaseException:
        file.abandon()
        raise


def _tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's raw little-endian bytes, row-major; no copy for a contiguous CPU tensor."""
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()  # numpy's stubs deny that arrays are buffers
    return memoryview(array)


def write_shard(path: Path, tensors: Mapping[str, Tensor], on_bytes: Callable[[int], None] = lambda _: None) -> FileEntry:
    """Write one safetensors file; `on_bytes` hears how many bytes went out. Any dtype of `_DTYPE_NAMES`, any device."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Widest dtypes first keeps every tensor aligned for the reader's memory map.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    offset = 0
    for name, tensor in ordered:
        assert tensor.dtype in _DTYPE_NAMES, f"tensor '{name}': safetensors has no dtype {tensor.dtype}"
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = HashedFile(path)
    try:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            data = _tensor_bytes(tensor)
            assert len(data) == tensor.numel() * tensor.element_size(), "a sharded tensor must be gathered before it is saved"
            for start in range(0, len(data), _WRITE_BYTES):
                piece = data[start : start + _WRITE_BYTES]
                file.write(piece)
                on_bytes(len(piece))
        return file.close()
    except BaseException:
        file.abandon()
        raise


def split_shards(tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> Iterator[dict[str, Tensor]]:
    """Group the tensors, in order, into files of at most `shard_bytes` (a larger tensor gets a file of its own)."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and size + num_bytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += num_bytes
    if shard:
        yield shard


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of several safetensors files by name, read from the disk when asked for, put together from parts where needed.

    Example: `LazyTensors([dir / "tensors-00000.safetensors"])["parameters/model.norm.weight"]`.
    `index`: {name: {"shape": [R, C], "parts": [{"file": name, "offset": [r, c]}, ...]}} of the tensors that lie in parts.
    """

    def __init__(self, paths: list[Path], index: Mapping[str, Any] | None = None) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[tuple[Any, tuple[int, ...]]]] = {}  # name -> (file, offset of its part)
        files = {}
        for path in paths:
            try:
                files[path.name] = handle = safe_open(path, framework="pt", device="cpu")
                names = handle.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointCorruptError(f"{path}: is not a readable safetensors file ({error}).") from error
            for name in names:
                self._shapes[name] = tuple(handle.get_slice(name).get_shape())
                self._parts[name] = [(handle, (0,) * len(self._shapes[name]))]
        for name, entry in (index or {}).items():
            self._shapes[name] = tuple(entry["shape"])
            self._parts[name] = [(files[part["file"]], tuple(part["offset"])) for part in entry["parts"]]

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return self.part(name, Place(shape, (0,) * len(shape), shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor without reading it."""
        return self._shapes[name]

    def part(self, name: str, place: Place) -> Tensor:
        """The rectangle of a tensor that `place` names; only its bytes are read. CheckpointCorruptError if parts are missing."""
        pieces = self._parts[name]
        if len(pieces) == 1 and place.size == self._shapes[name]:
            return pieces[0][0].get_tensor(name)
        result, found = None, 0
        for handle, offset in pieces:
            piece = handle.get_slice(name)
            starts = [max(a, b) for a, b in zip(place.offset, offset, strict=True)]
            ends = [min(a + n, b + m) for a, n, b, m in zip(place.offset, place.size, offset, piece.get_shape(), strict=True)]
            if any(start >= end for start, end in zip(starts, ends, strict=True)):
                continue
            values = piece[tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, offset, strict=True))]
            if result is None:
                result = values.new_empty(place.size)
            result[tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, place.offset, strict=True))] = values
            found += values.numel()
        if found != torch.Size(place.size).numel():
            raise CheckpointCorruptError(f"'{name}': its parts cover {found} of the {torch.Size(place.size).numel()} values asked for.")
        return torch.empty(place.size) if result is None else result


def read_part(tensors: Mapping[str, Tensor], name: str, place: Place) -> Tensor:
    """This process's part of a whole tensor. CheckpointError if there is none of that name and shape."""
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no {name}: it was saved by a model with other parameters.")
    shape = tensors.shape(name) if isinstance(tensors, LazyTensors) else tuple(tensors[name].shape)
    if shape != place.shape:
        raise CheckpointError(f"the checkpoint has {name} of shape {list(shape)}, and the model needs {list(place.shape)}.")
    if isinstance(tensors, LazyTensors):
        return tensors.part(name, place)
    return tensors[name][place.slices]


def make_index(written: list[dict[str, str]], places: list[Mapping[str, Place]]) -> dict[str, Any]:
    """The index of tensors in parts. `written`: per rank, {name: file}; `places`: per rank, {name: place}."""
    index: dict[str, Any] = {}
    for files, own in zip(written, places, strict=True):
        for name, place in own.items():
            if name in files:
                entry = index.setdefault(name, {"shape": place.shape, "parts": []})
                entry["parts"].append({"file": files[name], "offset": place.offset})
    return index
