# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""Device functions that read and write one tile: the memory layouts that all kernels share.

Codes are row-major. Scales of 1x128 blocks, [R, ceil(C / 128)], have strides (1, R), the layout of
both cuBLAS and DeepGEMM; scales of 128x128 blocks are row-major with rows padded to a multiple of 4
(cuBLAS).
"""

import triton
import triton.language as tl

from infir2.numerics.kernels.codec import (
    GROUP,
    block_scale,
    encode,
    magnitude_bits,
    rescale_tile,
    to_float32,
)


@triton.jit
def tile_of_program(rows, columns, BLOCK_ROWS: tl.constexpr):
    """(first row, column group) of this program; neighbors in a row of tiles have adjacent ids."""
    groups = tl.cdiv(columns, GROUP)
    pid = tl.program_id(0)
    return (pid // groups) * BLOCK_ROWS, pid % groups


@triton.jit
def load_tile(ptr, first_row, group, rows, columns, stride, BLOCK_ROWS: tl.constexpr):
    """The tile [BLOCK_ROWS, 128] in the matrix's dtype; zeros outside the matrix."""
    row = tl.arange(0, BLOCK_ROWS)
    column = group * GROUP + tl.arange(0, GROUP)
    mask = (first_row + row < rows)[:, None] & (column < columns)[None, :]
    base = ptr + first_row.to(tl.int64) * stride
    return tl.load(base + row[:, None] * stride + column[None, :], mask=mask, other=0)


@triton.jit
def load_values(ptr, first_row, group, rows, columns, stride, BLOCK_ROWS: tl.constexpr):
    """`load_tile` in float32."""
    return to_float32(load_tile(ptr, first_row, group, rows, columns, stride, BLOCK_ROWS))


@triton.jit
def store_tile(
    ptr, tile, first_row, first_column, rows, columns, stride, R: tl.constexpr, C: tl.constexpr
):
    """Write a tile [R, C] at (first_row, first_column) of a row-major [rows, columns] matrix."""
    row = tl.arange(0, R)
    column = first_column + tl.arange(0, C)
    mask = (first_row + row < rows)[:, None] & (column < columns)[None, :]
    base = ptr + first_row.to(tl.int64) * stride
    tl.store(base + row[:, None] * stride + column[None, :], tile, mask=mask)


@triton.jit
def store_group_scales(ptr, scale, first_row, group, rows, stride, R: tl.constexpr):
    """Write the 1x128 scales [R] of a column group; strides (1, stride)."""
    row = first_row + tl.arange(0, R)
    tl.store(ptr + group.to(tl.int64) * stride + row, scale, mask=row < rows)


@triton.jit
def quantize_rows_of(values, POW2: tl.constexpr):
    """(codes [R, 128], scale [R]) of a float32 tile whose rows are 1x128 blocks."""
    scale = block_scale(tl.max(magnitude_bits(values), axis=1), POW2)
    return encode(values, scale[:, None], POW2), scale


@triton.jit
def write_rows(
    values,
    codes_ptr,
    scale_ptr,
    first_row,
    group,
    rows,
    columns,
    stride,
    POW2: tl.constexpr,
    R: tl.constexpr,
):
    """Quantize the rows of a tile as 1x128 blocks and write them; returns (codes, scale)."""
    codes, scale = quantize_rows_of(values, POW2)
    store_tile(codes_ptr, codes, first_row, group * GROUP, rows, columns, stride, R, GROUP)
    store_group_scales(scale_ptr, scale, first_row, group, rows, rows, R)
    return codes, scale


@triton.jit
def write_columns(
    values, codes_ptr, scale_ptr, first_row, group, rows, columns, scale_stride, POW2: tl.constexpr
):
    """Quantize the columns of a 128x128 tile and write them to the transposed matrix.

    They become 1x128 blocks of [columns, rows].
    """
    scale = block_scale(tl.max(magnitude_bits(values), axis=0), POW2)
    codes = encode(values, scale[None, :], POW2)
    store_tile(
        codes_ptr, tl.trans(codes), group * GROUP, first_row, columns, rows, rows, GROUP, GROUP
    )
    store_group_scales(
        scale_ptr, scale, group * GROUP, first_row // GROUP, columns, scale_stride, GROUP
    )


@triton.jit
def write_transposed_tile(
    codes, scale, codes_ptr, scale_ptr, first_row, group, rows, columns, scale_stride
):
    """Write a quantized 128x128 tile (codes, one scale) to the transposed [columns, rows]."""
    store_tile(
        codes_ptr, tl.trans(codes), group * GROUP, first_row, columns, rows, rows, GROUP, GROUP
    )
    tl.store(scale_ptr + group.to(tl.int64) * scale_stride + first_row // GROUP, scale)


@triton.jit
def quantize_tile_of(values, POW2: tl.constexpr):
    """(codes, scale) of a float32 128x128 tile that is one block."""
    scale = block_scale(tl.max(tl.max(magnitude_bits(values), axis=1), axis=0), POW2)
    return encode(values, scale, POW2), scale


@triton.jit
def write_second_layout(
    values,
    codes,
    row_scale,
    codes_ptr,
    scale_ptr,
    first_row,
    group,
    rows,
    columns,
    scale_stride,
    POW2: tl.constexpr,
):
    """Write the tile's block of the transposed matrix: "pow2" from codes, "fp32" from values."""
    if POW2:
        tile, scale = rescale_tile(codes, row_scale)
    else:
        tile, scale = quantize_tile_of(values, POW2)
    write_transposed_tile(
        tile, scale, codes_ptr, scale_ptr, first_row, group, rows, columns, scale_stride
    )
