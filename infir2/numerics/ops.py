"""The operations between which the decoder's residual stream runs: norm into linears, SwiGLU into linear, linear.

Plain or FP8 is decided by the layers' own types; on a GPU `infir2.numerics.ops_cuda` takes over. Forward: FP64, rounded once
to the activation's dtype (vectorised and tail code differ by an ulp in FP32, which would make a token's result depend on
its neighbours). Backward: FP32. Each producer saves its inputs, never its output: the linear behind it saves that as FP8.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infir2.numerics import ops_cuda as fused
from infir2.numerics.formats import ROW_BLOCK, Fp8Tensor
from infir2.numerics.linear import linear
from infir2.numerics.quantize import dequantize, quantize
from infir2.numerics.saved_activations import SavedActivations

Rope = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension. weight: FP32 master [D], rounded to x's dtype."""

    def __init__(
        self, size: int, eps: float = 1e-6, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [..., D] over D, times weight [D] rounded to x's dtype; rounded once."""
    return _RmsNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor, saved: SavedActivations = SavedActivations()) -> Tensor:  # noqa: B008 (frozen)
    """`silu(gate) * up`, both [..., F], rounded once; `saved` may keep gate and up [T, F] as FP8 for the backward."""
    return _SwiGlu.apply(gate, up, saved.pre_activations == "fp8")


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of `x` [T, N, H] (first half against second half, as in transformers) and keep its dtype.

    cos and sin are FP32 [T, 1, H / 2]. Written as separate products and sums, each rounded to FP32 by IEEE rules: a fused
    multiply-add would give other bits in the tail of a vector loop than in its body.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention_inputs(
    x: Tensor,
    norm: RMSNorm,
    layers: Sequence[nn.Linear],
    head_dim: int,
    rope: Rope | None,
    saved: SavedActivations,
) -> tuple[Tensor, ...]:
    """(x, q, k, v): the heads [T, N, H] of `layer(norm(x))`, q and k rotated if `rope` is given.

    Take the returned x for the residual sum: its gradient is then added inside the norm's backward.
    """
    whole = fused.stack(layers) if fused.serves(x) else None
    if whole is not None:
        return fused.attention_inputs(x, norm.weight, norm.eps, whole, head_dim, rope, saved)
    q, k, v = (y.unflatten(1, (-1, head_dim)) for y in linear(norm(x), layers))
    return (x, q, k, v) if rope is None else (x, apply_rope(q, *rope), apply_rope(k, *rope), v)


def add_linear(residual: Tensor, x: Tensor, layer: nn.Linear, saved: SavedActivations) -> Tensor:
    """`residual + layer(x)`, both [T, N]; x [T, K]."""
    whole = fused.stack((layer,)) if fused.serves(x) else None
    if whole is not None:
        return fused.add_linear(residual, x, whole, saved)
    return residual + linear(x, (layer,))[0]


def feed_forward(
    x: Tensor,
    norm: RMSNorm,
    gate: nn.Linear,
    up: nn.Linear,
    down: nn.Linear,
    saved: SavedActivations,
) -> Tensor:
    """`x + down(silu(gate(n)) * up(n))` with n = norm(x), [T, D] -> [T, D]."""
    pair, last = (
        (fused.stack((gate, up)), fused.stack((down,))) if fused.serves(x) else (None, None)
    )
    if (
        pair is not None
        and last is not None
        and all(layer.bias is None for layer in (gate, up, down))
    ):
        return fused.feed_forward(x, norm.weight, norm.eps, pair, last, saved)
    gate_values, up_values = linear(norm(x), (gate, up))
    return x + linear(swiglu(gate_values, up_values, saved), (down,))[0]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if fused.serves(x):
            y, scale = fused.kernels().rms_norm(x.flatten(0, -2), weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return y.view(x.shape)
        wide = x.double()
        rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, rstd.float())
        return (wide * rstd).mul_(weight.to(x.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        if fused.serves(x):
            flat = (t.flatten(0, -2) for t in (grad, x))
            grad_x, grad_weight = fused.kernels().rms_norm_backward(*flat, rstd, weight, None)
            return grad_x.view(x.shape), grad_weight, None
        normed = x.float() * rstd
        grad = grad.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        scaled = grad * weight.to(x.dtype)
        mean = (scaled * normed).mean(dim=-1, keepdim=True)
        return (scaled.sub_(normed.mul_(mean)).mul_(rstd)).to(x.dtype), grad_weight, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, as_fp8: bool) -> Tensor:
        kept = [quantize(t) for t in (gate, up)] if as_fp8 else None
        ctx.save_for_backward(
            *((gate, up) if kept is None else (part for t in kept for part in (t.codes, t.scale)))
        )
        ctx.dtype = gate.dtype
        if fused.serves(gate):
            return fused.kernels().swiglu_product(gate, up)
        return F.silu(gate.double()).mul_(up).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up, *rest = ctx.saved_tensors
        if rest:
            gate, up = (
                dequantize(Fp8Tensor(codes, scale, ROW_BLOCK, "pow2"), ctx.dtype)
                for codes, scale in ((gate, up), rest)
            )
        if fused.serves(gate):
            return *fused.kernels().swiglu_backward(grad, gate, up).chunk(2, dim=1), None
        grad, wide = grad.float(), gate.float()
        sigmoid = torch.sigmoid(wide)
        silu = wide * sigmoid
        grad_up = (grad * silu).to(up.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_up, None
        slope = silu + sigmoid * (1.0 - silu)
        return (slope.mul_(up).mul_(grad)).to(gate.dtype), grad_up, None
