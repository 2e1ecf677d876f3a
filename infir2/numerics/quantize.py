"""Quantize, dequantize, transpose: the public conversions.

They check their input, count non-finite blocks, and choose the definition (`_definitions_for`):
`quantize_reference` defines the bits, `kernels.api` reproduces them on a GPU.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from infir2.numerics import quantize_reference
from infir2.numerics.formats import ROW_BLOCK, Fp8Tensor, WeightRows, check_format
from infir2.numerics.kernels import usable

_SMALL_SCALES, _BATCH = 1 << 16, 256
_INPUT_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


class Conversions(Protocol):
    """The signatures of `quantize_reference` and `kernels.api`."""

    def quantize(self, x: Tensor, block: tuple[int, int], scale_format: str) -> Fp8Tensor: ...
    def quantize_weight(self, master: Tensor, scale_format: str) -> Fp8Tensor: ...
    def largest_magnitudes(self, weights: Sequence[WeightRows]) -> None: ...
    def encode_weights(self, weights: Sequence[WeightRows], scale_format: str) -> None: ...
    def dequantize(self, t: Fp8Tensor, dtype: torch.dtype) -> Tensor: ...
    def transpose(self, t: Fp8Tensor) -> Fp8Tensor: ...


def _definitions_for(tensor: Tensor) -> Conversions:
    if not usable(tensor.device):
        return quantize_reference
    from infir2.numerics.kernels import api  # imports triton, which may be missing elsewhere

    return api


def quantize(
    x: Tensor, block: tuple[int, int] = ROW_BLOCK, scale_format: str = "pow2"
) -> Fp8Tensor:
    """Quantize x [R, C] to E4M3 with one scale per block; any shape (R = 0 too), any strides.

    Args:
        x: BF16, FP32 or FP16 matrix.
        block: (1, 128) or (128, 128).
        scale_format: "pow2" or "fp32".

    Returns:
        Codes and scales as `infir2.numerics.quantize_reference` defines them. A block with an Inf
        or a NaN is NaN throughout and is counted in `nonfinite_blocks`.

    Raises:
        ValueError: x is not a matrix of one of those dtypes, or unknown block or format.
    """
    block = (block[0], block[1])
    check_format(block, scale_format)
    if x.ndim != 2 or x.dtype not in _INPUT_DTYPES:
        raise ValueError(
            f"quantize needs a BF16, FP32 or FP16 matrix [R, C]; got {x.dtype} {list(x.shape)}"
        )
    with torch.no_grad():
        result = _definitions_for(x).quantize(x, block, scale_format)
    nonfinite_blocks.add(result.scale)
    return result


def quantize_weight(master: Tensor, scale_format: str) -> Fp8Tensor:
    """128x128 blocks of the BF16-rounded master [N, K]: the one definition of a weight's bytes."""
    master = master.detach()
    result = _definitions_for(master).quantize_weight(master, scale_format)
    nonfinite_blocks.add(result.scale)
    return result


def largest_magnitudes(weights: Sequence[WeightRows]) -> None:
    """Write the largest magnitude of each block's rows, rounded to BF16, where its scale belongs.

    Inf for Inf or NaN, because a reduction over ranks could lose a NaN. Blocks without a row among
    `weights` are not written.
    """
    _definitions_for(weights[0].values).largest_magnitudes(weights)


def encode_weights(weights: Sequence[WeightRows], scale_format: str) -> None:
    """Write the codes of rows, rounded to BF16, whose blocks have their scales."""
    _definitions_for(weights[0].values).encode_weights(weights, scale_format)


def dequantize(t: Fp8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`codes * scale` [R, C] in `dtype`.

    Exact in FP64; with "pow2" scales, exact in every dtype that can represent the values.
    """
    return _definitions_for(t.codes).dequantize(t, dtype)


def transpose(t: Fp8Tensor) -> Fp8Tensor:
    """The transposed matrix in 128x128 blocks, from the codes alone.

    Raises:
        ValueError: 1x128 "fp32", whose codes cannot be rescaled exactly.
    """
    return _definitions_for(t.codes).transpose(t)


class NonFiniteBlocks:
    """Counts quantized blocks that held an Inf or a NaN, per device, without waiting for a GPU.

    Example: `nonfinite_blocks.take(device)` once per optimizer step, added to what the step reduces
    and reads anyway.

    On a CPU, every quantization is counted. The fused operations of a GPU (`ops_cuda`) do not count
    activations and gradients, because counting would cost them three more launches per tensor;
    weights and the conversions of `infir2.numerics.quantize` are counted there too.
    """

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}
        self._pending: list[Tensor] = []

    def add(self, scale: Tensor) -> None:
        """Count the NaN scales in `scale` (float32, any shape)."""
        # Scales are positive: their sum is NaN only if one is. A CPU reads it at once.
        if scale.is_meta or (scale.device.type == "cpu" and not math.isnan(scale.sum().item())):
            return
        if scale.is_cuda and scale.numel() < _SMALL_SCALES:
            # A weight's scales: count many weights at once, a launch costs more than the count.
            self._pending.append(scale)
            if len(self._pending) >= _BATCH:
                self._count_pending()
        else:
            self._count(scale)

    def add_count(self, found: Tensor) -> None:
        """Add a number of blocks, int64 [], whose memory may be written anew."""
        count = self._counts.get(found.device)
        self._counts[found.device] = found.clone() if count is None else count + found

    def take(self, device: torch.device) -> Tensor:
        """Blocks counted on `device` since the last call, int64 []; the host does not wait."""
        self._count_pending()
        count = self._counts.pop(device, None)
        return torch.zeros((), dtype=torch.int64, device=device) if count is None else count

    @contextmanager
    def ignored(self, device: torch.device) -> Iterator[None]:
        """Blocks on `device` are not counted inside."""
        before = self.take(device)
        try:
            yield
        finally:
            self.take(device)
            self._counts[device] = before

    def _count_pending(self) -> None:
        pending, self._pending = self._pending, []
        for device in {scale.device for scale in pending}:
            self._count(torch.cat([s.flatten() for s in pending if s.device == device]))

    def _count(self, scale: Tensor) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be added to outside
            self.add_count(torch.isnan(scale).sum())


nonfinite_blocks = NonFiniteBlocks()
