"""Our weights as a Megatron-core `torch_dist` checkpoint, which `dist_checkpointing.load` reads into a GPTModel.

Layers are stacked in a leading dimension, one chunk per layer, so that memory holds one layer's matrix. `megatron.py` has the
keys. Modules' `_extra_state` entries, which a GPTModel asks for, are written empty.
"""

import argparse
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

from infir2.convert.megatron_import import ARGUMENTS, LAYER, LAYERS, OUTSIDE
from infir2.convert.weights import Weights, hf_weights, run_weights
from infir2.model import ModelConfig
from infir2.model.safetensors_io import new_directory
from infir2.terminal import byte_progress

_EXTRA_STATES = [
    f"self_attention.{name}" for name in ("linear_qkv", "core_attention", "linear_proj")
]
_EXTRA_STATES += ["mlp.linear_fc1", "mlp.linear_fc2"]
_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class _Piece:
    """What is written at one time: Hugging Face tensors `names` as the part at `offsets` of Megatron's tensor `key`."""

    key: str
    names: tuple[str, ...]
    shape: tuple[int, ...]  # of this piece
    whole: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, torch.Size(self.offsets))


def export_megatron(src: str | Path, out: str | Path) -> None:
    """Write a run's weights (newest checkpoint, or the one named) or a BF16 Hugging Face directory as `torch_dist`, in BF16.

    `out` gets the `release` directory and the tracker file that Megatron's `--load` expects. Raises OutputExistsError,
    CheckpointError (bad source, full disk); nothing is left at `out` then.
    """
    src = Path(src)
    with new_directory(Path(out)) as work:
        weights = (
            hf_weights(src, quantized=False)
            if (src / "config.json").is_file()
            else run_weights(src)
        )
        _write(work / "release", weights, ModelConfig.from_hf(weights.config))
        (work / "latest_checkpointed_iteration.txt").write_text("release\n")


def _write(directory: Path, weights: Weights, config: ModelConfig) -> None:
    directory.mkdir()
    with (
        byte_progress(f"exporting {directory.parent.name}", weights.num_bf16_bytes) as on_bytes,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)  # torch remarks that no process group runs
        planner = _Planner(
            list(_pieces(weights.shapes, config.num_layers)), weights, config, on_bytes
        )
        try:
            dcp.save(
                {}, storage_writer=dcp.FileSystemWriter(directory), planner=planner, no_dist=True
            )
        except dcp.api.CheckpointException as error:
            raise error.failures[0][0] from None
    torch.save(
        {"iteration": 0, "checkpoint_version": 3.0, "args": _arguments(config)},
        directory / "common.pt",
    )
    (directory / "metadata.json").write_text(json.dumps(_METADATA))


def _pieces(shapes: dict[str, tuple[int, ...]], num_layers: int) -> Iterator[_Piece]:
    left = set(shapes)
    for key, name in OUTSIDE.items():
        if name in left:  # a tied model has no head
            left.discard(name)
            yield _Piece(key, (name,), shapes[name], shapes[name], (0,) * len(shapes[name]))
    for layer in range(num_layers):
        for suffix, parts in LAYER.items():
            names = tuple(f"model.layers.{layer}.{part}" for part in parts)
            if left.issuperset(names):
                left.difference_update(names)
                shape = (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
                yield _Piece(
                    LAYERS + suffix,
                    names,
                    (1, *shape),
                    (num_layers, *shape),
                    (layer, *(0 for _ in shape)),
                )
    assert not left, f"no place in Megatron for {sorted(left)}"


class _Planner(dcp.DefaultSavePlanner):
    """Plans one write per piece and makes each piece when it is written."""

    def __init__(
        self,
        pieces: list[_Piece],
        weights: Weights,
        config: ModelConfig,
        on_bytes: Callable[[int], None],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights, self._config, self._on_bytes = weights, config, on_bytes
        self._pieces = {piece.index: piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        items, layers = (
            [self._item(piece) for piece in self._pieces.values()],
            self._config.num_layers,
        )
        for module in _EXTRA_STATES:
            for layer in range(layers):
                index = MetadataIndex(f"{LAYERS}{module}._extra_state/shard_{layer}_{layers}")
                items.append(WriteItem(index, WriteItemType.BYTE_IO))
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # a list of the shards of one rank
            return nothing
        piece = self._pieces[write_item.index]
        tensors = [self._weights.read_bf16(name) for name in piece.names]
        if (
            "linear_qkv." in piece.key and len(tensors) == 3
        ):  # per group its queries, its key, its value
            groups = self._config.num_kv_heads
            tensors = [
                torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in tensors], dim=1)
            ]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        self._on_bytes(2 * whole.numel())
        return whole.reshape(piece.shape)

    @staticmethod
    def _item(piece: _Piece) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.shape))
        data = TensorWriteData(
            chunk, TensorProperties(dtype=torch.bfloat16), torch.Size(piece.whole)
        )
        return WriteItem(piece.index, WriteItemType.SHARD, tensor_data=data)


def _arguments(config: ModelConfig) -> argparse.Namespace:
    """Megatron's own words for the shape, which it compares with those of the command that loads."""
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
