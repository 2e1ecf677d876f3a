"""Our weights as a Megatron-core `torch_dist` checkpoint.

`dist_checkpointing.load` reads it into a GPTModel. Layers are stacked in a leading dimension and
written one chunk per layer, so memory holds one matrix of one layer. The `_extra_state` entries
that a GPTModel asks for are written empty. `megatron_names` documents keys and layouts.
"""

import argparse
import errno
import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from infir2.convert.megatron_names import ARGUMENTS, LAYER, LAYERS, OUTSIDE_LAYERS, QKV
from infir2.convert.weights import Weights, hf_weights, run_weights
from infir2.directories import new_directory
from infir2.errors import first_line
from infir2.model import ModelConfig
from infir2.parallel.shard_spec import ShardSpec, unsharded
from infir2.terminal import byte_progress

# Modules of a layer that ask for an `_extra_state` entry.
_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class _Chunk:
    """One write: Hugging Face tensors, concatenated, as one part of a tensor of Megatron's."""

    key: str  # Megatron's
    names: tuple[str, ...]  # Hugging Face's
    spec: ShardSpec

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, torch.Size(self.spec.offset))


def export_megatron(src: str | Path, out: str | Path) -> None:
    """Write weights in BF16 as a Megatron-core `torch_dist` checkpoint.

    Args:
        src: run directory (its newest checkpoint), `checkpoints/step-N`, or a BF16 Hugging Face
            directory.
        out: directory to create. It gets the `release` directory and the tracker file that
            Megatron's `--load` expects. After an error it does not exist.

    Raises:
        OutputExistsError: `out` exists.
        CheckpointError: `src` is unreadable or incomplete, a weight is not finite, or the disk is
            full.
    """
    src = Path(src)
    with new_directory(Path(out)) as work:
        is_hf = (src / "config.json").is_file()
        weights = hf_weights(src, quantized=False) if is_hf else run_weights(src)
        _write(work / "release", weights, ModelConfig.from_hf(weights.config))
        (work / "latest_checkpointed_iteration.txt").write_text("release\n")


def _write(directory: Path, weights: Weights, config: ModelConfig) -> None:
    directory.mkdir()
    chunks = list(_chunks(weights.shapes, config.num_layers))
    label = f"exporting {directory.parent.name}"
    with byte_progress(label, weights.num_bf16_bytes) as on_bytes, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that there is no process group
        writer = dcp.FileSystemWriter(directory)
        planner = _Planner(chunks, weights, config, on_bytes)
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except dcp.api.CheckpointException as error:
            raise _disk_error(error.failures[0][0]) from None
    common = {"iteration": 0, "checkpoint_version": 3.0, "args": _arguments(config)}
    try:
        torch.save(common, directory / "common.pt")
    except RuntimeError as error:
        raise _disk_error(error) from None
    (directory / "metadata.json").write_text(json.dumps(_METADATA))


def _disk_error(error: BaseException) -> BaseException:
    """The OSError behind an error of torch's writer, which fails once more when it closes."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None and isinstance(error, RuntimeError) and "inline_container" in str(error):
        return OSError(errno.EIO, f"torch could not write it, {first_line(error)}")
    return cause or error


def _chunks(shapes: dict[str, tuple[int, ...]], num_layers: int) -> Iterator[_Chunk]:
    """Chunks that cover every tensor of `shapes` once."""
    remaining = set(shapes)
    for key, name in OUTSIDE_LAYERS.items():
        if name in remaining:  # a tied model has no head
            remaining.discard(name)
            yield _Chunk(key, (name,), unsharded(shapes[name]))
    for layer in range(num_layers):
        for suffix, parts in LAYER.items():
            names = tuple(f"model.layers.{layer}.{part}" for part in parts)
            if not remaining.issuperset(names):
                continue  # biases and QK norms, which not every model has
            remaining.difference_update(names)
            shape = (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
            offset = (layer, *(0 for _ in shape))
            spec = ShardSpec((num_layers, *shape), offset, local_shape=(1, *shape))
            yield _Chunk(LAYERS + suffix, names, spec)
    assert not remaining, f"Megatron has no tensor for {sorted(remaining)}"


class _Planner(dcp.DefaultSavePlanner):
    """Plans one write per chunk and reads a chunk's weights only when it is written."""

    def __init__(
        self,
        chunks: list[_Chunk],
        weights: Weights,
        config: ModelConfig,
        on_bytes: Callable[[int], None],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights, self._config, self._on_bytes = weights, config, on_bytes
        self._chunks = {chunk.index: chunk for chunk in chunks}

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(chunk) for chunk in self._chunks.values()]
        num_layers = self._config.num_layers
        for module in _EXTRA_STATES:
            for layer in range(num_layers):
                index = MetadataIndex(f"{LAYERS}{module}._extra_state/shard_{layer}_{num_layers}")
                items.append(WriteItem(index, WriteItemType.BYTE_IO))
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            empty_state = io.BytesIO()
            torch.save([None], empty_state)  # a list of one rank's shards
            return empty_state
        chunk = self._chunks[write_item.index]
        tensors = [self._weights.read_bf16(name) for name in chunk.names]
        if len(tensors) == len(QKV):
            tensors = [_fuse_qkv(tensors, self._config.num_kv_heads)]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        self._on_bytes(2 * tensor.numel())
        return tensor.reshape(chunk.spec.local_shape)


def _fuse_qkv(tensors: list[Tensor], num_groups: int) -> Tensor:
    """Queries, keys and values, each [rows, ...], as [G, (N/G + 2) * H, ...]."""
    grouped = [part.reshape(num_groups, -1, *part.shape[1:]) for part in tensors]
    return torch.cat(grouped, dim=1)


def _write_item(chunk: _Chunk) -> WriteItem:
    spec = chunk.spec
    storage = ChunkStorageMetadata(torch.Size(spec.offset), torch.Size(spec.local_shape))
    properties = TensorProperties(dtype=torch.bfloat16)
    data = TensorWriteData(storage, properties, torch.Size(spec.global_shape))
    return WriteItem(chunk.index, WriteItemType.SHARD, tensor_data=data)


def _arguments(config: ModelConfig) -> argparse.Namespace:
    """Megatron's arguments for the shape, which it compares with those of the loading command."""
    values: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in ARGUMENTS.items()}
    values |= {
        "group_query_attention": True,
        "num_query_groups": config.num_kv_heads,
        "max_position_embeddings": config.max_positions,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rope_scaling": config.rope_scaling is not None,
        "add_bias_linear": config.mlp_bias,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm,
        "swiglu": True,
        "untie_embeddings_and_output_weights": not config.tie_embeddings,
        "padded_vocab_size": config.vocab_size,
    }
    return argparse.Namespace(**values)
