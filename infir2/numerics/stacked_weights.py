"""Weights of layers that share an input, stacked to one matrix, so that they need three GEMMs.

    W = [W_0; W_1; ...]   [N, K], N the sum of the layers' rows

The layers can be stacked if all are BF16, or if all are FP8 with one scale format and every layer
but the last has a multiple of 128 rows, so that the 128x128 blocks of W are those of the layers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from infir2.numerics.formats import GROUP, TILE_BLOCK, Fp8Tensor, WeightRows
from infir2.numerics.kernels import api as kernels
from infir2.numerics.kernels.buffers import empty_codes, empty_tile_scales
from infir2.numerics.ops_reference import scale_format_of
from infir2.numerics.quantize import nonfinite_blocks
from infir2.numerics.weight_cache import cached_jointly, is_missing, replace_cached, rounded

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
        biases = [layer.bias for layer in self.layers]
        present = [bias for bias in biases if bias is not None]

        def compute() -> Tensor:
            sizes = zip(biases, self.sizes, strict=True)
            return torch.cat(
                [present[0].new_zeros(n) if b is None else b.detach() for b, n in sizes]
            )

        if len(biases) == 1:
            return None if biases[0] is None else biases[0].detach()
        return cached_jointly(present, "stacked bias", compute) if present else None

    def operand(self) -> Operand:
        """W as the forward reads it: codes [N, K], or BF16."""
        return _stacked_codes(self.layers) if self.scale_format else _stacked_values(self.layers)

    def operand_t(self, keep: bool) -> Operand:
        """W as the input gradient reads it: codes of W.T [K, N], or W in BF16.

        `keep`: cache the transposed codes until the weights change.
        """
        if (
            self.scale_format
            and len(self.layers) > 1
            and hasattr(self.layers[0].weight, "precomputed")
        ):
            return kernels.stack(_codes_of(self.layers), transposed=True)  # gathered one by one
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


@torch.inference_mode(False)  # tensors of an engine's pass would serve no training step
@torch.no_grad()
def quantize_weights(groups: Iterable[Sequence[nn.Linear]]) -> None:
    """Quantize the FP8 weights that changed, in one launch, as `Stack.operand` reads them.

    Optional: `Stack.operand` quantizes one weight at a time, at four launches or more for a group.

    Args:
        groups: the layers of each operation; other than FP8 layers with FP32 masters are left out.
    """
    stacks = [stacked for stacked in _with_masters(groups) if _has_stale_codes(stacked)]
    outputs = [_empty_stack(stacked) for stacked in stacks]
    for launch in _launches(stacks, outputs):
        launch()
    for stacked, codes in zip(stacks, outputs, strict=True):
        nonfinite_blocks.add(codes.scale)
        _cache_codes(stacked.layers, codes)


def requantizer(groups: Iterable[Sequence[nn.Linear]]) -> Callable[[], Tensor] | None:
    """A function that quantizes all weights again, into the memory of the codes that are cached.

    None without FP8 weights. It returns the number of blocks with an Inf or NaN, int64 []. It may
    be captured in a CUDA graph, which then reads memory of the function and of the codes.

    Args:
        groups: as for `quantize_weights`, which has run.
    """
    stacks = _with_masters(groups)
    outputs = [_stacked_codes(stacked.layers) for stacked in stacks]
    launches = _launches(stacks, outputs)
    if not stacks:
        return None

    def requantize() -> Tensor:
        for launch in launches:
            launch()
        return torch.cat([codes.scale.flatten() for codes in outputs]).isnan().sum()

    return requantize


def _launches(stacks: Sequence[Stack], outputs: Sequence[Fp8Tensor]) -> list[Callable[[], None]]:
    """One launch per scale format, which writes the outputs."""
    rows: dict[str, list[WeightRows]] = defaultdict(list)
    for stacked, codes in zip(stacks, outputs, strict=True):
        rows[codes.scale_format] += _rows_of(stacked, codes)
    return [kernels.weight_quantizer(each, scale_format) for scale_format, each in rows.items()]


def _with_masters(groups: Iterable[Sequence[nn.Linear]]) -> list[Stack]:
    return [each for group in groups for each in _stacks_of(group) if _has_masters(each)]


def _stacks_of(layers: Sequence[nn.Linear]) -> list[Stack]:
    """The layers as one matrix, or as one each."""
    stacked = stack(layers)
    return [stacked] if stacked else [Stack((layer,)) for layer in layers]


def _has_masters(stacked: Stack) -> bool:
    """Whether the layers are FP8 layers with FP32 masters."""
    weights = [layer.weight for layer in stacked.layers]
    return bool(stacked.scale_format) and all(
        weight is not None and weight.dtype == torch.float32 for weight in weights
    )


def _has_stale_codes(stacked: Stack) -> bool:
    key = ("fp8", stacked.scale_format)
    return any([is_missing(layer.weight, key) for layer in stacked.layers])


def _empty_stack(stacked: Stack) -> Fp8Tensor:
    like, rows = stacked.layers[0].weight, sum(stacked.sizes)
    codes = empty_codes(like, rows, like.shape[1])
    scale = empty_tile_scales(like, rows, like.shape[1])
    return Fp8Tensor(codes, scale, TILE_BLOCK, stacked.scale_format)


def _rows_of(stacked: Stack, codes: Fp8Tensor) -> list[WeightRows]:
    """The masters of the layers, and the parts of `codes` that are theirs."""
    parts = _parts(stacked.layers, codes)
    return [
        WeightRows(layer.weight.detach(), 0, part.scale, part.codes)
        for layer, part in zip(stacked.layers, parts, strict=True)
    ]


def _cache_codes(layers: tuple[nn.Linear, ...], codes: Fp8Tensor) -> None:
    """Make `codes` what the layers, alone and together, have cached."""
    for layer, part in zip(layers, _parts(layers, codes), strict=True):
        fp8 = cast(Any, layer)
        fp8.quantizations += is_missing(layer.weight, ("fp8", codes.scale_format))
        replace_cached(layer.weight, ("fp8", codes.scale_format), part)
    if len(layers) > 1:
        cached_jointly([layer.weight for layer in layers], "stacked codes", lambda: codes)


def _stacked_codes(layers: tuple[nn.Linear, ...]) -> Fp8Tensor:
    parts = _codes_of(layers)
    if len(parts) == 1:
        return parts[0]

    def compute() -> Fp8Tensor:
        stacked = kernels.stack(parts)
        _replace_by_views(layers, stacked)
        return stacked

    return cached_jointly([_versioned_tensor(layer) for layer in layers], "stacked codes", compute)


def _codes_of(layers: tuple[nn.Linear, ...]) -> list[Fp8Tensor]:
    return [cast(Any, layer).quantized_weight() for layer in layers]


def _replace_by_views(layers: tuple[nn.Linear, ...], stacked: Fp8Tensor) -> None:
    """Replace each layer's cached codes by views of the stacked ones, which frees their memory."""
    for layer, part in zip(layers, _parts(layers, stacked), strict=True):
        replace_cached(_versioned_tensor(layer), ("fp8", stacked.scale_format), part)


def _parts(layers: tuple[nn.Linear, ...], stacked: Fp8Tensor) -> list[Fp8Tensor]:
    """Views of the codes and scales of each layer."""
    rows = [layer.out_features for layer in layers]
    codes = stacked.codes.split(rows)
    scales = stacked.scale.split([-(-number // GROUP) for number in rows])
    return [
        Fp8Tensor(*part, TILE_BLOCK, stacked.scale_format)
        for part in zip(codes, scales, strict=True)
    ]


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
