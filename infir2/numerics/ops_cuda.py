"""A decoder's operations on a GPU: kernels around one GEMM per group of layers, in BF16 and in FP8.

    attention_inputs   norm -> [q | k | v] -> bias, rotation
    add_linear         residual + linear(x)
    linear             the outputs of layers that share x
    feed_forward       x + down(silu(gate) * up) of norm(x)

The functions have the signatures of `ops_reference`, which defines them; `ops` chooses. Each of the
four is one autograd node, and the gradient of the residual is added inside the norm's backward.
Layers that share an input are one matrix (`stacked_weights`). `SavedActivations` says what is saved
for the backward; the rest is recomputed with the same bits. Nothing waits for the GPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infir2.numerics.composed import Composed, Rope
from infir2.numerics.formats import GROUP, ROW_BLOCK, TILE_BLOCK, Fp8Tensor
from infir2.numerics.kernels import api as kernels
from infir2.numerics.operands_cuda import (
    gradient,
    norm,
    normed_t,
    product,
    restored,
    swiglu_t,
    tensors_of,
    weight_gradients,
)
from infir2.numerics.ops_reference import (
    restored_pre_activations,
    saved_pre_activations,
)
from infir2.numerics.saved_activations import SavedActivations
from infir2.numerics.stacked_weights import Operand, Stack, stack


def linear(
    x: Tensor, layers: Sequence[nn.Linear], dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The outputs [T, N_i] of layers that share x [T, K]; saves codes of x, or x for BF16 layers.

    x may be FP32 with BF16 values (`dtype`); its gradient is then FP32 too. Outputs in a wider
    `out_dtype` are the GEMM's FP32 sums.
    """
    stacked = stack(layers)
    if stacked is None:
        return tuple(linear(x, (layer,), dtype, out_dtype)[0] for layer in layers)
    out: Tensor = _AddLinear.apply(
        None, x, stacked, SavedActivations(), False, out_dtype, *stacked.parameters
    )
    return out.split(stacked.sizes, dim=1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension of x [..., D]."""
    return _RmsNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor, saved: SavedActivations) -> Tensor:
    """`silu(gate) * up`, both [T, F]."""
    return _SwiGlu.apply(gate, up, saved.pre_activations == "fp8")


def attention_inputs(
    x: Tensor,
    weight: Tensor,
    eps: float,
    layers: Sequence[nn.Linear],
    head_dim: int,
    rope: Rope | None,
    saved: SavedActivations,
) -> tuple[Tensor, ...]:
    """(x, q, k, v): heads [T, N, H] of `layer(rms_norm(x))`, q and k rotated if `rope` is given.

    The returned x is the residual, whose gradient is added inside the norm's backward.
    """
    stacked = stack(layers)
    if stacked is not None:
        return _NormLinear.apply(
            x, weight, eps, stacked, head_dim, rope, saved, *stacked.parameters
        )
    return _composed.attention_inputs(x, weight, eps, layers, head_dim, rope, saved)


def add_linear(residual: Tensor, x: Tensor, layer: nn.Linear, saved: SavedActivations) -> Tensor:
    """`residual + layer(x)`; saves x itself, which its producer (attention) saves anyway."""
    stacked = Stack((layer,))
    return _AddLinear.apply(residual, x, stacked, saved, True, x.dtype, *stacked.parameters)


def feed_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: nn.Linear,
    up: nn.Linear,
    down: nn.Linear,
    saved: SavedActivations,
) -> Tensor:
    """`x + down(silu(gate(n)) * up(n))` with n = rms_norm(x), [T, D] -> [T, D]."""
    gate_up, last = stack((gate, up)), Stack((down,))
    if gate_up is not None and all(layer.bias is None for layer in (gate, up, down)):
        return _FeedForward.apply(
            x, weight, eps, gate_up, last, saved, *gate_up.parameters, *last.parameters
        )
    return _composed.feed_forward(x, weight, eps, gate, up, down, saved)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = kernels.rms_norm(x.flatten(0, -2), weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        out: Tensor = y.view(x.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        flat_grad, flat_x = grad.flatten(0, -2), x.flatten(0, -2)
        grad_x, grad_weight = kernels.rms_norm_backward(flat_grad, flat_x, rstd, weight, None)
        return grad_x.view(x.shape), grad_weight, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, save_fp8: bool) -> Tensor:
        ctx.save_for_backward(*saved_pre_activations(gate, up, save_fp8))
        ctx.dtype = gate.dtype
        out: Tensor = kernels.swiglu_product(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = restored_pre_activations(ctx.saved_tensors, ctx.dtype)
        grad_gate, grad_up = kernels.swiglu_backward(grad, gate, up).chunk(2, dim=1)
        return grad_gate, grad_up, None


class _Rope(torch.autograd.Function):
    """(q, k, v, cos, sin) -> q and k rotated, and v; heads [T, N, H]."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v, cos, sin = inputs
        ctx.save_for_backward(cos, sin)
        return _Rope.heads(inputs[:3], kernels.rope(q, k, v, None, cos, sin, False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rotated = kernels.rope(*grads, None, *ctx.saved_tensors, True)
        return *_Rope.heads(grads, rotated), None, None

    @staticmethod
    def heads(like: Sequence[Tensor], joined: Tensor) -> tuple[Tensor, ...]:
        """The parts of `joined` [T, (N + 2 G) H] that have the shapes of `like`."""
        heads = joined.view(len(joined), -1, like[0].shape[2])
        return heads.split([part.shape[1] for part in like], dim=1)


_composed = Composed(linear, rms_norm, swiglu, _Rope.apply)


class _NormLinear(torch.autograd.Function):
    """(x, weight, eps, layers, head_dim, rope, saved, *parameters) -> (x, heads of each layer)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        layers: Stack,
        head_dim: int,
        rope: Rope | None,
        saved: SavedActivations,
        *_: Tensor | None,
    ) -> tuple[Tensor, ...]:
        normed, rstd = norm(x, weight, eps, layers.scale_format)
        out = product(normed, layers.operand())
        num_heads = [size // head_dim for size in layers.sizes]
        bias = layers.bias()
        if rope is None:
            biased = out if bias is None else out.add_(bias.bfloat16())
            heads = biased.view(len(out), -1, head_dim)
        else:
            parts = out.view(len(out), -1, head_dim).split(num_heads, dim=1)
            heads = kernels.rope(*parts, bias, *rope, False).view(len(out), -1, head_dim)
        kept = normed if saved.keeps_norms(layers.scale_format) else None
        ctx.save_for_backward(x, weight, rstd, *(rope or (None, None)), *tensors_of(kept))
        ctx.layers, ctx.saved, ctx.eps, ctx.rotated = layers, saved, eps, rope is not None
        return x, *heads.split(num_heads, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual: Tensor | None, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd, cos, sin, *kept = ctx.saved_tensors
        if ctx.rotated:
            grad = kernels.rope(*grads, None, cos, sin, True)
        else:
            grad = torch.cat([g.flatten(1) for g in grads], dim=1)
        layers = ctx.layers
        rows, columns = gradient(grad, layers.scale_format)
        x_t = normed_t(x, weight, rstd, ctx.eps, kept, layers.scale_format)
        weights = weight_gradients(ctx, 7, layers, columns, x_t, grad)
        weight_t = layers.operand_t(ctx.saved.keep_transposed_weights)
        grad_normed = product(rows, weight_t, transposed=True)
        grad_x, grad_weight = kernels.rms_norm_backward(grad_normed, x, rstd, weight, residual)
        return grad_x, grad_weight, None, None, None, None, None, *weights


class _AddLinear(torch.autograd.Function):
    """(residual, x, layers, saved, keep_x, out_dtype, *parameters) -> residual + linear(x)."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor | None,
        x: Tensor,
        layers: Stack,
        saved: SavedActivations,
        keep_x: bool,
        out_dtype: torch.dtype,
        *_: Tensor | None,
    ) -> Tensor:
        scale_format, ctx.x_dtype = layers.scale_format, x.dtype
        x = x.bfloat16()  # exact: an FP32 x has BF16 values
        kept: Operand = x
        if scale_format and (keep_x or scale_format == "pow2"):
            operand: Operand = kernels.quantize(x, ROW_BLOCK, scale_format)
            kept = x if keep_x else operand
        elif scale_format:
            operand, kept = kernels.quantize_input(x, scale_format)
        else:
            operand = x
        bias = layers.bias()
        out = product(operand, layers.operand(), add=residual, dtype=out_dtype)
        ctx.save_for_backward(*tensors_of(kept))
        ctx.layers, ctx.saved = layers, saved
        ctx.block = kept.block if isinstance(kept, Fp8Tensor) else None
        return out if bias is None else out.add_(bias.bfloat16())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers, (x, *scale) = ctx.layers, ctx.saved_tensors
        x_t: Operand = x
        if ctx.block is not None:
            codes = Fp8Tensor(x, scale[0], ctx.block, layers.scale_format)
            x_t = codes if ctx.block == TILE_BLOCK else kernels.transpose(codes)
        elif layers.scale_format:
            x_t = kernels.quantize_transposed(x, layers.scale_format)
        # Exact: the gradient of an unrounded output comes from a sum that was rounded.
        grad = grad.bfloat16()
        rows, columns = gradient(grad, layers.scale_format)
        weights = weight_gradients(ctx, 6, layers, columns, x_t, grad)
        grad_x = None
        if ctx.needs_input_grad[1]:
            weight_t = layers.operand_t(ctx.saved.keep_transposed_weights)
            grad_x = product(rows, weight_t, transposed=True, dtype=ctx.x_dtype)
        return grad if ctx.needs_input_grad[0] else None, grad_x, None, None, None, None, *weights


class _FeedForward(torch.autograd.Function):
    """(x, weight, eps, gate_up, down, saved, *parameters) -> x + down(swiglu(gate_up(norm(x))))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        gate_up: Stack,
        down: Stack,
        saved: SavedActivations,
        *_: Tensor | None,
    ) -> Tensor:
        normed, rstd = norm(x, weight, eps, gate_up.scale_format)
        pre = product(normed, gate_up.operand())
        gate, up = pre.chunk(2, dim=1)
        y: Operand = (
            kernels.swiglu_quantize(gate, up, down.scale_format)
            if down.scale_format
            else kernels.swiglu_product(gate, up)
        )
        out = product(y, down.operand(), add=x)
        small = saved.pre_activations == "fp8"
        kept_pre: Operand = kernels.quantize(pre) if small else pre
        kept_normed = normed if saved.keeps_norms(gate_up.scale_format) else None
        kept_y: Operand | None = y if saved.keeps_products() else None
        if kept_y is not None and down.scale_format == "fp32":
            # "fp32" codes cannot be transposed, so the transposed layout is saved.
            kept_y = kernels.swiglu_transposed(gate, up, "fp32")
        parts = [tensors_of(kept_pre, small), tensors_of(kept_normed), tensors_of(kept_y, small)]
        ctx.save_for_backward(x, weight, rstd, *(t for part in parts for t in part))
        ctx.counts = [len(part) for part in parts]
        ctx.gate_up, ctx.down, ctx.saved, ctx.eps = gate_up, down, saved, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd, *rest = ctx.saved_tensors
        num_pre, num_normed, _ = ctx.counts
        kept_normed, kept_y = rest[num_pre : num_pre + num_normed], rest[num_pre + num_normed :]
        gate_up, down, keep = ctx.gate_up, ctx.down, ctx.saved.keep_transposed_weights
        pre = rest[0]
        if num_pre == 2:
            codes = restored(rest[0], rest[1], ROW_BLOCK, "pow2")
            pre = kernels.dequantize(codes, torch.bfloat16)
        gate, up = pre.chunk(2, dim=1)
        rows, columns = gradient(grad, down.scale_format)
        y_t = swiglu_t(gate, up, kept_y, down.scale_format)
        first = 6 + len(gate_up.parameters)
        down_weights = weight_gradients(ctx, first, down, columns, y_t, grad)
        # Activations are largest here: free what is not needed any more. What a checkpoint computed
        # again has no other reference than these.
        del y_t, kept_y, rest, columns
        grad_y = product(rows, down.operand_t(keep), transposed=True)
        del rows
        if gate_up.scale_format and gate.shape[1] % GROUP == 0:
            rows, columns = kernels.swiglu_backward_quantize(grad_y, gate, up, gate_up.scale_format)
        else:
            grad_pre = kernels.swiglu_backward(grad_y, gate, up)
            rows, columns = gradient(grad_pre, gate_up.scale_format)
            del grad_pre
        del grad_y, pre, gate, up
        x_t = normed_t(x, weight, rstd, ctx.eps, kept_normed, gate_up.scale_format)
        gate_up_weights = weight_gradients(ctx, 6, gate_up, columns, x_t, None)
        grad_normed = product(rows, gate_up.operand_t(keep), transposed=True)
        grad_x, grad_weight = kernels.rms_norm_backward(grad_normed, x, rstd, weight, grad)
        return grad_x, grad_weight, None, None, None, None, *gate_up_weights, *down_weights
