"""The definitions of a decoder's operations, in plain PyTorch.

`ops_cuda` has the same functions with the same signatures; `ops` chooses.

Forward: FP64 on a CPU, rounded once to the activation's dtype. In FP32, vectorized and tail code of
a loop differ by an ulp, so a token's result would depend on its neighbors in the batch. Backward:
FP32. RMSNorm and SwiGLU save their inputs and not their outputs, because the linear that follows
saves its input as FP8 codes."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infir2.numerics import gemm_reference as gemm
from infir2.numerics.composed import Composed
from infir2.numerics.formats import ROW_BLOCK, Fp8Tensor
from infir2.numerics.quantize import dequantize, quantize
from infir2.numerics.quantize_reference import chunks
from infir2.numerics.saved_activations import SavedActivations
from infir2.numerics.weight_cache import rounded

_PLAIN = ""  # the scale format of a layer that is not quantized


def linear(
    x: Tensor, layers: Sequence[nn.Linear], dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """`x @ W_i.T + b_i` [T, N_i] for layers that share x [T, K]; see `ops.linear`."""
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    if torch.is_grad_enabled() and (
        x.requires_grad or any(p is not None and p.requires_grad for p in parameters)
    ):
        return _SharedInput.apply(tuple(layers), x, (dtype, out_dtype), *parameters)
    return _linear_forward(x, layers, dtype, out_dtype)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension of x [..., D]."""
    return _RmsNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor, saved: SavedActivations) -> Tensor:
    """`silu(gate) * up`, both [..., F] ([T, F] if they are saved as FP8)."""
    return _SwiGlu.apply(gate, up, saved.pre_activations == "fp8")


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of `x` [T, N, H], first half against second half as in transformers.

    cos and sin are FP32 [T, 1, H / 2]; the result has x's dtype. Products and sums are separate
    operations, each rounded to FP32 by IEEE rules: a fused multiply-add would give other bits in
    the tail of a vectorized loop than in its body."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """`apply_rope` of q and k, and v."""
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


_composed = Composed(linear, rms_norm, swiglu, rotate)
attention_inputs, add_linear = _composed.attention_inputs, _composed.add_linear
feed_forward = _composed.feed_forward


def scale_format_of(layer: nn.Linear) -> str:
    """Scale format of an `Fp8Linear`, "" for a plain layer."""
    return getattr(layer, "scale_format", _PLAIN)


class _SharedInput(torch.autograd.Function):
    """(layers, x, (dtype, out_dtype), weight_0, bias_0, weight_1, ...) -> outputs.

    The parameters are inputs of the node so that gradients reach them. Saved for backward are the
    FP8 codes of x (x itself only if a plain layer is trained), never the output of a layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: tuple[nn.Linear, ...],
        x: Tensor,
        dtypes: tuple[torch.dtype, torch.dtype],
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, quantized = _linear_forward(x, layers, *dtypes)
        ctx.layers, ctx.x_dtype, ctx.dtype = layers, x.dtype, dtypes[0]
        ctx.set_materialize_grads(False)
        needs_weight = ctx.needs_input_grad[3::2]
        formats = {
            scale_format_of(layer)
            for layer, needed in zip(layers, needs_weight, strict=True)
            if needed
        }
        saved = [gemm.input_for_backward(x, quantized[name]) for name in sorted(formats - {_PLAIN})]
        ctx.saved_formats = [(t.block, t.scale_format) for t in saved]
        # Saving the weights takes no memory; autograd then detects a change before the backward.
        ctx.save_for_backward(
            x if _PLAIN in formats else None,
            *(part for t in saved for part in (t.codes, t.scale)),
            *parameters[::2],
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        device = next((g.device.type for g in grads if g is not None), "cpu")
        with torch.autocast(device, enabled=False):
            grad_x, *rest = _linear_backward(ctx, grads)
        return None, grad_x, None, *rest


def _linear_forward(
    x: Tensor, layers: Sequence[nn.Linear], dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, Fp8Tensor]]:
    """Outputs of all layers, and the quantized x by scale format: x is quantized once for each."""
    quantized: dict[str, Fp8Tensor] = {}
    values: dict[str, Tensor] = {}
    outputs = []
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.to(dtype).to(out_dtype)
        name = scale_format_of(layer)
        if name not in values:
            if name == _PLAIN:
                values[name] = x.to(gemm.plain_dtype(x))
            else:
                quantized[name], values[name] = gemm.quantize_input(x, name)
        if name == _PLAIN:
            weight = rounded(layer.weight, dtype, gemm.plain_dtype(x))
        else:
            weight = cast(Any, layer).weight_values(torch.float64)
        outputs.append(gemm.output(values[name], weight, bias, out_dtype))
    return tuple(outputs), quantized


