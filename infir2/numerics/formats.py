"""The block-scaled FP8 format: one dataclass and its constants.

`x[r, c] ~= codes[r, c] * scale[r // block[0], c // 128]`. `scale` is the dequantization multiplier;
Hugging Face files call the same numbers `weight_scale_inv`. If 128 does not divide a size, the last
block is smaller.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # largest finite value of E4M3
NAN_CODE = 0x7F  # the NaN byte that is written (0xFF is NaN too and is never produced)
GROUP = 128  # columns that share a scale
ROW_BLOCK = (1, GROUP)  # activations and output gradients
TILE_BLOCK = (GROUP, GROUP)  # weights and the activation operand of the weight gradient
BLOCKS = (ROW_BLOCK, TILE_BLOCK)
SCALE_FORMATS = ("pow2", "fp32")


@dataclass(frozen=True, eq=False)
class Fp8Tensor:
    """A matrix of E4M3 codes with one FP32 scale per block.

    Example: a weight [576, 192] with block (128, 128) has codes [576, 192] and scale [5, 2].

    Attributes:
        codes: float8_e4m3fn [R, C], contiguous.
        scale: float32 [ceil(R / block[0]), ceil(C / 128)]; the dequantization multiplier.
        block: (1, 128) or (128, 128), rows and columns that share a scale.
        scale_format: "pow2" (powers of two) or "fp32" (amax / 448).
    """

    codes: Tensor
    scale: Tensor
    block: tuple[int, int]
    scale_format: str

    def __post_init__(self) -> None:
        check_format(self.block, self.scale_format)
        if self.codes.dtype != E4M3 or self.codes.ndim != 2:
            raise ValueError(
                "codes must be float8_e4m3fn [R, C]; "
                f"got {self.codes.dtype} {list(self.codes.shape)}"
            )
        expected = scale_shape(self.codes.shape[0], self.codes.shape[1], self.block)
        if self.scale.dtype != torch.float32 or tuple(self.scale.shape) != expected:
            raise ValueError(
                f"scale of codes {list(self.codes.shape)} in {self.block} blocks must be "
                f"float32 {list(expected)}; got {self.scale.dtype} {list(self.scale.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Shape [R, C] of the matrix."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes


@dataclass(frozen=True, eq=False)
class WeightRows:
    """Rows of a weight [N, K], and where their codes and the scales of their blocks are.

    Attributes:
        values: float32 [R, K], the rows of the master.
        first: index of the first row in the weight.
        scale: float32 [ceil(N / 128), ceil(K / 128)] of the whole weight.
        codes: float8_e4m3fn [R, K], contiguous; None if no codes are read or written.
    """

    values: Tensor
    first: int
    scale: Tensor
    codes: Tensor | None = None


def scale_shape(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a [rows, columns] matrix, one scale per block or part of a block."""
    return -(-rows // block[0]), -(-columns // block[1])


def check_format(block: tuple[int, int], scale_format: str) -> None:
    """Raise ValueError for an unknown block or scale format."""
    if tuple(block) not in BLOCKS:
        raise ValueError(f"block must be (1, 128) or (128, 128); got {block}")
    if scale_format not in SCALE_FORMATS:
        raise ValueError(f'scale_format must be "pow2" or "fp32"; got {scale_format!r}')
