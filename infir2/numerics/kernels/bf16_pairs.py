# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""Device functions on tiles of BF16 pairs: two neighbors of a row in one int32, [128, 64].

A quantizer of both layouts must keep a 128x128 tile in registers until its column scales are known.
That needs 64 registers of each of 256 threads as float32 and 32 as pairs, which decides whether two
programs or one fit a processor without spills.
"""

import triton
import triton.language as tl

from infir2.numerics.kernels.codec import (
    GROUP,
    INTERPRET,
    block_scale,
    encode,
    reciprocal_of_power,
    round_to_bf16,
)

PAIRS = tl.constexpr(64)


@triton.jit
def low(x):
    """The first of each pair, float32."""
    return (x << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(x):
    """The second of each pair, float32."""
    return (x & -65536).to(tl.float32, bitcast=True)


@triton.jit
def pack(first, second):
    """Pairs of the nearest BF16 values (ties to even) of two float32 tensors."""
    if INTERPRET:
        bits = round_to_bf16(first).to(tl.int32, bitcast=True)
        return ((bits >> 16) & 0xFFFF) | (round_to_bf16(second).to(tl.int32, bitcast=True) & -65536)
    else:
        # Not pure: the compiler must keep the pairs instead of computing the values a second time.
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,r,r",
            [first, second],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_pairs(ptr, first_row, group, rows, stride):
    """The 128x128 tile of a BF16 matrix as pairs [128, 64]; zeros below its last row.

    The matrix has a multiple of 128 columns.
    """
    row = first_row + tl.arange(0, 128)
    pair = group * PAIRS + tl.arange(0, PAIRS)
    at = (
        ptr.to(tl.pointer_type(tl.int32))
        + row.to(tl.int64)[:, None] * (stride // 2)
        + pair[None, :]
    )
    return tl.load(at, mask=(row < rows)[:, None], other=0)


@triton.jit
def _encode_pairs(x, scale, POW2: tl.constexpr):
    """E4M3 codes of pairs as int16, the first in the low byte; scale broadcasts."""
    if POW2 and not INTERPRET:
        inverse = reciprocal_of_power(scale)
        operands = [low(x) * inverse, high(x) * inverse]
        return tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;",
            "=h,r,r",
            operands,
            dtype=tl.int16,
            is_pure=True,
            pack=1,
        )
    else:
        return encode(low(x), scale, POW2).to(tl.int16) | (
            encode(high(x), scale, POW2).to(tl.int16) << 8
        )


@triton.jit
def write_pairs(
    x,
    codes_ptr,
    scale_ptr,
    codes_t_ptr,
    scale_t_ptr,
    first_row,
    group,
    rows,
    stride,
    scale_t_stride,
    POW2: tl.constexpr,
):
    """Quantize a tile of pairs in 1x128 blocks along its rows and along its columns; write both.

    codes are [rows, stride], scale has strides (1, rows); codes_t are row-major with `rows`
    columns, scale_t has strides (1, scale_t_stride).
    """
    row = first_row + tl.arange(0, 128)
    pair = tl.arange(0, PAIRS)
    inside = row < rows
    low_bits, high_bits = (x << 16) & 0x7FFFFFFF, x & 0x7FFF0000
    scale = block_scale(tl.max(tl.maximum(low_bits, high_bits), axis=1), POW2)
    at = (
        codes_ptr.to(tl.pointer_type(tl.int16))
        + row.to(tl.int64)[:, None] * (stride // 2)
        + (group * PAIRS + pair)[None, :]
    )
    tl.store(at, _encode_pairs(x, scale[:, None], POW2), mask=inside[:, None])
    tl.store(scale_ptr + group.to(tl.int64) * rows + row, scale, mask=inside)
    column = group * GROUP + 2 * pair
    at = codes_t_ptr + column.to(tl.int64)[:, None] * rows + row[None, :]
    scale_at = scale_t_ptr + (first_row // GROUP).to(tl.int64) * scale_t_stride + column
    scale = block_scale(tl.max(low_bits, axis=0), POW2)
    tl.store(at, tl.trans(encode(low(x), scale[None, :], POW2)), mask=inside[None, :])
    tl.store(scale_at, scale)
    scale = block_scale(tl.max(high_bits, axis=0), POW2)
    tl.store(at + rows, tl.trans(encode(high(x), scale[None, :], POW2)), mask=inside[None, :])
    tl.store(scale_at + 1, scale)
