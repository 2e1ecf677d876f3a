"""How far quantised data is from what it stands for."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infir2.numerics.formats import Fp8Tensor, scale_shape
from infir2.numerics.reference import dequantize_reference

_LARGEST_CODE = 0x7E
_SMALLEST_NORMAL_CODE = 0x08


def relative_error(reference: Tensor, value: Tensor) -> float:
    """`|value - reference| / |reference|`, Frobenius norms in FP64; 0 for two zeros, inf for a zero reference."""
    norm = float(torch.linalg.vector_norm(reference.detach().double()))
    error = float(torch.linalg.vector_norm(value.detach().double() - reference.detach().double()))
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm


def snr_db(reference: Tensor, value: Tensor) -> float:
    """Signal-to-noise ratio of `value` against `reference`, decibels (28 dB is a relative error of 0.0398)."""
    error = relative_error(reference, value)
    return math.inf if error == 0 else -20.0 * math.log10(error)


@dataclass(frozen=True)
class QuantizationCounts:
    """What became of the values of one tensor.

    Example: a gradient with 1,000 values of which 10 were zero and 3 became zero: zeros=10, underflowed=3.

    Attributes:
        values: elements of the tensor.
        zeros: elements that were zero already.
        underflowed: elements that were not zero and got a zero code.
        subnormal: elements whose code is subnormal (fewer than four significant bits).
        saturated: elements with the largest code, +-448.
        blocks: scales of the tensor.
        nonfinite_blocks: blocks that held an Inf or a NaN.
        relative_error: of the dequantised tensor.
    """

    values: int
    zeros: int
    underflowed: int
    subnormal: int
    saturated: int
    blocks: int
    nonfinite_blocks: int
    relative_error: float


def count_quantization(x: Tensor, t: Fp8Tensor) -> QuantizationCounts:
    """Compare x [R, C] with its quantised form `t`. Waits for the device: for diagnosis, not for every step."""
    magnitude = t.codes.view(torch.uint8) & 0x7F
    zero = x == 0
    return QuantizationCounts(
        values=x.numel(),
        zeros=int(zero.sum()),
        underflowed=int(((magnitude == 0) & ~zero).sum()),
        subnormal=int(((magnitude > 0) & (magnitude < _SMALLEST_NORMAL_CODE)).sum()),
        saturated=int((magnitude == _LARGEST_CODE).sum()),
        blocks=math.prod(scale_shape(t.shape[0], t.shape[1], t.block)),
        nonfinite_blocks=int(torch.isnan(t.scale).sum()),
        relative_error=relative_error(x, dequantize_reference(t, torch.float64)),
    )
