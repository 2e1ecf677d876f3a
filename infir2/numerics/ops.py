"""The operations between which the decoder's residual stream runs: norm into linears, SwiGLU into linear, linear.

Plain or FP8 is decided by the layers' own types. Forward: FP64, rounded once to the activation's dtype (vectorised and
tail code differ by an ulp in FP32, which would make a token's result depend on its neighbours). Backward: FP32. Each
producer saves its inputs, never its output: the linear behind it saves that as FP8.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infir2.numerics.linear import linear


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension. weight: FP32 master [D], rounded to x's dtype."""

    def __init__(self, size: int, eps: float = 1e-6, device: torch.device | str | None = None) -> None:
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


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, both [..., F], rounded once."""
    return _SwiGlu.apply(gate, up)


def norm_linear(x: Tensor, norm: RMSNorm, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """`layer(norm(x))` for every layer, x [T, D] -> [T, N_i]; the normed x is quantised once and kept as FP8 only."""
    return linear(rms_norm(x, norm.weight, norm.eps), layers)


def swiglu_linear(gate: Tensor, up: Tensor, down: nn.Linear) -> Tensor:
    """`down(silu(gate) * up)`, gate and up [T, F] -> [T, D]; the product is kept as FP8 only."""
    return linear(swiglu(gate, up), (down,))[0]


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
        scaled = grad * weight.to(x.dtype)
        mean = (scaled * normed).mean(dim=-1, keepdim=True)
        return (scaled.sub_(normed.mul_(mean)).mul_(rstd)).to(x.dtype), grad_weight, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate.double()).mul_(up).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        grad, wide = grad.float(), gate.float()
        sigmoid = torch.sigmoid(wide)
        silu = wide * sigmoid
        grad_up = (grad * silu).to(up.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_up
        slope = silu + sigmoid * (1.0 - silu)
        return (slope.mul_(up).mul_(grad)).to(gate.dtype), grad_up
