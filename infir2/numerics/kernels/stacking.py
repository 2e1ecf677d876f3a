# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""FP8 weights of layers that share an input as one matrix, or as its transpose; 2 bytes a value.

For weights that FSDP2 gathers one by one, where a concatenation of codes, one of scales and a
transposition would be three launches for each group of layers, in every forward and backward.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.kernels.buffers import as_bytes, empty_codes, empty_tile_scales, groups
from infir2.numerics.kernels.codec import GROUP
from infir2.numerics.kernels.tiles import load_tile, store_tile

MOST_PARTS = 3


@triton.jit
def _stack_kernel(
    codes0_ptr, codes1_ptr, codes2_ptr, scale0_ptr, scale1_ptr, scale2_ptr,
    out_ptr, out_scale_ptr, rows0, rows1, rows2, columns, total_rows,
    scale0_stride, scale1_stride, scale2_stride, out_scale_stride, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    num_groups = tl.cdiv(columns, GROUP)
    block, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    blocks0, blocks1 = tl.cdiv(rows0, GROUP), tl.cdiv(rows1, GROUP)
    codes_ptr, scale_ptr, rows, stride, first = codes0_ptr, scale0_ptr, rows0, scale0_stride, 0
    if block >= blocks0 + blocks1:
        codes_ptr, scale_ptr, rows, stride = codes2_ptr, scale2_ptr, rows2, scale2_stride
        first = blocks0 + blocks1
    elif block >= blocks0:
        codes_ptr, scale_ptr, rows, stride = codes1_ptr, scale1_ptr, rows1, scale1_stride
        first = blocks0
    row = (block - first) * GROUP
    codes = load_tile(codes_ptr, row, group, rows, columns, columns, 128)
    scale = tl.load(scale_ptr + (block - first).to(tl.int64) * stride + group)
    row, column = block * GROUP, group * GROUP
    if TRANSPOSE:
        store_tile(out_ptr, tl.trans(codes), column, row, columns, total_rows, total_rows, 128, 128)
        tl.store(out_scale_ptr + group.to(tl.int64) * out_scale_stride + block, scale)
    else:
        store_tile(out_ptr, codes, row, column, total_rows, columns, columns, 128, 128)
        tl.store(out_scale_ptr + block.to(tl.int64) * out_scale_stride + group, scale)


def stack_tiles(
    codes: Sequence[Tensor], scales: Sequence[Tensor], transpose: bool
) -> tuple[Tensor, Tensor]:
    """(codes [N, K] or [K, N], their scales) of at most three matrices [N_i, K] in 128x128 blocks.

    All but the last have a multiple of 128 rows.
    """
    rows, columns = [part.shape[0] for part in codes], codes[0].shape[1]
    missing, total = MOST_PARTS - len(codes), sum(rows)
    shape = (columns, total) if transpose else (total, columns)
    out, out_scale = empty_codes(codes[0], *shape), empty_tile_scales(codes[0], *shape)
    contiguous = [as_bytes(part.contiguous()) for part in codes]
    scales = [part if part.stride(1) == 1 else part.contiguous() for part in scales]
    _stack_kernel[(groups(total) * groups(columns),)](
        *contiguous, *contiguous[:1] * missing, *scales, *scales[:1] * missing,
        as_bytes(out), out_scale, *rows, *[0] * missing, columns, total,
        *(part.stride(0) for part in scales), *[0] * missing, out_scale.stride(0),
        TRANSPOSE=transpose, num_warps=4,
    )  # fmt: skip
    return out, out_scale
