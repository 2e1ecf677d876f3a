"""What differs between the versions of torch that are supported (2.11 to 2.13), in one place."""

import inspect
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor

# 2.13 renamed the collectives on one tensor and deprecates the old name; before, only that exists.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def varlen_causal(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """torch's attention over a packed stream, causal, q [T, N, H], k and v [T, G, H]; 2.11 says `is_causal`, later ones a window."""
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
