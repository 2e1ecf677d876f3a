"""The index `.metadata` of a distributed checkpoint: where each piece of each tensor is stored.

It is a pickle of torch's class Metadata, which anybody may have written. The index is built here
from its plain values, each of them checked; torch's classes are not used.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint.manifest import METADATA, removed_message
from infir2.checkpoint.pickles import DCP, DTYPES, is_foreign, is_own, read_pickle_file
from infir2.checkpoint.torch_save import dimensions
from infir2.errors import CheckpointError
from infir2.files import require_regular
from infir2.pickles import Record, is_record

MAX_COMPARED = 1_000_000  # pairs of pieces of one tensor


@dataclass(frozen=True)
class StoredPiece:
    """A rectangle of a tensor, in bytes [start, start + length) of a file of the directory."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int

    @property
    def ends(self) -> tuple[int, ...]:
        """The offset behind the last value, in each dimension."""
        return tuple(map(sum, zip(self.offset, self.shape, strict=True)))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint; `shape` is global."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[StoredPiece, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_metadata(directory: Path, foreign: bool) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name.

    Args:
        foreign: another program may have written it, whose `.metadata` contains more names.

    Raises:
        CheckpointError: `.metadata` is damaged, contains a name that no checkpoint needs, or names
            a file outside the directory.
    """
    path = directory / METADATA
    if not directory.exists():
        raise CheckpointError(removed_message(directory))
    value = read_pickle_file(path, is_foreign if foreign else is_own)
    try:
        metadata = _fields(value, "metadata.Metadata")
        stored = _stored_pieces(metadata.get("storage_data"))
        tensors = _tensors(metadata.get("state_dict_metadata"), stored)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is not the metadata of a distributed checkpoint ({error})."
        ) from error
    _check_files(path, tensors)
    return tensors


def _fields(value: Any, class_name: str) -> dict[Any, Any]:
    """The attributes of an object of one of torch's classes."""
    if is_record(value, f"{DCP}.{class_name}") and isinstance(value.state, dict):
        return value.state
    raise ValueError(f"an object in it is not a {class_name.split('.')[-1]}")


_Location = tuple[str, int, int]  # file, start, length


def _stored_pieces(value: Any) -> dict[tuple[str, tuple[int, ...]], _Location]:
    """Location of each piece, by the name of its tensor and its offset in it."""
    if not isinstance(value, dict):
        raise ValueError("it has no storage_data")
    pieces = {}
    for key, info in value.items():
        index = _fields(key, "metadata.MetadataIndex")
        if index.get("offset") is None:
            continue  # bytes, not a tensor
        piece = _name(index.get("fqn")), dimensions(index["offset"])
        pieces[piece] = _location(_fields(info, "filesystem._StorageInfo"))
    return pieces


def _location(info: dict[Any, Any]) -> _Location:
    start, length = (_size(info.get(key)) for key in ("offset", "length"))
    if info.get("transform_descriptors"):
        raise ValueError("its pieces are compressed, which is not supported")
    return _name(info.get("relative_path")), start, length


def _name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000 or not value.isprintable():
        raise ValueError("a name in it is not at most 1,000 printable characters")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError("a size in it is no number of bytes")
    return value


def _tensors(
    value: Any, stored: dict[tuple[str, tuple[int, ...]], _Location]
) -> dict[str, StoredTensor]:
    if not isinstance(value, dict):
        raise ValueError("it has no state_dict_metadata")
    tensors = {}
    for name, entry in value.items():
        if is_record(entry, f"{DCP}.metadata.TensorStorageMetadata"):
            fields = _fields(entry, "metadata.TensorStorageMetadata")
            tensors[_name(name)] = _tensor(name, fields, stored)
    return tensors


def _tensor(
    name: str,
    entry: dict[Any, Any],
    stored: dict[tuple[str, tuple[int, ...]], _Location],
) -> StoredTensor:
    shape, chunks = dimensions(entry.get("size")), entry.get("chunks")
    if not isinstance(chunks, list):
        raise ValueError("a tensor in it has no list of chunks")
    pieces: dict[tuple[int, ...], StoredPiece] = {}
    for chunk in chunks:
        fields = _fields(chunk, "metadata.ChunkStorageMetadata")
        offset, sizes = dimensions(fields.get("offsets")), dimensions(fields.get("sizes"))
        ends = tuple(map(sum, zip(offset, sizes, strict=False)))
        if not len(offset) == len(sizes) == len(shape) or any(map(int.__gt__, ends, shape)):
            raise ValueError("a chunk in it lies outside its tensor")
        if (name, offset) in stored:
            pieces[offset] = StoredPiece(offset, sizes, *stored[name, offset])
    _check_disjoint(pieces)
    return StoredTensor(shape, _dtype(entry.get("properties")), tuple(pieces.values()))


def _check_disjoint(pieces: dict[tuple[int, ...], StoredPiece]) -> None:
    """Raise ValueError for two pieces that share values: others might then be in no piece.

    A piece is compared with those before it that reach its first row.
    """
    reaching: list[StoredPiece] = []
    num_compared = 0
    for piece in (pieces[offset] for offset in sorted(pieces)):
        if not piece.shape or not math.prod(piece.shape):
            continue
        reaching = [each for each in reaching if each.ends[0] > piece.offset[0]]
        num_compared += len(reaching)
        if num_compared > MAX_COMPARED:
            raise ValueError(f"more than {MAX_COMPARED:,} pairs of its pieces share rows")
        for each in reaching:
            if all(map(int.__lt__, piece.offset, each.ends)) and all(
                map(int.__lt__, each.offset, piece.ends)
            ):
                raise ValueError("two pieces of a tensor overlap")
        reaching.append(piece)


def _dtype(properties: Any) -> torch.dtype:
    """The dtype of TensorProperties, whose state is a tuple that begins with it."""
    if is_record(properties, f"{DCP}.metadata.TensorProperties"):
        state = properties.state
        first = state[0] if isinstance(state, tuple) and state else None
        if isinstance(first, Record) and first.args is None and first.name in DTYPES:
            return DTYPES[first.name]
    raise ValueError("a tensor in it has no dtype")


def _check_files(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise CheckpointError unless the pieces can be disjoint parts of files in the directory.

    A file that is missing is an error only for the tensors that are read from it.
    """
    claimed: Counter[str] = Counter()
    for tensor in tensors.values():
        for piece in tensor.pieces:
            claimed[piece.file] += piece.length
    for name, num_bytes in claimed.items():
        if name != Path(name).name or name in ("", ".."):
            raise CheckpointError(
                f"{path}: names the file '{name}', which is outside the checkpoint; "
                "the file is refused."
            )
        if num_bytes > _file_size(path.parent / name, num_bytes):
            raise CheckpointError(
                f"{path}: claims {num_bytes} bytes of {name}, more than it holds; "
                "a tensor file is damaged or missing."
            )


def _file_size(path: Path, missing: int) -> int:
    try:
        return require_regular(path)
    except FileNotFoundError:
        return missing
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
