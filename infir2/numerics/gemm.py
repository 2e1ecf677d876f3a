"""The GEMMs of a linear layer, forward and backward, for data that is quantised and for data that is not.

    out    = x      @ W.T      x 1x128 along K,            W 128x128
    grad_x = grad   @ W        grad 1x128 along N,         W.T 128x128, from the same codes
    grad_W = grad.T @ x        grad.T 1x128 along tokens,  x.T 128x128, from the forward's codes

On a CPU the FP8 GEMMs are emulated on dequantised values. The forward sums in FP64 and rounds once, so that the result
for a token does not depend on the batch around it; the backward sums in FP32. This file is the seam where a device's
block-scaled GEMMs take over.
"""

import torch
from torch import Tensor

from infir2.numerics.formats import ROW_BLOCK, TILE_BLOCK, Fp8Tensor
from infir2.numerics.quantize import dequantize, quantize, transpose


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x @ weight.T + bias` for FP64 x [T, K] and weight [N, K], rounded once to `dtype`; bias has its compute dtype."""
    out = x @ weight.t()
    if bias is not None:
        out += bias
    return out.to(dtype)


def quantize_input(x: Tensor, scale_format: str) -> tuple[Fp8Tensor, Tensor]:
    """The activation x [T, K] as 1x128 codes and as the FP64 values that the forward multiplies."""
    codes = quantize(x, ROW_BLOCK, scale_format)
    return codes, dequantize(codes, torch.float64)


def input_for_backward(x: Tensor, codes: Fp8Tensor) -> Fp8Tensor:
    """What the weight gradient needs of x [T, K]: its 1x128 "pow2" codes, or x.T in 128x128 "fp32" blocks."""
    if codes.scale_format == "pow2":
        return codes
    return quantize(x.t(), TILE_BLOCK, codes.scale_format)


def saved_input_values(saved: Fp8Tensor) -> Tensor:
    """FP32 values [T, K] of the weight gradient's second operand, from what `input_for_backward` returned."""
    transposed = saved if saved.block == TILE_BLOCK else transpose(saved)
    return dequantize(transposed).t()


def gradient_values(grad: Tensor, scale_format: str) -> Tensor:
    """FP32 values of the output gradient [T, N] after 1x128 quantisation along N."""
    return dequantize(quantize(grad, ROW_BLOCK, scale_format))


def gradient_values_by_token(grad: Tensor, scale_format: str) -> Tensor:
    """FP32 values [N, T] of the transposed output gradient after 1x128 quantisation along the tokens."""
    return dequantize(quantize(grad.t(), ROW_BLOCK, scale_format))
