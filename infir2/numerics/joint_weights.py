"""Quantizing the small weights of many layers together on a CPU.

A small operation costs a CPU more than its arithmetic. Weights that lie one below the other, each
padded to whole 128x128 blocks, have the blocks that they have alone, so the bits are the same.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infir2.numerics.formats import GROUP, TILE_BLOCK, Fp8Tensor
from infir2.numerics.ops_reference import scale_format_of
from infir2.numerics.quantize import dequantize, quantize_weight
from infir2.numerics.weight_cache import is_missing, replace_cached

_SMALL = 1 << 18  # values; larger weights gain nothing, and their copies would take memory


def quantize_together(layers: Iterable[nn.Linear]) -> None:
    """Cache codes and values of small FP8 weights that changed, as `Fp8Linear` does one by one."""
    groups: dict[tuple[str, int], list[nn.Linear]] = defaultdict(list)
    for layer in layers:
        if _is_small_fp8(layer) and _is_stale(layer):
            groups[scale_format_of(layer), layer.in_features].append(layer)
    for (scale_format, _), group in groups.items():
        # The values outlive an inference_mode block around this call.
        with torch.inference_mode(False), torch.no_grad():
            _quantize_group(group, scale_format)


def _is_small_fp8(layer: nn.Linear) -> bool:
    weight = cast(Tensor | None, layer.weight)  # None after `load_codes`
    if not scale_format_of(layer) or weight is None or weight.dtype != torch.float32:
        return False
    return weight.numel() <= _SMALL


def _is_stale(layer: nn.Linear) -> bool:
    return is_missing(layer.weight, ("fp8", scale_format_of(layer)))


def _quantize_group(layers: list[nn.Linear], scale_format: str) -> None:
    """Weights of one width [N_i, K]."""
    stacked = quantize_weight(torch.cat([_whole_blocks(layer) for layer in layers]), scale_format)
    wide = dequantize(stacked, torch.float64)
    # Exact products, rounded once: what `dequantize` to FP32 returns.
    values = {dtype: wide.to(dtype) for dtype in (torch.float64, torch.float32)}
    row = 0
    for layer in layers:
        rows = slice(row, row + layer.out_features)
        blocks = slice(row // GROUP, -(-rows.stop // GROUP))
        codes = Fp8Tensor(stacked.codes[rows], stacked.scale[blocks], TILE_BLOCK, scale_format)
        cast(Any, layer).quantizations += 1
        replace_cached(layer.weight, ("fp8", scale_format), codes)
        for dtype, each in values.items():
            replace_cached(layer.weight, ("fp8", scale_format, dtype), each[rows])
        row = blocks.stop * GROUP


def _whole_blocks(layer: nn.Linear) -> Tensor:
    weight = layer.weight.detach()
    missing = -weight.shape[0] % GROUP
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight
