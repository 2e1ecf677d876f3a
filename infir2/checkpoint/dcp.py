"""Tensors in torch's distributed checkpoint format (DCP), written as a stream and read lazily.

Each rank writes its shards, in pieces of full rows, to files `__RANK_N.distcp`. Rank 0 writes the
pickled index `.metadata`: the file and offset of each piece, and its rectangle in the global
tensor. torch's own tools can read the directory.

Only one piece per open file is copied to the host at a time. Every byte is hashed while it is
written, and every file is synced. What is read may have been written by anybody: dcp_metadata.py
reads the index and torch_save.py the pieces, without unpickling either.
"""

import itertools
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config as serialization

from infir2.checkpoint.dcp_metadata import StoredPiece, StoredTensor, read_metadata
from infir2.checkpoint.manifest import (
    METADATA,
    FileEntry,
    HashedFile,
    removed_message,
    write_hashed,
)
from infir2.checkpoint.torch_save import read_saved_tensor
from infir2.errors import CheckpointError, first_line
from infir2.faults import fault
from infir2.files import open_regular
from infir2.parallel.ranks import Ranks
from infir2.parallel.shard_spec import ShardSpec, unsharded

PIECE_BYTES = 2**26
FILE_BYTES = 2**30
WRITERS = min(4, os.cpu_count() or 1)


