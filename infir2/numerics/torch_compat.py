"""Differences between the supported versions of torch, 2.11 to 2.13."""

import inspect
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed this collective and deprecates the old name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def varlen_causal(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """torch's causal attention over a packed stream, q [T, N, H], k and v [T, G, H].

    torch 2.11 has the argument `is_causal`, later versions express it by a window.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = _parameters_of(varlen_attn)
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    options: dict[str, Any] = causal | grouped
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    return out


@cache
def _parameters_of(function: object) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)  # type: ignore[arg-type]
