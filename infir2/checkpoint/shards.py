"""Tensor files of a checkpoint: safetensors written as a stream and read lazily.

One tensor is in host memory at a time, each byte is hashed on its way out, and every file is synced before the next.
Format: 8 bytes little-endian header length, JSON header padded with spaces to 8 bytes, the tensors' bytes without gaps.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infir2.checkpoint.manifest import FileEntry
from infir2.errors import CheckpointCorruptError

SHARD_BYTES = 2**30
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


class HashedFile:
    """A new file that counts and hashes what is written, synced to the disk on close."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def close(self) -> FileEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close without caring for the content: the caller is about to remove the file."""
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
    """Tensors of several safetensors files by name, read from the disk when asked for.

    Example: `LazyTensors([dir / "tensors-00000.safetensors"])["parameters/model.norm.weight"]`.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._files = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="pt", device="cpu")
                names = handle.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointCorruptError(f"{path}: is not a readable safetensors file ({error}).") from error
            for name in names:
                self._files[name] = handle

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())
