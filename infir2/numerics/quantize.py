"""Quantise, dequantise, transpose: the public entry, which checks its input and counts non-finite blocks.

The arithmetic is in `reference`; on a GPU the kernels, with the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from infir2.numerics.formats import ROW_BLOCK, TILE_BLOCK, Fp8Tensor, check_format
from infir2.numerics.kernels import usable
from infir2.numerics.quantize_reference import (
    dequantize_reference,
    encode_rows,
    quantize_reference,
    transpose_reference,
)

_SMALL, _TOGETHER = 1 << 16, 256
_INPUT_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


class NonFiniteBlocks:
    """Counts quantised blocks that held an Inf or a NaN, one counter per device, without waiting for a GPU.

    Example: `nonfinite_blocks.add(scale)` after each quantisation; `nonfinite_blocks.read()` once per optimizer step.
    """

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}
        self._waiting: list[Tensor] = []

    def add(self, scale: Tensor) -> None:
        """Count the NaN scales in `scale` (float32, any shape)."""
        if scale.is_meta:
            return
        if (
            scale.is_cuda and scale.numel() < _SMALL
        ):  # a weight's: counted many at a time, for a launch costs more than the count
            self._waiting.append(scale)
            if len(self._waiting) < _TOGETHER:
                return
            scale = self._take_waiting()
        self._add(scale)

    def _take_waiting(self) -> Tensor:
        waiting, self._waiting = self._waiting, []
        return torch.cat([scale.flatten() for scale in waiting])

    def _add(self, scale: Tensor) -> None:
        count = self._counts.get(scale.device)
        if count is None:
            with torch.inference_mode(
                False
            ):  # a tensor born in inference mode could not count outside it
                count = self._counts[scale.device] = torch.zeros(
                    (), dtype=torch.int64, device=scale.device
                )
        count += torch.isnan(scale).sum()

    def read(self) -> int:
        """Blocks counted since the start or the last `reset`; waits for the devices that counted."""
        if self._waiting:
            self._add(self._take_waiting())
        return sum(int(count.item()) for count in self._counts.values())

    def reset(self) -> None:
        """Start again from zero."""
        self._waiting.clear()
        for count in self._counts.values():
            count.zero_()


nonfinite_blocks = NonFiniteBlocks()


def quantize(
    x: Tensor, block: tuple[int, int] = ROW_BLOCK, scale_format: str = "pow2"
) -> Fp8Tensor:
    """Quantise x [R, C] to E4M3 with one scale per block; any shape (zero rows too), any strides.

    Args:
        x: BF16, FP32 or FP16 matrix.
        block: (1, 128) or (128, 128).
        scale_format: "pow2" or "fp32".

    Returns:
        Codes and scales as `infir2.numerics.quantize_reference` defines them. A block with Inf or NaN is NaN throughout and is
        counted in `nonfinite_blocks`.

    Raises:
        ValueError: x is not a matrix of one of those dtypes, or the block or format does not exist.
    """
    block = (block[0], block[1])
    check_format(block, scale_format)
    if x.ndim != 2 or x.dtype not in _INPUT_DTYPES:
        raise ValueError(
            f"quantize takes a BF16, FP32 or FP16 matrix [R, C]; got {x.dtype} {list(x.shape)}"
        )
    with torch.no_grad():
        result: Fp8Tensor = (
            _kernels().quantize(x, block, scale_format)
            if usable(x.device)
            else quantize_reference(x, block, scale_format)
        )
    nonfinite_blocks.add(result.scale)
    return result


def quantize_weight(master: Tensor, scale_format: str) -> Fp8Tensor:
    """128x128 blocks of the BF16-rounded master [N, K]: the one definition of a weight's bytes."""
    if not usable(master.device):
        return quantize(master.detach().to(torch.bfloat16), TILE_BLOCK, scale_format)
    with torch.no_grad():
        result: Fp8Tensor = _kernels().quantize_weight(master.detach(), scale_format)
    nonfinite_blocks.add(result.scale)
    return result


def encode_weight_rows(master: Tensor, scale: Tensor, scale_format: str) -> Tensor:
    """Codes of rows of a weight, master [R, K], by given scales [R, K / 128]: a part of blocks whose scales are known."""
    if usable(master.device):
        return _kernels().matrix.encode_weight_rows(master, scale, scale_format == "pow2")
    return encode_rows(master.to(torch.bfloat16), scale)


def dequantize(t: Fp8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`codes * scale` [R, C]; exact in FP64, and exact in every dtype that holds the values for "pow2" scales."""
    if dtype == torch.bfloat16 and t.block == ROW_BLOCK and usable(t.codes.device):
        return _kernels().dequantize(t)
    return dequantize_reference(t, dtype)


def transpose(t: Fp8Tensor) -> Fp8Tensor:
    """Fp8Tensor of the transposed matrix in 128x128 blocks, from the codes alone; ValueError for 1x128 "fp32"."""
    result: Fp8Tensor = (
        _kernels().transpose(t) if usable(t.codes.device) else transpose_reference(t)
    )
    return result


def _kernels() -> Any:
    """Imported at the first use: triton need not be there."""
    from infir2.numerics.kernels import api as operations

    return operations