def _linear_backward(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of (x, weight_0, bias_0, ...)."""
    x, *parts = ctx.saved_tensors
    x_values: dict[str, Tensor] = {}
    for i, (block, name) in enumerate(ctx.saved_formats):
        codes, scale = parts[2 * i : 2 * i + 2]
        x_values[name] = gemm.input_values(Fp8Tensor(codes, scale, block, name))
    if x is not None:
        x_values[_PLAIN] = x.to(gemm.backward_dtype(x))
    grad_x: Tensor | None = None
    results: list[Tensor | None] = []
    for i, (layer, grad) in enumerate(zip(ctx.layers, grads, strict=True)):
        need_weight, need_bias = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
        if grad is None:
            results += [None, None]
            continue
        by_row, by_column = _gradient_operands(layer, grad, ctx.needs_input_grad[1], need_weight)
        if by_row is not None:  # grad_x = grad @ W, summed over the layers in FP32
            grad_x = gemm.fp32_product(by_row, _backward_weight(layer, grad, ctx.dtype), grad_x)
        grad_weight = grad_bias = None
        if by_column is not None:  # grad_W = grad.T @ x
            product = gemm.fp32_product(by_column.t(), x_values[scale_format_of(layer)])
            grad_weight = product.to(layer.weight.dtype)
        if need_bias:
            grad_bias = grad.sum(0, dtype=torch.float32).to(layer.bias.dtype)
        results += [grad_weight, grad_bias]
    return [None if grad_x is None else grad_x.to(ctx.x_dtype), *results]


def _gradient_operands(
    layer: nn.Linear, grad: Tensor, by_row: bool, by_column: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Values [T, N] of the output gradient for grad_x and for grad_W, if requested."""
    name = scale_format_of(layer)
    if name != _PLAIN:
        return gemm.gradient_values(grad, name, by_row, by_column)
    values = grad.to(gemm.backward_dtype(grad))
    return values if by_row else None, values if by_column else None


def _backward_weight(layer: nn.Linear, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that the forward multiplied, in the dtype of the operands of grad_x."""
    if scale_format_of(layer) != _PLAIN:
        values: Tensor = cast(Any, layer).weight_values(torch.float32)
        return values
    return rounded(layer.weight, dtype, gemm.backward_dtype(grad))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.double()
        rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, rstd.float())
        return (wide * rstd).mul_(weight.to(x.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        grad = grad.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        # grad_x = rstd * (g - normed * mean(g * normed)), with g = grad * weight
        scaled = grad * weight.to(x.dtype)
        mean = (scaled * normed).mean(dim=-1, keepdim=True)
        return (scaled.sub_(normed.mul_(mean)).mul_(rstd)).to(x.dtype), grad_weight, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, save_fp8: bool) -> Tensor:
        ctx.save_for_backward(*saved_pre_activations(gate, up, save_fp8))
        ctx.dtype = gate.dtype
        out = torch.empty_like(gate)
        for part in chunks(gate):
            out[part] = F.silu(gate[part].double()).mul_(up[part].double())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = restored_pre_activations(ctx.saved_tensors, ctx.dtype)
        wanted = ctx.needs_input_grad[:2]
        grads = [torch.empty_like(gate) if each else None for each in wanted]
        for part in chunks(gate):
            pieces = _swiglu_gradients(gate[part], up[part], grad[part], *wanted)
            for whole, piece in zip(grads, pieces, strict=True):
                if whole is not None and piece is not None:
                    whole[part] = piece
        return grads[0], grads[1], None


def _swiglu_gradients(
    gate: Tensor, up: Tensor, grad: Tensor, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """FP32 gradients of gate and up, if needed."""
    grad, wide = grad.float(), gate.float()
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    grad_up = grad * silu if need_up else None
    if not need_gate:
        return None, grad_up
    # d silu / d gate = silu + sigmoid * (1 - silu)
    slope = (1.0 - silu).mul_(sigmoid).add_(silu)
    return slope.mul_(up).mul_(grad), grad_up


def saved_pre_activations(gate: Tensor, up: Tensor, save_fp8: bool) -> tuple[Tensor, ...]:
    """The tensors that SwiGLU saves: gate and up, or the 1x128 codes and scales of both."""
    if not save_fp8:
        return gate, up
    return tuple(part for t in (quantize(gate), quantize(up)) for part in (t.codes, t.scale))


def restored_pre_activations(saved: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gate and up from `saved_pre_activations`, in `dtype` if they were saved as FP8."""
    if len(saved) == 2:
        return saved[0], saved[1]
    gate, up = (
        dequantize(Fp8Tensor(codes, scale, ROW_BLOCK, "pow2"), dtype)
        for codes, scale in (saved[:2], saved[2:])
    )
    return gate, up
