"""Operands of the GEMMs in `ops_cuda`: BF16 tensors or codes, in the layout that each product
reads.

    out    = x      @ W.T      x 1x128 along K,            W 128x128
    grad_x = grad   @ W        grad 1x128 along N,         W.T 128x128
    grad_W = grad.T @ x        grad.T 1x128 along tokens,  x.T 128x128

A layer in BF16 has the scale format "" and uses one tensor for both layouts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infir2.numerics.formats import ROW_BLOCK, TILE_BLOCK, Fp8Tensor
from infir2.numerics.gemm_reference import fp32_product
from infir2.numerics.gemm_scaled import gemm_nt
from infir2.numerics.kernels import api as kernels
from infir2.numerics.stacked_weights import Operand, Stack


def product(
    a: Operand,
    b: Operand,
    add: Tensor | None = None,
    transposed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`a @ b.T (+ add)` [M, N] in BF16, or the FP32 sums for a wider `dtype`.

    With `transposed`, b is the codes of W.T, or in BF16 W itself.
    """
    if isinstance(a, Fp8Tensor):
        assert isinstance(b, Fp8Tensor)
        out = gemm_nt(a.codes, a.scale, b.codes, b.scale, a.block, b.block, dtype)
        return out if add is None else out.add_(add)
    assert isinstance(b, Tensor)
    right = b if transposed else b.t()
    if dtype != torch.bfloat16:
        return fp32_product(a, right)
    return a @ right if add is None else torch.addmm(add, a, right)


def norm(x: Tensor, weight: Tensor, eps: float, scale_format: str) -> tuple[Operand, Tensor]:
    """rms_norm(x) as the forward reads it, and 1 / rms [T] float32."""
    if scale_format:
        return kernels.rms_norm_quantize(x, weight, eps, scale_format)
    normed, rstd = kernels.rms_norm(x, weight, eps)
    return normed, rstd


def gradient(grad: Tensor, scale_format: str) -> tuple[Operand, Operand]:
    """The output gradient as grad_x and as grad_W read it."""
    return kernels.quantize_gradient(grad, scale_format) if scale_format else (grad, grad)


def normed_t(
    x: Tensor, weight: Tensor, rstd: Tensor, eps: float, saved: Sequence[Tensor], scale_format: str
) -> Operand:
    """rms_norm(x) as the weight gradient reads it: from the saved operand, or recomputed."""
    if not scale_format:
        recomputed: Tensor = saved[0] if saved else kernels.rms_norm(x, weight, eps)[0]
        return recomputed
    if saved:
        return kernels.transpose(Fp8Tensor(saved[0], saved[1], ROW_BLOCK, scale_format))
    return kernels.rms_norm_transposed(x, rstd, weight, scale_format)


def swiglu_t(gate: Tensor, up: Tensor, saved: Sequence[Tensor], scale_format: str) -> Operand:
    """silu(gate) * up as the weight gradient reads it: from the saved operand, or recomputed."""
    if not scale_format:
        recomputed: Tensor = saved[0] if saved else kernels.swiglu_product(gate, up)
        return recomputed
    if saved and scale_format == "fp32":
        return restored(saved[0], saved[1], TILE_BLOCK, scale_format)
    if saved:
        return kernels.transpose(restored(saved[0], saved[1], ROW_BLOCK, scale_format))
    return kernels.swiglu_transposed(gate, up, scale_format)


def weight_gradients(
    ctx: Any, first: int, layers: Stack, grad_t: Operand, x_t: Operand, grad: Tensor | None
) -> list[Tensor | None]:
    """FP32 gradients of (weight, bias) of each layer, None for those that autograd does not need.

    Args:
        ctx: context of the autograd node.
        first: index of the layers' parameters among the node's inputs.
        layers: the layers.
        grad_t: output gradient as grad_W reads it.
        x_t: input as grad_W reads it.
        grad: output gradient [T, N] for the biases; None if the layers have none.
    """
    needed = ctx.needs_input_grad[first : first + len(layers.parameters)]
    weights: Sequence[Tensor | None] = [None] * len(layers.layers)
    biases: Sequence[Tensor | None] = weights
    if any(needed[::2]):
        weights = _stacked_weight_gradient(grad_t, x_t).split(layers.sizes)
    if grad is not None and any(needed[1::2]):
        biases = grad.sum(0, dtype=torch.float32).split(layers.sizes)
    gradients = (g for pair in zip(weights, biases, strict=True) for g in pair)
    return [g if need else None for g, need in zip(gradients, needed, strict=True)]


def _stacked_weight_gradient(grad_t: Operand, x_t: Operand) -> Tensor:
    """`grad.T @ x` [N, K] FP32."""
    if isinstance(grad_t, Fp8Tensor):
        assert isinstance(x_t, Fp8Tensor)
        scales = (grad_t.scale, x_t.codes, x_t.scale)
        return gemm_nt(grad_t.codes, *scales, grad_t.block, x_t.block, torch.float32)
    assert isinstance(x_t, Tensor)
    return fp32_product(grad_t.t(), x_t)


def tensors_of(operand: Operand | None, small: bool = False) -> tuple[Tensor, ...]:
    """The tensors to save for the backward.

    `small`: save only the exponent of a power-of-two scale, one byte instead of four.
    """
    if operand is None or isinstance(operand, Tensor):
        return () if operand is None else (operand,)
    if small and operand.scale_format == "pow2":
        return operand.codes, (operand.scale.view(torch.int32) >> 23).to(torch.uint8)
    return operand.codes, operand.scale


def restored(codes: Tensor, scale: Tensor, block: tuple[int, int], scale_format: str) -> Fp8Tensor:
    """The inverse of `tensors_of`.

    The exponent of a NaN scale becomes Inf, which makes the products non-finite as well.
    """
    if scale.dtype == torch.uint8:
        scale = (scale.to(torch.int32) << 23).view(torch.float32)
    return Fp8Tensor(codes, scale, block, scale_format)
