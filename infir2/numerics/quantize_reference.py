"""The definition of every FP8 conversion, in plain PyTorch.

The kernels of `infir2.numerics.kernels.api` have the same functions with the same signatures and
must reproduce codes and scales bit for bit. Per block, with `amax` the largest magnitude and every
operation in FP32:

    s      = amax / 448                                     IEEE division
    scale  = s                                              "fp32"; at least 2**-149, never zero
           = 2 ** ceil(log2(s)), exponent in [-126, 127]    "pow2", computed on the bits of s
           = 1                                              amax == 0
           = NaN                                            the block holds an Inf or a NaN
    codes  = round-to-nearest-even(clamp(x / scale, -448, 448))
           = 0x7F                                           scale is NaN

The clamp precedes the cast because casts differ: torch 2.13 saturates above 464, older versions
return NaN. The test for Inf is made on amax because a saturating cast would hide it.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infir2.numerics.formats import (
    E4M3,
    E4M3_MAX,
    GROUP,
    NAN_CODE,
    ROW_BLOCK,
    TILE_BLOCK,
    Fp8Tensor,
    WeightRows,
)

_SMALLEST_SUBNORMAL = 2.0**-149
_CHUNK = 1 << 16  # values of a chunk: some FP32 and FP64 tensors of them stay in a core's cache
_CODE_VALUES = {
    dtype: torch.arange(256, dtype=torch.uint8).view(E4M3).to(dtype)
    for dtype in (torch.float32, torch.float64)
}


def quantize(
    x: Tensor, block: tuple[int, int] = ROW_BLOCK, scale_format: str = "pow2"
) -> Fp8Tensor:
    """Quantize x [R, C] (any float dtype up to FP32) by the rules above."""
    rows, columns = x.shape
    tiles = as_tiles(x.detach(), block[0])
    scale = block_scale(block_amax(tiles, [3])[0].amax(dim=1).squeeze(2), scale_format)
    codes = torch.empty(tiles.shape, dtype=E4M3, device=x.device)
    for part in chunks(tiles):
        scaled = tiles[part].float() / scale[part, None, :, None]
        codes[part] = scaled.clamp_(-E4M3_MAX, E4M3_MAX)
    _mark_nonfinite(codes, torch.isnan(scale))
    return Fp8Tensor(from_tiles(codes, rows, columns), scale, block, scale_format)


def quantize_weight(master: Tensor, scale_format: str) -> Fp8Tensor:
    """128x128 blocks of the master [N, K], rounded to BF16 first."""
    return quantize(master.to(torch.bfloat16), TILE_BLOCK, scale_format)


def largest_magnitudes(weights: Sequence[WeightRows]) -> None:
    """Write the largest magnitude of each block's rows, rounded to BF16; see `quantize`."""
    for rows in weights:
        by_row = torch.linalg.vector_norm(as_tiles(rows.values, 1), torch.inf, dim=3)[:, 0]
        by_row.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        blocks = _block_rows(rows)
        # Rounding is monotonic: the rounded maximum is the maximum of the rounded values.
        largest = torch.zeros_like(rows.scale).scatter_reduce_(
            0, blocks[:, None].expand_as(by_row), by_row, "amax"
        )
        rows.scale[blocks] = largest.bfloat16().float()[blocks]


def encode_weights(weights: Sequence[WeightRows], scale_format: str) -> None:
    """Write the codes of rows, rounded to BF16 first, whose blocks have their scales."""
    for rows in weights:
        assert rows.codes is not None
        scale = rows.scale[_block_rows(rows)]
        scaled = as_tiles(rows.values.to(torch.bfloat16).float(), 1) / scale[:, None, :, None]
        codes = _encode(scaled.clamp_(-E4M3_MAX, E4M3_MAX), torch.isnan(scale))
        rows.codes.copy_(from_tiles(codes, *rows.values.shape))


def _block_rows(rows: WeightRows) -> Tensor:
    """The block of each row, int64 [R]."""
    first, number = rows.first, rows.values.shape[0]
    return torch.arange(first, first + number, device=rows.values.device) // GROUP


def dequantize(t: Fp8Tensor, dtype: torch.dtype) -> Tensor:
    """`codes * scale` [R, C]: exact for FP64; otherwise the FP32 product, rounded to `dtype`."""
    rows, columns = t.shape
    work = torch.float64 if dtype == torch.float64 else torch.float32
    codes = as_tiles(t.codes.view(torch.uint8), t.block[0])
    values, scale = torch.empty(codes.shape, dtype=work, device=codes.device), t.scale.to(work)
    for part in chunks(codes):
        decode(codes[part].view(E4M3), work, out=values[part]).mul_(scale[part, None, :, None])
    return from_tiles(values, rows, columns).to(dtype)


