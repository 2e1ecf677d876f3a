# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""Operators that read FP8 codes: back to BF16, and to the codes of the transposed matrix.

They move 3 bytes per value (dequantize) and 2 (both transposes).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.kernels.buffers import as_bytes, empty_codes, empty_tile_scales, groups
from infir2.numerics.kernels.codec import decode, rescale_tile, round_to_bf16
from infir2.numerics.kernels.custom_op import operator
from infir2.numerics.kernels.quantizers import ROWS_CONFIG, TILE_CONFIG
from infir2.numerics.kernels.tiles import (
    load_tile,
    store_tile,
    tile_of_program,
    write_transposed_tile,
)


@triton.jit
def _transpose_kernel(
    codes_ptr,
    scale_ptr,
    codes_t_ptr,
    scale_t_ptr,
    rows,
    columns,
    scale_row_stride,
    scale_group_stride,
    scale_t_stride,
):
    first_row, group = tile_of_program(rows, columns, 128)
    codes = load_tile(codes_ptr, first_row, group, rows, columns, columns, 128)
    row = first_row + tl.arange(0, 128)
    scale_at = (
        scale_ptr + group.to(tl.int64) * scale_group_stride + row.to(tl.int64) * scale_row_stride
    )
    row_scale = tl.load(scale_at, mask=row < rows, other=0.0)
    tile, tile_scale = rescale_tile(codes, row_scale)
    write_transposed_tile(
        tile, tile_scale, codes_t_ptr, scale_t_ptr, first_row, group, rows, columns, scale_t_stride
    )


@triton.jit
def _transpose_tiles_kernel(
    codes_ptr, scale_ptr, codes_t_ptr, scale_t_ptr, rows, columns, scale_stride,
    scale_group_stride, scale_t_stride,
):  # fmt: skip
    first_row, group = tile_of_program(rows, columns, 128)
    codes = load_tile(codes_ptr, first_row, group, rows, columns, columns, 128)
    block = (first_row // 128).to(tl.int64)
    scale = tl.load(scale_ptr + block * scale_stride + group * scale_group_stride)
    write_transposed_tile(
        codes, scale, codes_t_ptr, scale_t_ptr, first_row, group, rows, columns, scale_t_stride
    )


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scale_ptr,
    out_ptr,
    rows,
    columns,
    scale_row_stride,
    scale_group_stride,
    BLOCK_ROWS: tl.constexpr,
):
    first_row, group = tile_of_program(rows, columns, BLOCK_ROWS)
    codes = load_tile(codes_ptr, first_row, group, rows, columns, columns, BLOCK_ROWS)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    scale_at = (
        scale_ptr + group.to(tl.int64) * scale_group_stride + row.to(tl.int64) * scale_row_stride
    )
    values = round_to_bf16(decode(codes) * tl.load(scale_at, mask=row < rows, other=0.0)[:, None])
    store_tile(
        out_ptr,
        values.to(out_ptr.dtype.element_ty),
        first_row,
        group * 128,
        rows,
        columns,
        columns,
        BLOCK_ROWS,
        128,
    )


@operator("infir2::dequantize_rows")
def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """BF16 values [R, C] of codes with 1x128 scales."""
    rows, columns = codes.shape
    codes = codes.contiguous()
    out = _fake_dequantize_rows(codes, scale)
    if rows:
        grid = (triton.cdiv(rows, ROWS_CONFIG["BLOCK_ROWS"]) * groups(columns),)
        _dequantize_kernel[grid](
            as_bytes(codes),
            scale,
            out,
            rows,
            columns,
            scale.stride(0),
            scale.stride(1),
            **ROWS_CONFIG,
        )
    return out


@dequantize_rows.register_fake
def _fake_dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)


@operator("infir2::transpose_tiles")
def transpose_tiles(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [C, R] and scales of the transposed matrix, from 128x128 blocks [R, C]."""
    rows, columns = codes.shape
    codes = codes.contiguous()
    codes_t, scale_t = _fake_transpose_tiles(codes, scale)
    if rows:
        strides = (*scale.stride(), scale_t.stride(0))
        _transpose_tiles_kernel[(groups(rows) * groups(columns),)](
            as_bytes(codes), scale, as_bytes(codes_t), scale_t, rows, columns, *strides, num_warps=4
        )
    return codes_t, scale_t


@transpose_tiles.register_fake
def _fake_transpose_tiles(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = codes.shape
    return empty_codes(codes, columns, rows), empty_tile_scales(codes, columns, rows)


@operator("infir2::transpose_rows")
def transpose_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """128x128 blocks of the transposed matrix, from 1x128 "pow2" codes [R, C].

    Returns (codes_t [C, R], scale_t).
    """
    rows, columns = codes.shape
    codes = codes.contiguous()
    codes_t, scale_t = _fake_transpose_tiles(codes, scale)
    if rows:
        grid = (groups(rows) * groups(columns),)
        strides = (scale.stride(0), scale.stride(1), scale_t.stride(0))
        _transpose_kernel[grid](
            as_bytes(codes),
            scale,
            as_bytes(codes_t),
            scale_t,
            rows,
            columns,
            *strides,
            **TILE_CONFIG,
        )
    return codes_t, scale_t


transpose_rows.register_fake(_fake_transpose_tiles)
