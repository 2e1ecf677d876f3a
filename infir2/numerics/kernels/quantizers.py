# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""Quantisers of a matrix in memory, as operators that eager mode and torch.compile both call without a graph break.

Every operator takes `pow2` for the scale format and returns plain tensors; `infir2.numerics.kernels` wraps them. Bytes
moved per value of a BF16 matrix, which bounds each of them: rows 3, rows and columns 4, rows and transposed tiles 4,
transposed tiles from codes 2, FP32 weight 5.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.formats import E4M3, GROUP
from infir2.numerics.kernels.codec import decode, encode, rescale_tile, round_to_bf16
from infir2.numerics.kernels.custom_op import operator
from infir2.numerics.kernels.tiles import (
    load_tile,
    load_values,
    quantize_rows_of,
    quantize_tile_of,
    store_tile,
    tile_of_program,
    write_columns,
    write_rows,
    write_second_layout,
    write_transposed_tile,
)

# Chosen by bench/kernels.py on an H100: rows of a tile, warps of a program, registers of a thread (docs/results).
ROWS_CONFIG = {"BLOCK_ROWS": 32, "num_warps": 4}
GRADIENT_CONFIG = {"num_warps": 8, "maxnreg": 128}
INPUT_CONFIG = {"num_warps": 8, "maxnreg": 96}
TILE_CONFIG = {"num_warps": 8}


@triton.jit
def _rows_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    columns,
    x_stride,
    POW2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    first_row, group = tile_of_program(rows, columns, BLOCK_ROWS)
    values = load_values(x_ptr, first_row, group, rows, columns, x_stride, BLOCK_ROWS)
    write_rows(
        values, codes_ptr, scale_ptr, first_row, group, rows, columns, columns, POW2, BLOCK_ROWS
    )


@triton.jit
def _rows_and_columns_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    codes_t_ptr,
    scale_t_ptr,
    rows,
    columns,
    x_stride,
    POW2: tl.constexpr,
):
    first_row, group = tile_of_program(rows, columns, 128)
    values = load_values(x_ptr, first_row, group, rows, columns, x_stride, 128)
    write_rows(values, codes_ptr, scale_ptr, first_row, group, rows, columns, columns, POW2, 128)
    write_columns(values, codes_t_ptr, scale_t_ptr, first_row, group, rows, columns, columns, POW2)