def transpose(t: Fp8Tensor) -> Fp8Tensor:
    """The transposed matrix [C, R] in 128x128 blocks, from the codes alone.

    128x128 blocks: the same bytes in another order. 1x128 "pow2": each 128x128 tile gets the
    largest scale among its rows whose codes in the tile are not all zero (1 if there is no such
    row). Codes are then multiplied by powers of two, which is exact for normal numbers; subnormals
    round to nearest even. A NaN row makes its tile NaN.

    Raises:
        ValueError: 1x128 "fp32", whose codes cannot be rescaled exactly.
    """
    if t.block == TILE_BLOCK:
        codes, scale = t.codes.t().contiguous(), t.scale.t().contiguous()
        return Fp8Tensor(codes, scale, TILE_BLOCK, t.scale_format)
    if t.scale_format != "pow2":
        raise ValueError(
            '1x128 codes with "fp32" scales cannot be transposed exactly; '
            'use quantize(x.T, (128, 128), "fp32")'
        )
    rows, columns = t.shape
    tiles = as_tiles(decode(t.codes, torch.float32), GROUP)
    row_scale, tile_scale = tile_scales(t.scale, (tiles != 0).any(dim=-1))
    moved = tiles * (row_scale / tile_scale[:, None, :])[..., None]
    codes = from_tiles(_encode(moved, torch.isnan(tile_scale)), rows, columns)
    return Fp8Tensor(codes.t().contiguous(), tile_scale.t().contiguous(), TILE_BLOCK, "pow2")


def block_scale(amax: Tensor, scale_format: str) -> Tensor:
    """Scales of blocks with largest magnitudes `amax`, float32 of any shape.

    `amax` is NaN or Inf for a block that is not finite; its scale is NaN.
    """
    # Divide by a tensor: CUDA turns a division by a Python number into a product with its
    # reciprocal, which rounds differently.
    s = amax / amax.new_full((), E4M3_MAX)
    if scale_format == "pow2":
        exponent = ((s.view(torch.int32) + 0x7FFFFF) >> 23).clamp_(1, 254)
        scale = (exponent << 23).view(torch.float32)
    else:
        scale = s.clamp_min(_SMALLEST_SUBNORMAL)
    scale = scale.masked_fill_(amax == 0, 1.0)
    return scale.masked_fill_((amax < torch.inf).logical_not_(), torch.nan)


def tile_scales(scale: Tensor, nonzero: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the 128x128 tiles of a matrix with 1x128 scales.

    Args:
        scale: the 1x128 scales [R, C / 128].
        nonzero: bool [R / 128, 128, C / 128], whether a row has a code in the tile that is not
            zero; False in the padding.

    Returns:
        Row scales [R / 128, 128, C / 128], 0 for a row whose codes in the tile are all zero, and
        tile scales [R / 128, C / 128]: the largest of them, 1 if all are 0, NaN if one is NaN.
    """
    row_scale = F.pad(scale, (0, 0, 0, -scale.shape[0] % GROUP)).reshape(nonzero.shape)
    row_scale = torch.where(nonzero, row_scale, 0.0)
    tile_scale = row_scale.amax(dim=1)
    return row_scale, torch.where(tile_scale == 0, 1.0, tile_scale)


def decode(codes: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The values of E4M3 codes, in FP32 or FP64; written to `out`, contiguous, if that is given."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
    if codes.device.type != "cpu":
        return out.copy_(codes)
    # torch's cast from FP8 on a CPU is three times slower than a table of the 256 values.
    indices = codes.view(torch.uint8).flatten().int()
    torch.index_select(_CODE_VALUES[dtype], 0, indices, out=out.view(-1))
    return out


def block_amax(x: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """The largest magnitudes along each of `dims` of x, FP32 with keepdim; NaN or Inf if x has one.

    The bits of magnitudes have their order, NaN last, and are compared faster.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    magnitudes = x.view(integers) & torch.iinfo(integers).max
    return [magnitudes.amax(dim=dim, keepdim=True).view(x.dtype).float() for dim in dims]


def chunks(x: Tensor) -> Iterator[slice]:
    """Slices of x along its first dimension, to do several operations on one before the next.

    On a CPU, values that left the cache cost more than the arithmetic. A slice has a multiple of
    128 values unless it is the last, so that vectorized loops meet the same values in their tails.
    """
    rows, values = x.shape[0], max(1, x[:1].numel())
    step = rows if x.is_cuda else max(1, _CHUNK // values)
    if values % GROUP:
        step = max(GROUP, step // GROUP * GROUP)
    for start in range(0, rows, max(1, step)):
        yield slice(start, start + step)


def as_tiles(x: Tensor, block_rows: int) -> Tensor:
    """View x [R, C] as [R / block_rows, block_rows, C / 128, 128], zero-padded to whole tiles."""
    rows, columns = x.shape
    bottom, right = -rows % block_rows, -columns % GROUP
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom))
    return x.reshape((rows + bottom) // block_rows, block_rows, (columns + right) // GROUP, GROUP)


def from_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `as_tiles`: contiguous [rows, columns] without the padding."""
    padded = tiles.reshape(tiles.shape[0] * tiles.shape[1], tiles.shape[2] * GROUP)
    return padded[:rows, :columns].contiguous()


def _encode(values: Tensor, nonfinite: Tensor) -> Tensor:
    """E4M3 codes of tiles with values in [-448, 448].

    Blocks that are marked in `nonfinite` [R / block_rows, C / 128] become 0x7F.
    """
    codes = values.to(E4M3)
    _mark_nonfinite(codes, nonfinite)
    return codes


def _mark_nonfinite(codes: Tensor, nonfinite: Tensor) -> None:
    """Set the codes of tiles whose blocks are marked; see `_encode`."""
    if codes.is_cuda or nonfinite.any():  # on a GPU, `any` would make the host wait
        codes.view(torch.uint8).masked_fill_(nonfinite[:, None, :, None], NAN_CODE)
