# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""All weights of a model in one launch: 128x128 codes and scales, whole or of some of their rows.

A launch costs the host more than a small weight costs the GPU. The kernel reads a table with the
addresses of every matrix, like AdamW's. Bytes per value of an FP32 master: 5 with codes, 4 without.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.formats import WeightRows
from infir2.numerics.kernels.buffers import groups
from infir2.numerics.kernels.codec import (
    GROUP,
    INF_BITS,
    encode,
    magnitude_bits,
    round_to_bf16,
)
from infir2.numerics.kernels.tiles import quantize_tile_of

# A table row: addresses of values, codes, scales; rows, columns, first row; stride of the scales.
_FIELDS = tl.constexpr(7)
QUANTIZE, LARGEST, ENCODE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _weights_kernel(
    tables_ptr, tiles_ptr, POW2: tl.constexpr, ACTION: tl.constexpr, EVEN: tl.constexpr
):
    pid = tl.program_id(0)
    table_ptr = tables_ptr + tl.load(tiles_ptr + pid * 2) * _FIELDS
    tile = tl.load(tiles_ptr + pid * 2 + 1)
    values_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    codes_ptr = tl.load(table_ptr + 1).to(tl.pointer_type(tl.uint8))
    scale_ptr = tl.load(table_ptr + 2).to(tl.pointer_type(tl.float32))
    rows, columns, first = tl.load(table_ptr + 3), tl.load(table_ptr + 4), tl.load(table_ptr + 5)
    if EVEN:
        values_ptr, codes_ptr = tl.multiple_of(values_ptr, 16), tl.multiple_of(codes_ptr, 16)
        columns = tl.multiple_of(columns, 16)
    num_groups = tl.cdiv(columns, GROUP)
    block, group = first // GROUP + tile // num_groups, tile % num_groups
    row = block * GROUP - first + tl.arange(0, GROUP)
    column = group * GROUP + tl.arange(0, GROUP)
    inside = ((row >= 0) & (row < rows))[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    values = round_to_bf16(tl.load(values_ptr + at, mask=inside, other=0))
    scale_ptr += block * tl.load(table_ptr + 6) + group
    if ACTION == LARGEST:
        largest = tl.max(tl.max(magnitude_bits(values), axis=1), axis=0)
        # A NaN becomes Inf: a reduction over ranks could lose a NaN.
        tl.store(scale_ptr, tl.minimum(largest, INF_BITS).to(tl.float32, bitcast=True))
    elif ACTION == ENCODE:
        tl.store(codes_ptr + at, encode(values, tl.load(scale_ptr), POW2), mask=inside)
    else:
        codes, scale = quantize_tile_of(values, POW2)
        tl.store(codes_ptr + at, codes, mask=inside)
        tl.store(scale_ptr, scale)


def quantize_weights(weights: Sequence[WeightRows], pow2: bool) -> None:
    """Write codes and scales of whole weights, rounded to BF16 first."""
    prepare(weights, pow2)()


def largest_magnitudes(weights: Sequence[WeightRows]) -> None:
    """Write the largest magnitude of each block's rows as its scale; Inf for Inf or NaN.

    Blocks without a row are not written.
    """
    prepare(weights, True, LARGEST)()


def encode_weights(weights: Sequence[WeightRows], pow2: bool) -> None:
    """Write the codes of rows whose blocks have their scales."""
    prepare(weights, pow2, ENCODE)()


def prepare(
    weights: Sequence[WeightRows], pow2: bool, action: tl.constexpr = QUANTIZE
) -> Callable[[], None]:
    """A function that launches the action, any number of times, with the same memory."""
    table = [_table_row(rows) for rows in weights if rows.values.numel()]
    launches = []
    # Wide loads need addresses and sizes that 16 divides; other matrices get a second launch.
    for even in (True, False):
        chosen = [row for row in table if _is_even(row) == even]
        if chosen:
            device = weights[0].values.device
            tiles = _tiles(tuple(row[3:6] for row in chosen), device)
            on_device = torch.tensor(
                chosen, dtype=torch.int64, pin_memory=device.type == "cuda"
            ).to(device, non_blocking=True)
            launches.append((on_device, tiles, even))

    def launch() -> None:
        for on_device, tiles, even in launches:
            _weights_kernel[(len(tiles),)](
                on_device, tiles, POW2=pow2, ACTION=action.value, EVEN=even, num_warps=8
            )

    return launch


def _table_row(rows: WeightRows) -> tuple[int, ...]:
    assert rows.values.is_contiguous(), "masters are"
    assert rows.values.dtype == torch.float32, "masters are"
    codes = 0 if rows.codes is None else rows.codes.data_ptr()
    addresses = (rows.values.data_ptr(), codes, rows.scale.data_ptr())
    return *addresses, *rows.values.shape, rows.first, rows.scale.stride(0)


def _is_even(row: tuple[int, ...]) -> bool:
    return row[0] % 16 == row[1] % 16 == row[4] % 16 == 0


@lru_cache(maxsize=256)
def _tiles(sizes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Matrix and tile of each program, int32 [programs, 2], for (rows, columns, first row)s."""
    blocks = [
        (first + rows - 1) // GROUP.value - first // GROUP.value + 1 for rows, _, first in sizes
    ]
    counts = torch.tensor([n * groups(size[1]) for n, size in zip(blocks, sizes, strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    tile = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    return torch.stack([owner, tile], dim=1).to(device, torch.int32)
