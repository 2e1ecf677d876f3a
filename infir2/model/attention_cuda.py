"""Attention on a GPU: the fastest library that is there, for the packed stream as it lies in memory.

    FlashAttention 4   any packed stream (optional: the package flash-attn-4)
    cuDNN through SDPA sequences of one length, such as full windows
    torch's varlen     any packed stream, where the first is absent

All of them read q, k, v in BF16 through strides and repeat no key head. `infir2.model.attention` is the definition.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infir2.numerics.torch_compat import varlen_causal

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Varlen:
    """Sequences of a packed stream: their lengths, known to the host, and their bounds on the device.

    Example: lengths (3, 2) and cu_seqlens [0, 3, 5].
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # int32 [B + 1]


def plan_varlen(lengths: tuple[int, ...], device: torch.device) -> Varlen:
    """One copy to the device, none back."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Varlen(lengths, bounds.to(device, non_blocking=True))


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: Varlen) -> Tensor:
    """Causal attention of q [T, N, H] to k, v [T, G, H] within each sequence; [T, N, H]."""
    flash = flash_attention_4() if q.is_cuda else None
    longest = max(plan.lengths)
    if flash is not None:
        bounds = {
            "cu_seqlens_q": plan.cu_seqlens,
            "cu_seqlens_k": plan.cu_seqlens,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }
        out = flash(
            q,
            k,
            v,
            **bounds,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out[0] if isinstance(out, tuple) else out
    if len(set(plan.lengths)) == 1:
        return _equal_lengths(q, k, v, len(plan.lengths))
    if q.is_cuda:
        return varlen_causal(q, k, v, plan.cu_seqlens, longest)
    parts = zip(*(t.split(list(plan.lengths)) for t in (q, k, v)), strict=True)
    return torch.cat(
        [_equal_lengths(q_part, k_part, v_part, 1) for q_part, k_part, v_part in parts]
    )


def _equal_lengths(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
    q, k, v = (t.unflatten(0, (sequences, -1)).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


@cache
def flash_attention_4() -> Callable[..., Any] | None:
    """The function of flash-attn-4 if it is installed and loads; a warning where it is installed and does not."""
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flash_attn":
            warnings.warn(
                f"FlashAttention 4 is installed, but {error.name} is not; using torch's attention",
                stacklevel=2,
            )
        return None
    except Exception as error:  # it loads libraries of one torch and one CUDA
        warnings.warn(
            f"FlashAttention 4 is installed but does not load ({error}); using torch's attention",
            stacklevel=2,
        )
        return None
    warnings.filterwarnings(
        "ignore", message="Argument aux_data", category=UserWarning
    )  # its compiler's, about its own code
    function: Callable[..., Any] = flash_attn_varlen_func
    return function
