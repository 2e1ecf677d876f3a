"""Operands and products of a linear layer's three GEMMs, emulated on dequantized values.

`linear` describes the GEMMs. The forward sums in FP64 and rounds once, so that a token's result
does not depend on the batch around it; the backward sums in FP32. The operands of the backward are
temporary, so their values are computed without encoding and decoding codes (`round_to_e4m3_`).
Tests hold them equal to `dequantize(quantize(...))` and `dequantize(transpose(...))`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infir2.numerics.formats import GROUP, ROW_BLOCK, TILE_BLOCK, Fp8Tensor
from infir2.numerics.quantize import dequantize, nonfinite_blocks, quantize
from infir2.numerics.quantize_reference import as_tiles, block_scale, decode, tile_scales

_EXPONENT_BITS = 0x7F800000
_SMALLEST_NORMAL = 2.0**-6
# The last bit of 1.5 * 2**20 * p, p a power of two, is p / 8: adding it to a number in [p, 2p)
# rounds the number to three bits after the leading one.
_ROUNDER = 1.5 * 2.0**20


def plain_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which unquantized operands of the forward are multiplied.

    FP64 on a CPU; their own on a GPU, which sums in FP32.
    """
    return x.dtype if x.is_cuda else torch.float64


def backward_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which unquantized operands of the backward are multiplied, with FP32 sums."""
    return x.dtype if x.is_cuda else torch.float32


def output(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x @ weight.T + bias` [T, N], rounded once to `dtype`.

    x [T, K] and weight [N, K] are both FP64 or both `dtype`; bias [N] has any dtype.
    """
    if x.dtype == dtype:
        return F.linear(x, weight, bias)
    out = x @ weight.t()
    if bias is not None:
        out += bias
    return out.to(dtype)


def quantize_input(x: Tensor, scale_format: str) -> tuple[Fp8Tensor, Tensor]:
    """The 1x128 codes of x [T, K], and the FP64 values [T, K] that the forward multiplies."""
    codes = quantize(x, ROW_BLOCK, scale_format)
    return codes, dequantize(codes, torch.float64)


def input_for_backward(x: Tensor, codes: Fp8Tensor) -> Fp8Tensor:
    """Codes for the weight gradient: of x in 1x128 ("pow2"), or of x.T in 128x128 ("fp32")."""
    if codes.scale_format == "pow2":
        return codes
    return quantize(x.t(), TILE_BLOCK, codes.scale_format)


def fp32_product(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """`a @ b` [M, N] FP32 with FP32 sums, for matrices of one dtype; added to `total` in place."""
    if a.is_cuda and a.dtype != torch.float32:
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    a, b = a.float(), b.float()
    return a @ b if total is None else total.addmm_(a, b)


def input_values(saved: Fp8Tensor) -> Tensor:
    """FP32 values [T, K] of the weight gradient's x, from the result of `input_for_backward`."""
    if saved.block == TILE_BLOCK:
        return dequantize(saved).t()
    tiles = as_tiles(decode(saved.codes, torch.float32), GROUP)
    scratch = tiles.abs()
    row_scale, tile_scale = tile_scales(saved.scale, scratch.amax(dim=3) != 0)
    moved = round_to_e4m3_(tiles.mul_((row_scale / tile_scale[:, None, :])[..., None]), scratch)
    values = moved.mul_(tile_scale[:, None, :, None])
    return values.view(values.shape[0] * GROUP, values.shape[2] * GROUP)[
        : saved.shape[0], : saved.shape[1]
    ]


def gradient_values(
    grad: Tensor, scale_format: str, by_row: bool, by_column: bool
) -> tuple[Tensor | None, Tensor | None]:
    """FP32 values [T, N] of the output gradient in the requested layouts, from one read.

    Returns:
        The gradient quantized in 1x128 along N (for grad_x), and in 1x128 along the tokens (for
        grad_W), both [T, N].
    """
    rows, columns = grad.shape
    bottom, right = -rows % GROUP, -columns % GROUP
    if bottom or right:
        wide = F.pad(grad.float(), (0, right, 0, bottom))
    else:
        wide = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    # In place, with one scratch tensor: on a CPU, fresh memory costs as much as the arithmetic.
    scratch = wide.abs()
    along_columns = (rows + bottom, (columns + right) // GROUP, GROUP)
    along_tokens = ((rows + bottom) // GROUP, GROUP, columns + right)
    row_scale = _scale(scratch.view(along_columns), 2, scale_format) if by_row else None
    column_scale = _scale(scratch.view(along_tokens), 1, scale_format) if by_column else None
    row_values = column_values = None
    if row_scale is not None:
        scaled = wide.view(along_columns) / row_scale
        row_values = (
            round_to_e4m3_(scaled, scratch.view(along_columns))
            .mul_(row_scale)
            .view_as(wide)[:rows, :columns]
        )
    if column_scale is not None:
        scaled = wide.view(along_tokens).div_(column_scale)
        column_values = (
            round_to_e4m3_(scaled, scratch.view(along_tokens))
            .mul_(column_scale)
            .view_as(wide)[:rows, :columns]
        )
    return row_values, column_values


def round_to_e4m3_(values: Tensor, scratch: Tensor) -> Tensor:
    """Round FP32 values to the nearest E4M3 number (ties to even), in place; |values| < 464.

    NaN stays NaN. `scratch` is FP32 of the same shape and is overwritten.
    """
    torch.bitwise_and(values.view(torch.int32), _EXPONENT_BITS, out=scratch.view(torch.int32))
    rounder = scratch.clamp_min_(_SMALLEST_NORMAL).mul_(_ROUNDER)
    return values.add_(rounder).sub_(rounder)


def _scale(magnitude: Tensor, dim: int, scale_format: str) -> Tensor:
    """Scales of blocks along `dim` of FP32 magnitudes, with keepdim; counts non-finite blocks."""
    scale = block_scale(magnitude.amax(dim=dim, keepdim=True), scale_format)
    nonfinite_blocks.add(scale)
    return scale