def save_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor],
    shard_specs: Mapping[str, ShardSpec],
    ranks: Ranks,
    on_bytes: Callable[[int], None],
) -> dict[str, FileEntry]:
    """Write this rank's tensors; every rank calls this at the same point.

    A tensor without a shard spec is unsharded. `on_bytes` receives the size of each piece that is
    written. Returns the entries of this rank's files. If a rank fails, every rank raises: its own
    error, or that of the lowest rank that failed.
    """
    # torch warns when there is no process group.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    writer = _Writer(directory)
    planner = _SavePlanner(tensors, shard_specs, on_bytes)
    try:
        dcp.save(
            {},
            storage_writer=writer,
            planner=planner,
            process_group=ranks.group,
            no_dist=ranks.size == 1,
        )
    except dcp.api.CheckpointException as error:
        first = min(error.failures)
        raise error.failures.get(ranks.rank, error.failures[first])[0] from None
    return writer.files


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans one write per piece of a tensor."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shard_specs: Mapping[str, ShardSpec],
        on_bytes: Callable[[int], None],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._on_bytes = on_bytes
        self._pieces = {
            index: (piece, spec)
            for name in tensors
            for index, piece, spec in _cut(name, tensors[name], shard_specs.get(name))
        }

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, (piece, spec) in self._pieces.items():
            assert index.offset is not None
            chunk = ChunkStorageMetadata(index.offset, piece.shape)
            data = TensorWriteData(
                chunk, TensorProperties(dtype=piece.dtype), torch.Size(spec.global_shape)
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The piece on the host, in a storage of its own size, because torch.save writes storages.

        A piece that is contiguous on a CPU is not copied.
        """
        piece, _ = self._pieces[write_item.index]
        self._on_bytes(piece.nbytes)
        if not piece.numel():
            return torch.empty(piece.shape, dtype=piece.dtype)
        array = piece.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        return torch.from_numpy(array).view(piece.dtype).view(piece.shape)


def _cut(
    name: str, tensor: Tensor, spec: ShardSpec | None
) -> Iterator[tuple[MetadataIndex, Tensor, ShardSpec]]:
    """Yield (index with the offset in the global tensor, view of the rows, spec of the tensor).

    A piece has at least one row and otherwise at most `PIECE_BYTES`.
    """
    spec, tensor = spec or unsharded(tensor.shape), tensor.detach()
    assert spec.local_shape == tuple(tensor.shape), f"'{name}' does not have the shape of its spec"
    rows = max(1, PIECE_BYTES * len(tensor) // max(1, tensor.nbytes)) if tensor.ndim else 1
    for number, piece in enumerate(tensor.split(rows) if tensor.ndim else [tensor]):
        offset = (spec.offset[0] + number * rows, *spec.offset[1:]) if tensor.ndim else ()
        yield MetadataIndex(name, offset), piece, spec


class _Writer(dcp.FileSystemWriter):
    """Writes files of about `FILE_BYTES` in `WRITERS` threads; `files` has their entries.

    torch's own writer either writes one file per rank, or loses the error of a thread.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory
        self.files: dict[str, FileEntry] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        def write(number: int, items: list[WriteItem]) -> list[WriteResult]:
            return self._write_file(f"{plan.storage_data.prefix}{number}.distcp", items, planner)

        # Hashing and writing release the interpreter's lock.
        with ThreadPoolExecutor(WRITERS) as pool:
            results = list(pool.map(write, itertools.count(), _files(plan.items)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(list(itertools.chain(*results)))
        return done

    def _write_file(
        self, name: str, items: list[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        fault("save.before_shard")
        results = []
        # CRC-32 would be redundant to SHA-256; the setting is local to this thread.
        with (
            HashedFile(self._directory / name) as file,
            serialization.patch("save.compute_crc32", False),  # type: ignore[attr-defined]
        ):
            stream: Any = file  # has the methods that torch.save calls
            for item in items:
                start = file.size
                torch.save(planner.resolve_data(item), stream)
                results.append(
                    WriteResult(
                        item.index, file.size - start, _StorageInfo(name, start, file.size - start)
                    )
                )
        self.files[name] = file.entry
        fault("save.after_shard")
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {
            result.index: result.storage_data for part in results for result in part
        }
        metadata.version = CURRENT_DCP_VERSION
        self.files[METADATA] = write_hashed(self._directory / METADATA, pickle.dumps(metadata))


def _files(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Yield the items, in order, in groups of at most `FILE_BYTES`, or of one larger item."""
    group: list[WriteItem] = []
    size = 0
    for item in items:
        assert item.tensor_data is not None
        num_bytes = (
            item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        )
        if group and size + num_bytes > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += num_bytes
    if group:
        yield group


class DcpTensors(Mapping[str, Tensor]):
    """The tensors of a directory by name; each is read when it is accessed.

    Example: `DcpTensors(run / "checkpoints/step-20")["parameters/model.norm.weight"]`.

    Raises CheckpointError as `read_metadata` does, which documents `foreign`.
    """

    def __init__(self, path: Path, foreign: bool = False) -> None:
        self.path = path
        self._entries = read_metadata(path, foreign)
        self.files = {piece.file for entry in self._entries.values() for piece in entry.pieces}
        self.num_file_bytes = sum(file.stat().st_size for file in path.glob("*.distcp"))

    def __getitem__(self, name: str) -> Tensor:
        return self.read_shard(name, unsharded(self._entry(name).shape))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor, without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read_shard(self, name: str, spec: ShardSpec) -> Tensor:
        """Read the rectangle `spec` of a tensor: [*spec.local_shape]; raises as `read_into`."""
        entry = self._entry(name)
        if entry.num_bytes > self.num_file_bytes:
            raise CheckpointError(
                f"{self.path}: tensor '{name}' claims {entry.num_bytes} bytes, more than all its "
                "files hold; it is refused."
            )
        tensor = torch.empty(spec.local_shape, dtype=entry.dtype)
        self.read_into(name, spec, tensor)
        return tensor

    def read_into(self, name: str, spec: ShardSpec, out: Tensor) -> None:
        """Read the rectangle `spec` of a tensor into `out`; reads only pieces that overlap it.

        Raises CheckpointError if the tensor does not exist, has another global shape or dtype, or
        cannot be read.
        """
        entry = self._entry(name)
        stored, wanted = (entry.shape, entry.dtype), (spec.global_shape, out.dtype)
        if stored != wanted:
            raise CheckpointError(
                f"{self.path}: '{name}' is {list(stored[0])} {stored[1]}, "
                f"and {list(wanted[0])} {wanted[1]} is needed."
            )
        try:
            self._copy_pieces(entry, spec, out)
        except Exception as error:  # zipfile raises many types for a damaged file
            if not self.path.exists():
                raise CheckpointError(removed_message(self.path)) from error
            raise CheckpointError(
                f"{self.path}: tensor '{name}' cannot be read ({first_line(error)}); "
                "a tensor file is damaged or missing."
            ) from error

    def _copy_pieces(self, entry: StoredTensor, spec: ShardSpec, out: Tensor) -> None:
        overlaps = [(piece, _overlap(piece, spec)) for piece in entry.pieces]
        num_values = sum(math.prod(part.local_shape) for _, part in overlaps)
        if num_values != out.numel():
            raise ValueError(f"its pieces hold {num_values} of the {out.numel()} values")
        for piece, part in overlaps:
            if not math.prod(part.local_shape):
                continue
            with open_regular(self.path / piece.file) as file:
                tensor = read_saved_tensor(file, piece.start, piece.length)
            if tensor.shape != piece.shape or tensor.dtype != entry.dtype:
                raise ValueError(f"a piece of it is {tensor.dtype} {list(tensor.shape)}")
            source = _narrow(tensor, piece.offset, part)
            _narrow(out.detach(), spec.offset, part).copy_(source)

    def _entry(self, name: str) -> StoredTensor:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: has no tensor '{name}', which the model needs.")
        return self._entries[name]


def _overlap(piece: StoredPiece, spec: ShardSpec) -> ShardSpec:
    """The rectangle that a piece and `spec` share; its sizes are 0 where they share none."""
    starts = tuple(map(max, piece.offset, spec.offset))
    ends = (
        min(a + m, b + n)
        for a, m, b, n in zip(piece.offset, piece.shape, spec.offset, spec.local_shape, strict=True)
    )
    sizes = tuple(max(0, end - start) for start, end in zip(starts, ends, strict=True))
    return ShardSpec(spec.global_shape, starts, sizes)


def _narrow(tensor: Tensor, offset: tuple[int, ...], part: ShardSpec) -> Tensor:
    """The view of rectangle `part` in a tensor whose first value is at `offset`."""
    for dim, size in enumerate(part.local_shape):
        tensor = tensor.narrow(dim, part.offset[dim] - offset[dim], size)
    return tensor
