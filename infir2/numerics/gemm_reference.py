"""Operands and products of a linear layer's three GEMMs, emulated on dequantized values.

`linear` describes the GEMMs. The forward sums in FP64 and rounds once, so that a token's result
does not depend on the batch around it; the backward sums in FP32. The operands of the backward are
temporary, so their values are computed without encoding and decoding codes (`round_to_e4m3_`).
Tests hold them equal to `dequantize(quantize(...))` and `dequantize(transpose(...))`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infir2.numerics.formats import E4M3, GROUP, ROW_BLOCK, TILE_BLOCK, Fp8Tensor
from infir2.numerics.quantize import dequantize, nonfinite_blocks, quantize
from infir2.numerics.quantize_reference import (
    as_tiles,
    block_amax,
    block_scale,
    chunks,
    decode,
    tile_scales,
)

_EXPONENT_BITS = 0x7F800000
_SMALLEST_NORMAL = 2.0**-6
# The last bit of 1.5 * 2**20 * p, p a power of two, is p / 8: adding it to a number in [p, 2p)
# rounds the number to three bits after the leading one.
_ROUNDER = 1.5 * 2.0**20
# The same for multiples of the smallest number, 2**-9, whatever the leading bit.
_SUBNORMAL_ROUNDER = 1.5 * 2.0**14
# Scales that make the smallest normal number of E4M3 a normal one of FP32, and the largest number
# times `_ROUNDER` finite.
_MODERATE = (2.0**-120, 2.0**96)


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
    codes = as_tiles(saved.codes.view(torch.uint8), GROUP)
    # Eight codes at a time, without their signs.
    magnitudes = codes.view(torch.int64) & 0x7F7F7F7F7F7F7F7F
    row_scale, tile_scale = tile_scales(saved.scale, magnitudes.amax(dim=3) != 0)
    ratio = (row_scale / tile_scale[:, None, :])[..., None]
    values = torch.empty(codes.shape, device=codes.device)
    for part in chunks(codes):
        moved = decode(codes[part].view(E4M3), torch.float32, out=values[part]).mul_(ratio[part])
        # Codes have four digits and a power of two keeps them: all that can be lost is below the
        # smallest number, of which every E4M3 number is a multiple.
        moved.add_(_SUBNORMAL_ROUNDER).sub_(_SUBNORMAL_ROUNDER)
        moved.mul_(tile_scale[part, None, :, None])
    return _without_padding(values, saved.shape)


def gradient_values(
    grad: Tensor, scale_format: str, by_row: bool, by_column: bool
) -> tuple[Tensor | None, Tensor | None]:
    """FP32 values [T, N] of the output gradient in the requested layouts, from one read.

    Returns:
        The gradient quantized in 1x128 along N (for grad_x), and in 1x128 along the tokens (for
        grad_W), both [T, N].
    """
    dims = [dim for dim, wanted in ((3, by_row), (1, by_column)) if wanted]
    if not dims:  # only the bias is trained
        return None, None
    tiles = as_tiles(grad, GROUP)
    scales, are_moderate = _scales(tiles, dims, scale_format)
    values = [torch.empty(tiles.shape, device=grad.device) for _ in dims]
    shifts = are_moderate and scale_format == "pow2"
    for part in chunks(tiles):
        wide = tiles[part].float()
        rounder = _powers_of_two(wide).mul_(_ROUNDER) if shifts else None
        for scale, out in zip(scales, values, strict=True):
            _round_blocks(wide, scale[part], rounder, out[part])
    by_dim = {d: _without_padding(v, grad.shape) for d, v in zip(dims, values, strict=True)}
    return by_dim.get(3), by_dim.get(1)


def round_to_e4m3_(values: Tensor, scratch: Tensor) -> Tensor:
    """Round FP32 values to the nearest E4M3 number (ties to even), in place; |values| < 464.

    NaN stays NaN. `scratch` is FP32 of the same shape and is overwritten.
    """
    torch.bitwise_and(values.view(torch.int32), _EXPONENT_BITS, out=scratch.view(torch.int32))
    rounder = scratch.clamp_min_(_SMALLEST_NORMAL).mul_(_ROUNDER)
    return values.add_(rounder).sub_(rounder)


def _round_blocks(wide: Tensor, scale: Tensor, rounder: Tensor | None, out: Tensor) -> None:
    """Write FP32 values, rounded to E4M3 numbers times `scale`.

    `rounder` is None, or for moderate powers of two as scales the power of two in each value times
    `_ROUNDER`: rounding then commutes with scaling, so nothing is divided and multiplied.
    """
    if rounder is None:
        scaled = torch.div(wide, scale, out=out)
        round_to_e4m3_(scaled, torch.empty_like(scaled)).mul_(scale)
    else:
        rounder = torch.maximum(rounder, scale * (_SMALLEST_NORMAL * _ROUNDER))
        torch.add(wide, rounder, out=out).sub_(rounder)


def _powers_of_two(values: Tensor) -> Tensor:
    """The power of two in each FP32 value, 0 for a subnormal, Inf if it is not finite."""
    return (values.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)


def _without_padding(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The matrix of `shape` in tiles [R / 128, 128, C / 128, 128]."""
    padded = tiles.view(tiles.shape[0] * GROUP, tiles.shape[2] * GROUP)
    return padded[: shape[0], : shape[1]]


def _scales(tiles: Tensor, dims: Sequence[int], scale_format: str) -> tuple[list[Tensor], bool]:
    """Scales of blocks along each of `dims` of tiles, with keepdim; counts non-finite blocks.

    Also whether all are `_MODERATE`; False on a GPU, where the host would have to wait.
    """
    largest = block_amax(tiles, dims)
    joined = torch.cat([each.flatten() for each in largest])  # one small operation instead of two
    scale = block_scale(joined, scale_format)
    scales = scale.split([each.numel() for each in largest])
    are_moderate = False
    if scale.numel() and not scale.is_cuda:
        smallest, greatest = scale.aminmax()
        are_moderate = bool(smallest >= _MODERATE[0]) and bool(greatest <= _MODERATE[1])
    if not are_moderate:  # moderate scales are no NaN
        nonfinite_blocks.add(scale)
    return [part.view_as(each) for part, each in zip(scales, largest, strict=True)], are_moderate
