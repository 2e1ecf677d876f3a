"""The kernels as functions of `Fp8Tensor`: FP8 conversions, and producers with a fused quantizer.

Conversions have the signatures and the bits of `infir2.numerics.quantize_reference`. Importing this
file imports triton but does not initialize a device. With TRITON_INTERPRET=1 set before the import
the kernels run on CPU tensors, so that tests can compare them with the reference without a GPU.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infir2.numerics import quantize_reference as reference
from infir2.numerics.formats import (
    E4M3,
    GROUP,
    ROW_BLOCK,
    TILE_BLOCK,
    Fp8Tensor,
    WeightRows,
    check_format,
)
from infir2.numerics.kernels import conversions, norm, quantizers, swiglu
from infir2.numerics.kernels import weights as weight_kernels
from infir2.numerics.kernels.head import head_product as head_product
from infir2.numerics.kernels.norm import rms_norm as rms_norm
from infir2.numerics.kernels.norm import rms_norm_backward as rms_norm_backward
from infir2.numerics.kernels.rope import rope as rope
from infir2.numerics.kernels.sampling import sample_rows as sample_rows
from infir2.numerics.kernels.softmax import label_logprobs as label_logprobs
from infir2.numerics.kernels.softmax import label_logprobs_backward as label_logprobs_backward
from infir2.numerics.kernels.stacking import MOST_PARTS, stack_tiles
from infir2.numerics.kernels.swiglu import swiglu_backward as swiglu_backward

swiglu_product = swiglu.swiglu


def quantize(
    x: Tensor, block: tuple[int, int] = ROW_BLOCK, scale_format: str = "pow2"
) -> Fp8Tensor:
    """x [R, C] (BF16, FP16, FP32) in 1x128 or 128x128 blocks; ValueError for others."""
    pow2 = _is_pow2(scale_format, block)
    if tuple(block) == ROW_BLOCK:
        codes, scale = quantizers.quantize_rows(x, pow2)
    else:
        codes, scale = quantizers.quantize_tiles(x, pow2, False)
    return Fp8Tensor(codes, scale, (block[0], block[1]), scale_format)


def transpose(t: Fp8Tensor) -> Fp8Tensor:
    """The transposed matrix [C, R] in 128x128 blocks, from codes; ValueError for 1x128 "fp32"."""
    if t.block == TILE_BLOCK:
        return _fp8(conversions.transpose_tiles(t.codes, t.scale), TILE_BLOCK, t.scale_format)
    if t.scale_format != "pow2":
        raise ValueError(
            '1x128 codes with "fp32" scales cannot be transposed exactly; '
            'use quantize(x.T, (128, 128), "fp32")'
        )
    return _fp8(conversions.transpose_rows(t.codes, t.scale), TILE_BLOCK, "pow2")


def stack(parts: Sequence[Fp8Tensor], transposed: bool = False) -> Fp8Tensor:
    """128x128 matrices [N_i, K] as one [N, K], or transposed [K, N].

    All but the last have a multiple of 128 rows.
    """
    if len(parts) > MOST_PARTS:
        codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(E4M3)
        scale = torch.cat([part.scale for part in parts])
        stacked = Fp8Tensor(codes, scale, TILE_BLOCK, parts[0].scale_format)
        return transpose(stacked) if transposed else stacked
    codes_and_scales = [part.codes for part in parts], [part.scale for part in parts]
    return _fp8(stack_tiles(*codes_and_scales, transposed), TILE_BLOCK, parts[0].scale_format)


def dequantize(t: Fp8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`codes * scale` [R, C] in `dtype`; only BF16 from 1x128 blocks has a kernel."""
    if dtype != torch.bfloat16 or t.block != ROW_BLOCK:
        return reference.dequantize(t, dtype)
    values: Tensor = conversions.dequantize_rows(t.codes, t.scale)
    return values


def quantize_gradient(grad: Tensor, scale_format: str = "pow2") -> tuple[Fp8Tensor, Fp8Tensor]:
    """`quantize(grad)` and `quantize(grad.T)`, both 1x128, from one read of grad [T, N]."""
    *rows, codes_t, scale_t = quantizers.quantize_rows_and_columns(grad, _is_pow2(scale_format))
    return _fp8(rows, ROW_BLOCK, scale_format), _fp8((codes_t, scale_t), ROW_BLOCK, scale_format)


def quantize_input(x: Tensor, scale_format: str = "pow2") -> tuple[Fp8Tensor, Fp8Tensor]:
    """`quantize(x)` and the weight gradient's operand, from one read of x [T, K].

    The operand has 128x128 blocks of x.T: `transpose(quantize(x))` for "pow2", and
    `quantize(x.T, (128, 128), "fp32")` for "fp32".
    """
    # Triton 3.6 folds a row stride of 1 into wrong addresses in this kernel.
    if x.shape[1] == 1:
        row_blocks = reference.quantize(x, ROW_BLOCK, scale_format)
        if scale_format == "pow2":
            return row_blocks, reference.transpose(row_blocks)
        return row_blocks, reference.quantize(x.t(), TILE_BLOCK, scale_format)
    *rows, codes_t, scale_t = quantizers.quantize_rows_and_tiles(x, _is_pow2(scale_format))
    return _fp8(rows, ROW_BLOCK, scale_format), _fp8((codes_t, scale_t), TILE_BLOCK, scale_format)


