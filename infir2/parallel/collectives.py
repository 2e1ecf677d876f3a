"""Differentiable collectives over the tokens (dimension 0) of a group of ranks.

    forward                       backward
    all_gather                    reduce_scatter, rounded to the dtype of the input
    reduce_scatter                all_gather
    identity                      all_reduce (all_reduce_gradient)

Sums over ranks are added in FP32 (FP64 for FP64 inputs) and rounded once. A reduce_scatter is
therefore an all_to_all and a local sum: NCCL's and gloo's would round after each addition, or need
FP32 on the wire.

torch.distributed.nn.functional is not used: on gloo, its all_gather returns wrong gradients when
the incoming gradient is a permuted view (torch 2.13).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infir2.numerics.formats import E4M3, ROW_BLOCK, Fp8Tensor
from infir2.numerics.quantize import dequantize, quantize
from infir2.numerics.torch_compat import all_gather_single


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy x to `device`; the host does not wait for the copy."""
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def all_gather(x: Tensor, group: Any, dtype: torch.dtype, as_codes: bool = False) -> Tensor:
    """Concatenate x [t, ...] of all ranks in the order of ranks: [size * t, ...] in `dtype`.

    With `dtype` FP32 the gradients of x are exchanged unrounded.

    `as_codes` sends x [t, D] as FP8 codes (1x128 blocks, "pow2" scales) and returns their values;
    quantizing these again gives the same codes. The gradient ignores the quantization.
    """
    return _AllGather.apply(x, group, dtype, as_codes)


def reduce_scatter(x: Tensor, group: Any, dtype: torch.dtype) -> Tensor:
    """Sum x [size * t, D] over ranks and round to `dtype`; returns this rank's rows [t, D]."""
    return _ReduceScatter.apply(x, group, dtype)


def all_reduce_gradient(x: Tensor, group: Any, keep: bool) -> Tensor:
    """Return x, which all ranks of the group hold; sum its gradient over them.

    Only the rank with `keep` passes the sum on; the others pass on zeros. So the gradient is
    quantized once, after the sum, as in a single process: quantized parts have another sum.
    """
    return _AllReduceGradient.apply(x if x.is_cuda else x.float(), group, keep)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, dtype: torch.dtype, as_codes: bool) -> Tensor:
        ctx.group, ctx.dtype = group, x.dtype
        if not as_codes:
            return all_gather_raw(x, group).to(dtype)
        fp8 = quantize(x, ROW_BLOCK)
        payload = torch.cat(
            (fp8.codes.view(torch.uint8), fp8.scale.contiguous().view(torch.uint8)), dim=1
        )
        codes, scale = (
            part.contiguous()
            for part in all_gather_raw(payload, group).tensor_split([x.shape[1]], dim=1)
        )
        return dequantize(
            Fp8Tensor(codes.view(E4M3), scale.view(torch.float32), ROW_BLOCK, fp8.scale_format),
            dtype,
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _reduce_scatter_raw(grad, ctx.group).to(ctx.dtype), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.dtype = group, x.dtype
        return _reduce_scatter_raw(x, group).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_raw(grad, ctx.group).to(ctx.dtype), None, None


class _AllReduceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, keep: bool) -> Tensor:
        ctx.group, ctx.keep = group, keep
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.float().contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype) * ctx.keep, None, None


def all_gather_raw(x: Tensor, group: Any) -> Tensor:
    """`all_gather` of x [t, ...] of any dtype, without a gradient: [size * t, ...]."""
    out = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    all_gather_single(out, x.contiguous(), group=group)
    return out


def _reduce_scatter_raw(x: Tensor, group: Any) -> Tensor:
    """`reduce_scatter` of x [size * t, ...] without a gradient: [t, ...] in the dtype of x."""
    parts = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(parts, x.contiguous(), group=group)
    accumulate_dtype = torch.promote_types(x.dtype, torch.float32)
    per_rank = parts.unflatten(0, (dist.get_world_size(group), -1))
    return per_rank.sum(0, dtype=accumulate_dtype).to(x.dtype)
