"""Attention on a GPU by the fastest library that is installed, without copies of the packed stream.

    FlashAttention 4   any packed stream (optional: the package flash-attn-4)
    cuDNN through SDPA sequences of one length, such as full windows
    torch's varlen     any packed stream, where the first is absent

All of them read q, k, v in BF16 through strides and repeat no key head. `infir2.model.attention`
defines the values.
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
class VarlenAttention:
    """An `AttentionContext` over a packed stream, by the fastest library that is installed.

    Example: lengths (3, 2), cu_seqlens [0, 3, 5] and longest 3.

    Attributes:
        lengths: tokens of each sequence, on the host, without empty sequences; () if only the
            device knows them, as in a CUDA graph.
        cu_seqlens: where each sequence starts, then the total; int32 [B + 1] on the device.
        longest: tokens of the longest sequence, or a bound of it.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    longest: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Causal attention of q [T, N, H] to k, v [T, G, H] within each sequence; [T, N, H]."""
        return _varlen_attention(q, k, v, self) if q.shape[0] else torch.zeros_like(q)


def plan_varlen(lengths: tuple[int, ...], device: torch.device) -> VarlenAttention:
    """The context of sequences of these lengths: one copy to the device, none back."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return VarlenAttention(lengths, bounds.to(device, non_blocking=True), max(lengths, default=0))


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: VarlenAttention) -> Tensor:
    flash = flash_attention_4() if q.is_cuda else None
    if flash is not None:
        bounds = {
            "cu_seqlens_q": plan.cu_seqlens,
            "cu_seqlens_k": plan.cu_seqlens,
            "max_seqlen_q": plan.longest,
            "max_seqlen_k": plan.longest,
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
        return varlen_causal(q, k, v, plan.cu_seqlens, plan.longest)
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
    """flash-attn-4's varlen function, or None; warns if it is installed but fails to load."""
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flash_attn":
            warnings.warn(
                f"FlashAttention 4 is installed, but {error.name} is not; using torch's attention",
                stacklevel=2,
            )
        return None
    except Exception as error:  # its binaries fit one torch and one CUDA
        warnings.warn(
            f"FlashAttention 4 is installed but does not load ({error}); using torch's attention",
            stacklevel=2,
        )
        return None
    # its compiler warns about its own code
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
    function: Callable[..., Any] = flash_attn_varlen_func
    return function
