"""Weights of layers that share an input, stacked to one matrix, so that they need three GEMMs.

    W = [W_0; W_1; ...]   [N, K], N the sum of the layers' rows

The layers can be stacked if all are BF16, or if all are FP8 with one scale format and every layer
but the last has a multiple of 128 rows, so that the 128x128 blocks of W are those of the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from infir2.numerics.formats import GROUP, TILE_BLOCK, Fp8Tensor
from infir2.numerics.kernels import api as kernels
from infir2.numerics.ops_reference import scale_format_of
from infir2.numerics.weight_cache import cached_jointly, replace_cached, rounded

Operand = Tensor | Fp8Tensor  # of a GEMM: BF16, or codes


@dataclass(frozen=True)
class Stack:
    """Layers that share an input, multiplied as one matrix W [N, K]."""

    layers: tuple[nn.Linear, ...]

    @property
    def scale_format(self) -> str:
        """Scale format of the codes, "" for BF16."""
        return scale_format_of(self.layers[0])

    @property
    def sizes(self) -> list[int]:
        """Number of rows of each layer."""
        return [layer.out_features for layer in self.layers]

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """(weight, bias) of each layer, flat."""
        return tuple(p for layer in self.layers for p in (layer.weight, layer.bias))

    def bias(self) -> Tensor | None:
        """FP32 [N], with zeros for layers without bias; None if no layer has one."""
        if all(layer.bias is None for layer in self.layers):
            return None
        return torch.cat(
            [
                layer.weight.new_zeros(layer.out_features)
                if layer.bias is None
                else layer.bias.detach()
                for layer in self.layers
            ]
        )

    def operand(self) -> Operand:
        """W as the forward reads it: codes [N, K], or BF16."""
        return _stacked_codes(self.layers) if self.scale_format else _stacked_values(self.layers)

    def operand_t(self, keep: bool) -> Operand:
        """W as the input gradient reads it: codes of W.T [K, N], or W in BF16.

        `keep`: cache the transposed codes until the weights change.
        """
        codes = self.operand()
        if isinstance(codes, Tensor):
            return codes
        if not keep:
            return kernels.transpose(codes)
        weights = [_versioned_tensor(layer) for layer in self.layers]
        return cached_jointly(weights, "transposed", lambda: kernels.transpose(codes))


def stack(layers: Sequence[nn.Linear]) -> Stack | None:
    """The layers as one matrix; None if they differ in kind or their blocks do not align."""
    formats = {scale_format_of(layer) for layer in layers}
    aligned = "" in formats or all(layer.out_features % GROUP == 0 for layer in layers[:-1])
    return Stack(tuple(layers)) if len(formats) == 1 and aligned else None


def _stacked_codes(layers: tuple[nn.Linear, ...]) -> Fp8Tensor:
    parts: list[Fp8Tensor] = [cast(Any, layer).quantized_weight() for layer in layers]
    if len(parts) == 1:
        return parts[0]

    def compute() -> Fp8Tensor:
        codes = torch.cat([part.codes.view(torch.uint8) for part in parts])
        scale = torch.cat([part.scale for part in parts])
        stacked = Fp8Tensor(
            codes.view(parts[0].codes.dtype), scale, TILE_BLOCK, parts[0].scale_format
        )
        _replace_by_views(layers, parts, stacked)
        return stacked

    return cached_jointly([_versioned_tensor(layer) for layer in layers], "stacked codes", compute)


def _replace_by_views(
    layers: tuple[nn.Linear, ...], parts: list[Fp8Tensor], stacked: Fp8Tensor
) -> None:
    """Replace each layer's cached codes by views of the stacked ones, which frees their memory."""
    codes = stacked.codes.split([part.shape[0] for part in parts])
    scales = stacked.scale.split([part.scale.shape[0] for part in parts])
    for layer, layer_codes, scale in zip(layers, codes, scales, strict=True):
        view = Fp8Tensor(layer_codes, scale, TILE_BLOCK, stacked.scale_format)
        replace_cached(_versioned_tensor(layer), ("fp8", stacked.scale_format), view)


def _stacked_values(layers: tuple[nn.Linear, ...]) -> Tensor:
    first = layers[0].weight
    if len(layers) == 1 and hasattr(first, "precomputed"):  # FSDP2 gathered it in BF16
        return rounded(first, torch.bfloat16, torch.bfloat16)

    def compute() -> Tensor:
        rows = [layer.out_features for layer in layers]
        stacked = torch.empty(
            (sum(rows), first.shape[1]), dtype=torch.bfloat16, device=first.device
        )
        for part, layer in zip(stacked.split(rows), layers, strict=True):
            part.copy_(layer.weight.detach())
        return stacked

    return cached_jointly([layer.weight for layer in layers], "stacked values", compute)


def _versioned_tensor(layer: nn.Linear) -> Tensor:
    """The tensor whose version the layer's codes belong to: the master, or the loaded bytes."""
    return layer.weight if layer.weight is not None else layer.code_bytes
