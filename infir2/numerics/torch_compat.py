"""Differences between the supported versions of torch, 2.11 to 2.13."""

import inspect
import warnings
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed this collective and deprecates the old name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce_together(tensors: list[Tensor], group: Any) -> None:
    """Sum tensors of one dtype over the ranks, in place; NCCL takes all in one launch.

    torch marks the function as one to be deprecated and has no other that gloo knows, too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dist.all_reduce_coalesced(tensors, group=group)


def varlen_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    cu_keys: Tensor | None = None,
    longest_keys: int = 0,
) -> Tensor:
    """torch's causal attention over a packed stream, q [T, N, H], k and v [S, G, H].

    `cu_keys` bounds the keys where a sequence has more of them than queries; its queries are then
    the last ones. torch 2.11 has the argument `is_causal`, later versions express it by a window.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = _parameters_of(varlen_attn)
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    options: dict[str, Any] = causal | grouped
    if cu_keys is None:
        cu_keys, longest_keys = cu_seqlens, longest
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_keys, longest, longest_keys, **options)
    return out


def varlen_reads_pages() -> bool:
    """Whether torch's varlen attention reads a paged KV cache (2.13 and later)."""
    from torch.nn.attention.varlen import varlen_attn

    return "block_table" in _parameters_of(varlen_attn)


def varlen_paged(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor,
    page_table: Tensor,
    longest: tuple[int, int],
) -> Tensor:
    """torch's causal attention of q [T, N, H] to paged keys and values [pages, size, G, H].

    `longest`: most queries and most keys of a sequence. Without splits along the keys, so that a
    sequence's result does not depend on the others.
    """
    from torch.nn.attention.varlen import varlen_attn

    out: Any = varlen_attn(
        q, keys, values, cu_seqlens, None, *longest, window_size=(-1, 0), enable_gqa=True,
        seqused_k=key_lengths, block_table=page_table, num_splits=1,
    )  # fmt: skip
    return out


@cache
def _parameters_of(function: object) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)  # type: ignore[arg-type]
