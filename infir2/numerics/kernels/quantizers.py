# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""Quantizers of a matrix in memory, as operators for eager mode and torch.compile (custom_op.py).

Every operator has a flag `pow2` for the scale format and returns plain tensors; `api.py` wraps them
in `Fp8Tensor`. The bytes that they move per value of a BF16 matrix bound their speed: rows 3, rows
and columns 4, rows and transposed tiles 4, FP32 weight 5.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.kernels.buffers import (
    as_bytes,
    empty_codes,
    empty_row_scales,
    empty_tile_scales,
    groups,
    rows_contiguous,
)
from infir2.numerics.kernels.codec import round_to_bf16
from infir2.numerics.kernels.custom_op import operator
from infir2.numerics.kernels.tiles import (
    load_values,
    quantize_rows_of,
    quantize_tile_of,
    store_tile,
    tile_of_program,
    write_columns,
    write_rows,
    write_second_layout,
)

# Tuned by bench/kernels.py on an H100: rows of a tile, warps of a program, registers of a thread
# (docs/results).
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
    """1x128 blocks of x [R, C] and of x.T from one read: (codes, scale, codes_t, scale_t)."""
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
    """1x128 blocks of x [R, C] and 128x128 blocks of x.T from one read.

    Returns (codes, scale, codes_t, scale_t). With `pow2` the second layout has the bytes of
    `transpose`, otherwise those of quantizing x.T.
    """
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
    """Only the second layout of `quantize_rows_and_tiles`: (codes_t [C, R], scale_t)."""
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
            x, as_bytes(codes), scale, as_bytes(codes_t), scale_t, rows, columns, x.stride(0),
            scale_t.stride(0), POW2=pow2, ROWS=with_rows, **INPUT_CONFIG,
        )  # fmt: skip


@operator("infir2::quantize_tiles")
def quantize_tiles(x: Tensor, pow2: bool, round_to_bf16: bool) -> tuple[Tensor, Tensor]:
    """128x128 blocks of x [R, C], which `round_to_bf16` rounds first: (codes, scale)."""
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
