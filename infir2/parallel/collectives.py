"""Differentiable exchanges of tokens between ranks. Gradients are sums over ranks, added in FP32 and rounded once.

torch.distributed.nn.functional is not used: on gloo its all_gather gives wrong gradients for permuted ones (torch 2.13).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infir2.numerics.formats import E4M3, ROW_BLOCK, Fp8Tensor
from infir2.numerics.quantize import dequantize, quantize
from infir2.numerics.torch_compat import all_gather_single


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, by a copy that the host does not wait for."""
    return (
        x.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and not x.is_cuda
        else x.to(device)
    )


def all_gather(x: Tensor, group: Any, dtype: torch.dtype, as_codes: bool = False) -> Tensor:
    """x [t, ...] of every rank, by rank: [size * t, ...], in `dtype`: FP32, so that gradients are parts not yet rounded, or its own.

    `as_codes`: x [t, D] travels as 1x128 "pow2" codes and arrives as their values: quantising those again changes nothing.
    The gradient passes through.
    """
    return _GatherRows.apply(x, group, dtype, as_codes)


def reduce_scatter(x: Tensor, group: Any, dtype: torch.dtype) -> Tensor:
    """The sum over ranks of x [size * t, D], rounded to `dtype`; this rank's [t, D] of it."""
    return _SumRows.apply(x, group, dtype)


def all_reduce_gradient(x: Tensor, group: Any, first: bool) -> Tensor:
    """x, which every rank of the group has; its gradient is summed over them and goes on from the `first` one alone.

    Quantised once, as in one process: the sum of quantised parts would be another number.
    """
    return _SumGradient.apply(x if x.is_cuda else x.float(), group, first)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, dtype: torch.dtype, as_codes: bool) -> Tensor:
        ctx.group, ctx.dtype = group, x.dtype
        if not as_codes:
            return all_gather_raw(x, group).to(dtype)
        codes = quantize(x, ROW_BLOCK)
        sent = torch.cat(
            (codes.codes.view(torch.uint8), codes.scale.contiguous().view(torch.uint8)), dim=1
        )
        values, scale = (
            part.contiguous()
            for part in all_gather_raw(sent, group).tensor_split([x.shape[1]], dim=1)
        )
        return dequantize(
            Fp8Tensor(values.view(E4M3), scale.view(torch.float32), ROW_BLOCK, codes.scale_format),
            dtype,
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum(grad, ctx.group).to(ctx.dtype), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.dtype = group, x.dtype
        return _sum(x, group).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_raw(grad, ctx.group).to(ctx.dtype), None, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, first: bool) -> Tensor:
        ctx.group, ctx.first = group, first
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.float().contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype) * ctx.first, None, None


def all_gather_raw(x: Tensor, group: Any) -> Tensor:
    """x [t, ...] of every rank, by rank: [size * t, ...], of any dtype and without a gradient."""
    out = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    all_gather_single(out, x.contiguous(), group=group)
    return out


def _sum(x: Tensor, group: Any) -> Tensor:
    parts = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(
        parts, x.contiguous(), group=group
    )  # not reduce-scatter, which would round on the way or send FP32
    wide = torch.promote_types(x.dtype, torch.float32)
    return parts.unflatten(0, (dist.get_world_size(group), -1)).sum(0, dtype=wide).to(x.dtype)