@triton.jit
def _rows_and_tiles_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    codes_t_ptr,
    scale_t_ptr,
    rows,
    columns,
    x_stride,
    scale_t_stride,
    POW2: tl.constexpr,
    ROWS: tl.constexpr,
):
    first_row, group = tile_of_program(rows, columns, 128)
    values = load_values(x_ptr, first_row, group, rows, columns, x_stride, 128)
    if ROWS:
        codes, scale = write_rows(
            values, codes_ptr, scale_ptr, first_row, group, rows, columns, columns, POW2, 128
        )
    else:
        codes, scale = quantize_rows_of(values, POW2)
    write_second_layout(
        values,
        codes,
        scale,
        codes_t_ptr,
        scale_t_ptr,
        first_row,
        group,
        rows,
        columns,
        scale_t_stride,
        POW2,
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
def _transpose_bytes_kernel(codes_ptr, codes_t_ptr, rows, columns):
    first_row, group = tile_of_program(rows, columns, 128)
    codes = load_tile(codes_ptr, first_row, group, rows, columns, columns, 128)
    store_tile(codes_t_ptr, tl.trans(codes), group * 128, first_row, columns, rows, rows, 128, 128)


@triton.jit
def _tiles_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    columns,
    x_stride,
    scale_stride,
    POW2: tl.constexpr,
    ROUND_TO_BF16: tl.constexpr,
):
    first_row, group = tile_of_program(rows, columns, 128)
    values = load_values(x_ptr, first_row, group, rows, columns, x_stride, 128)
    if ROUND_TO_BF16:
        values = round_to_bf16(values)
    codes, scale = quantize_tile_of(values, POW2)
    store_tile(codes_ptr, codes, first_row, group * 128, rows, columns, columns, 128, 128)
    tl.store(scale_ptr + (first_row // 128).to(tl.int64) * scale_stride + group, scale)


@triton.jit
def _encode_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    columns,
    x_stride,
    scale_stride,
    POW2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    first_row, group = tile_of_program(rows, columns, BLOCK_ROWS)
    values = round_to_bf16(
        load_values(x_ptr, first_row, group, rows, columns, x_stride, BLOCK_ROWS)
    )
    row = first_row + tl.arange(0, BLOCK_ROWS)
    scale = tl.load(scale_ptr + row.to(tl.int64) * scale_stride + group, mask=row < rows, other=1.0)
    store_tile(
        codes_ptr,
        encode(values, scale[:, None], POW2),
        first_row,
        group * 128,
        rows,
        columns,
        columns,
        BLOCK_ROWS,
        128,
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


def groups(size: int) -> int:
    """Number of started groups of 128 in `size`."""
    return -(-size // GROUP)


def empty_codes(like: Tensor, rows: int, columns: int) -> Tensor:
    """Codes [rows, columns] on the device of `like`."""
    return torch.empty((rows, columns), dtype=E4M3, device=like.device)


def empty_row_scales(like: Tensor, rows: int, num_groups: int) -> Tensor:
    """1x128 scales [rows, num_groups] with strides (1, rows)."""
    return torch.empty((num_groups, rows), dtype=torch.float32, device=like.device).t()


def empty_tile_scales(like: Tensor, rows: int, columns: int) -> Tensor:
    """128x128 scales of a [rows, columns] matrix, as a view of rows padded to a multiple of 4 (what cuBLAS reads)."""
    wide = -(-groups(columns) // 4) * 4
    return torch.empty((groups(rows), wide), dtype=torch.float32, device=like.device)[
        :, : groups(columns)
    ]


def rows_contiguous(x: Tensor) -> Tensor:
    """x [R, C] itself if the values of a row are adjacent, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def as_bytes(codes: Tensor) -> Tensor:
    """The same memory as uint8: kernels handle codes as bytes."""
    return codes.view(torch.uint8)


@operator("infir2::quantize_rows")
def quantize_rows(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """1x128 blocks of x [R, C]: (codes [R, C], scale [R, ceil(C / 128)])."""
    rows, columns = x.shape
    x = rows_contiguous(x)
    codes, scale = _fake_quantize_rows(x, pow2)
    if rows:
        grid = (triton.cdiv(rows, ROWS_CONFIG["BLOCK_ROWS"]) * groups(columns),)
        _rows_kernel[grid](
            x, as_bytes(codes), scale, rows, columns, x.stride(0), POW2=pow2, **ROWS_CONFIG
        )
    return codes, scale


@quantize_rows.register_fake
def _fake_quantize_rows(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return empty_codes(x, rows, columns), empty_row_scales(x, rows, groups(columns))


@operator("infir2::quantize_rows_and_columns")
def quantize_rows_and_columns(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1x128 blocks of x [R, C] and of x.T [C, R] from one read: (codes, scale, codes_t, scale_t)."""
    rows, columns = x.shape
    x = rows_contiguous(x)
    codes, scale, codes_t, scale_t = _fake_quantize_rows_and_columns(x, pow2)
    if rows:
        grid = (groups(rows) * groups(columns),)
        _rows_and_columns_kernel[grid](
            x,
            as_bytes(codes),
            scale,
            as_bytes(codes_t),
            scale_t,
            rows,
            columns,
            x.stride(0),
            POW2=pow2,
            **GRADIENT_CONFIG,
        )
    return codes, scale, codes_t, scale_t


@quantize_rows_and_columns.register_fake
def _fake_quantize_rows_and_columns(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    return (
        empty_codes(x, rows, columns),
        empty_row_scales(x, rows, groups(columns)),
        empty_codes(x, columns, rows),
        empty_row_scales(x, columns, groups(rows)),
    )


@operator("infir2::quantize_rows_and_tiles")
def quantize_rows_and_tiles(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1x128 blocks of x [R, C] and 128x128 blocks of x.T from one read; "pow2": the latter as `transpose` gives them."""
    x = rows_contiguous(x)
    codes, scale, codes_t, scale_t = _fake_quantize_rows_and_tiles(x, pow2)
    _launch_rows_and_tiles(x, codes, scale, codes_t, scale_t, pow2, True)
    return codes, scale, codes_t, scale_t


@quantize_rows_and_tiles.register_fake
def _fake_quantize_rows_and_tiles(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    codes, scale = _fake_quantize_rows(x, pow2)
    return codes, scale, empty_codes(x, columns, rows), empty_tile_scales(x, columns, rows)


@operator("infir2::quantize_transposed")
def quantize_transposed(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """The second layout of `quantize_rows_and_tiles` alone: (codes_t [C, R], scale_t)."""
    x = rows_contiguous(x)
    codes_t, scale_t = _fake_quantize_transposed(x, pow2)
    _launch_rows_and_tiles(x, codes_t, scale_t, codes_t, scale_t, pow2, False)
    return codes_t, scale_t


@quantize_transposed.register_fake
def _fake_quantize_transposed(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return empty_codes(x, columns, rows), empty_tile_scales(x, columns, rows)


def _launch_rows_and_tiles(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    codes_t: Tensor,
    scale_t: Tensor,
    pow2: bool,
    with_rows: bool,
) -> None:
    rows, columns = x.shape
    if rows:
        _rows_and_tiles_kernel[(groups(rows) * groups(columns),)](
            x, as_bytes(codes), scale, as_bytes(codes_t), scale_t, rows, columns, x.stride(0), scale_t.stride(0), POW2=pow2, ROWS=with_rows,
            **INPUT_CONFIG,
        )  # fmt: skip


@operator("infir2::dequantize_rows")
def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """BF16 values [R, C] of 1x128 codes."""
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


@operator("infir2::transpose_bytes")
def transpose_bytes(codes: Tensor) -> Tensor:
    """Codes [C, R] of the transposed matrix, contiguous."""
    rows, columns = codes.shape
    codes = codes.contiguous()
    codes_t = _fake_transpose_bytes(codes)
    if rows:
        grid = (groups(rows) * groups(columns),)
        _transpose_bytes_kernel[grid](
            as_bytes(codes), as_bytes(codes_t), rows, columns, num_warps=4
        )
    return codes_t


@transpose_bytes.register_fake
def _fake_transpose_bytes(codes: Tensor) -> Tensor:
    return empty_codes(codes, codes.shape[1], codes.shape[0])


@operator("infir2::transpose_rows")
def transpose_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """128x128 blocks of the transposed matrix from 1x128 "pow2" codes [R, C]: (codes_t [C, R], scale_t)."""
    rows, columns = codes.shape
    codes = codes.contiguous()
    codes_t, scale_t = _fake_transpose_rows(codes, scale)
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


@transpose_rows.register_fake
def _fake_transpose_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = codes.shape
    return empty_codes(codes, columns, rows), empty_tile_scales(codes, columns, rows)


@operator("infir2::quantize_tiles")
def quantize_tiles(x: Tensor, pow2: bool, round_to_bf16: bool) -> tuple[Tensor, Tensor]:
    """128x128 blocks of x [R, C], rounded to BF16 first on request: (codes, scale)."""
    x = rows_contiguous(x)
    codes, scale = _fake_quantize_tiles(x, pow2, round_to_bf16)
    rows, columns = x.shape
    if rows:
        _tiles_kernel[(groups(rows) * groups(columns),)](
            x, as_bytes(codes), scale, rows, columns, x.stride(0), scale.stride(0), POW2=pow2,
            ROUND_TO_BF16=round_to_bf16 and x.dtype == torch.float32, **TILE_CONFIG,
        )  # fmt: skip
    return codes, scale


@quantize_tiles.register_fake
def _fake_quantize_tiles(x: Tensor, pow2: bool, round_to_bf16: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return empty_codes(x, rows, columns), empty_tile_scales(x, rows, columns)


def encode_weight_rows(x: Tensor, scale: Tensor, pow2: bool) -> Tensor:
    """Codes [R, C] of an FP32 x, rounded to BF16, by given scales [R, ceil(C / 128)]."""
    rows, columns = x.shape
    codes = empty_codes(x, rows, columns)
    if rows:
        grid, strides = (
            (triton.cdiv(rows, ROWS_CONFIG["BLOCK_ROWS"]) * groups(columns),),
            (x.stride(0), scale.stride(0)),
        )
        _encode_kernel[grid](
            x, as_bytes(codes), scale, rows, columns, *strides, POW2=pow2, **ROWS_CONFIG
        )
    return codes