def quantize_transposed(x: Tensor, scale_format: str = "pow2") -> Fp8Tensor:
    """Only the second result of `quantize_input`, for an x [T, K] that is saved elsewhere."""
    pow2 = _is_pow2(scale_format)
    return _fp8(quantizers.quantize_transposed(x, pow2), TILE_BLOCK, scale_format)


def quantize_weight(master: Tensor, scale_format: str = "pow2") -> Fp8Tensor:
    """128x128 blocks of the BF16-rounded master [N, K]."""
    pow2 = _is_pow2(scale_format)
    return _fp8(quantizers.quantize_tiles(master, pow2, True), TILE_BLOCK, scale_format)


def quantize_weights(weights: Sequence[WeightRows], scale_format: str = "pow2") -> None:
    """`quantize_weight` of many masters in one launch; fills in their codes and scales."""
    weight_kernels.quantize_weights(weights, _is_pow2(scale_format))


def weight_quantizer(
    weights: Sequence[WeightRows], scale_format: str = "pow2"
) -> Callable[[], None]:
    """`quantize_weights` to be launched any number of times, with the same memory."""
    return weight_kernels.prepare(weights, _is_pow2(scale_format))


def largest_magnitudes(weights: Sequence[WeightRows]) -> None:
    """Write the largest magnitudes of all rows' blocks as their scales, in one launch."""
    weight_kernels.largest_magnitudes(weights)


def encode_weights(weights: Sequence[WeightRows], scale_format: str = "pow2") -> None:
    """Fill in the codes of rows whose blocks have their scales, in one launch."""
    weight_kernels.encode_weights(weights, _is_pow2(scale_format))


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, scale_format: str = "pow2"
) -> tuple[Fp8Tensor, Tensor]:
    """`quantize(rms_norm(x))` for x [T, D] BF16, and rstd [T] float32 for the backward."""
    codes, scale, rstd = norm.rms_norm_quantize(x, weight, eps, _is_pow2(scale_format))
    return Fp8Tensor(codes, scale, ROW_BLOCK, scale_format), rstd


def rms_norm_transposed(
    x: Tensor, rstd: Tensor, weight: Tensor, scale_format: str = "pow2"
) -> Fp8Tensor:
    """The second result of `quantize_input(rms_norm(x))`, recomputed from x [T, D] and rstd [T]."""
    pow2 = _is_pow2(scale_format)
    return _fp8(norm.rms_norm_transposed(x, rstd, weight, pow2), TILE_BLOCK, scale_format)


def swiglu_quantize(gate: Tensor, up: Tensor, scale_format: str = "pow2") -> Fp8Tensor:
    """`quantize(silu(gate) * up)`, both [T, F] BF16."""
    return _fp8(swiglu.swiglu_quantize(gate, up, _is_pow2(scale_format)), ROW_BLOCK, scale_format)


def swiglu_transposed(gate: Tensor, up: Tensor, scale_format: str = "pow2") -> Fp8Tensor:
    """The second result of `quantize_input(silu(gate) * up)`, from gate and up [T, F]."""
    pow2 = _is_pow2(scale_format)
    return _fp8(swiglu.swiglu_transposed(gate, up, pow2), TILE_BLOCK, scale_format)


def swiglu_backward_quantize(
    grad: Tensor, gate: Tensor, up: Tensor, scale_format: str = "pow2"
) -> tuple[Fp8Tensor, Fp8Tensor]:
    """`quantize_gradient([dgate | dup])` [T, 2F] for grad, gate, up [T, F].

    The BF16 gradient itself is never written. Raises ValueError if 128 does not divide F, because
    blocks would then straddle the two halves.
    """
    if grad.shape[1] % GROUP:
        raise ValueError(
            f"a fused gate/up gradient needs F divisible by 128, got {grad.shape[1]}; "
            "quantize the halves of swiglu_backward"
        )
    pow2 = _is_pow2(scale_format)
    *rows, codes_t, scale_t = swiglu.swiglu_backward_quantize(grad, gate, up, pow2)
    return _fp8(rows, ROW_BLOCK, scale_format), _fp8((codes_t, scale_t), ROW_BLOCK, scale_format)


def _fp8(parts: Sequence[Tensor], block: tuple[int, int], scale_format: str) -> Fp8Tensor:
    codes, scale = parts
    return Fp8Tensor(codes, scale, block, scale_format)


def _is_pow2(scale_format: str, block: tuple[int, int] = ROW_BLOCK) -> bool:
    check_format(block, scale_format)
    return scale_format == "pow2"
