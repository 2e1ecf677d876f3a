"""Keys and values of sequences that are being generated, and attention to them.

A sequence owns a slot. Attention reads the slot's prefix up to each query's position; what lies behind it, left over
from another sequence or never written, contributes exactly zero even if it is NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from infir2.model.attention import heads_first, softmax_values, tokens_first
from infir2.model.config import ModelConfig
from infir2.model.padding import Packing, plan_packing


class KvCache:
    """Per layer, keys and values [num_slots, G, max_tokens, H] in `dtype`.

    Example: `cache = KvCache(model.config, num_slots=256, max_tokens=1024, dtype=torch.bfloat16)`; a prompt of 5 tokens
    goes into slot 7 with `model.hidden_states(ids, torch.arange(5), torch.tensor([0, 5]), cache, torch.tensor([7]))`,
    and the next token with `positions = torch.tensor([5])`, `cu_seqlens = torch.tensor([0, 1])`.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_slots, config.num_kv_heads, max_tokens, config.head_dim)
        self.num_slots, self.max_tokens, self.key_width = (
            num_slots,
            max_tokens,
            config.num_kv_heads * config.head_dim,
        )
        self.keys = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self.values = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]


@dataclass(frozen=True)
class CacheView:
    """Where the B sequences of one forward pass live in a cache; the same for all layers."""

    cache: KvCache
    packing: Packing
    token_slots: Tensor  # [T]
    positions: Tensor  # [T]
    slots: list[Tensor]  # per rectangle [n]
    blocked: list[Tensor]  # per rectangle [n, 1, L, S]: key position after the query's
    unused: list[
        Tensor
    ]  # per rectangle [n, U]: which of the last U of the S keys lie after all of the sequence's


def view_cache(
    cache: KvCache, slots: Tensor, positions: Tensor, cu_seqlens: Tensor, num_heads: int
) -> CacheView:
    """Place the new tokens of B sequences (`cu_seqlens` [B+1]) at `positions` [T] of their `slots` [B].

    Positions of one sequence increase by one. Raises ValueError when a position or slot lies outside the cache.
    """
    if positions.numel() and int(positions.max()) >= cache.max_tokens:
        raise ValueError(
            f"position {int(positions.max())} lies outside the KV cache of {cache.max_tokens} tokens per slot"
        )
    if slots.numel() and int(slots.max()) >= cache.num_slots:
        raise ValueError(
            f"slot {int(slots.max())} lies outside the KV cache of {cache.num_slots} slots"
        )
    assert slots.unique().numel() == slots.numel(), "two sequences share a slot"
    lengths = cu_seqlens.diff().to(torch.int64)
    last_rows = (cu_seqlens[1:].to(torch.int64) - 1).clamp_min(0)
    key_lengths = (
        (positions[last_rows] + 1).tolist() if positions.numel() else [0] * lengths.numel()
    )
    packing = plan_packing(cu_seqlens, num_heads, cache.key_width, key_lengths)
    rectangle_slots, blocked, unused = [], [], []
    for rectangle in packing.rectangles:
        query_positions = positions[rectangle.rows]
        own_keys = [key_lengths[member] for member in rectangle.members]
        columns = torch.arange(max(own_keys), device=positions.device)
        rectangle_slots.append(slots[rectangle.members])
        blocked.append((columns > query_positions[..., None])[:, None])
        unused.append(columns[min(own_keys) :] > query_positions[:, -1:])
    return CacheView(
        cache,
        packing,
        slots.repeat_interleave(lengths),
        positions,
        rectangle_slots,
        blocked,
        unused,
    )


def cached_attention(q: Tensor, k: Tensor, v: Tensor, view: CacheView, layer: int) -> Tensor:
    """Write k, v [T, G, H] into the cache and attend with q [T, N, H] to each sequence's prefix; returns [T, N, H]."""
    keys, values = view.cache.keys[layer], view.cache.values[layer]
    keys[view.token_slots, :, view.positions] = k
    values[view.token_slots, :, view.positions] = v
    outs = []
    for rectangle, slots, blocked, unused in zip(
        view.packing.rectangles, view.slots, view.blocked, view.unused, strict=True
    ):
        # padded queries repeat the sequence's last one, position included, so the mask needs no extra case
        q_r = heads_first(q, rectangle, k.shape[1], torch.float64).mul_(q.shape[-1] ** -0.5)
        k_r, v_r = (x[:, :, : blocked.shape[-1]].index_select(0, slots) for x in (keys, values))
        v_r[:, :, blocked.shape[-1] - unused.shape[-1] :].masked_fill_(
            unused[:, None, :, None], 0.0
        )
        k_r, v_r = (x.flatten(0, 1).to(torch.float64) for x in (k_r, v_r))
        chunks = zip(
            q_r.split(rectangle.query_chunk, dim=3),
            blocked.split(rectangle.query_chunk, dim=2),
            strict=True,
        )
        out = [
            softmax_values(part.flatten(2, 3).flatten(0, 1), k_r, v_r, mask)[0].view(part.shape)
            for part, mask in chunks
        ]
        outs.append(tokens_first(torch.cat(out, dim=3).to(q.dtype)))
    if not outs:
        return torch.zeros_like(q)
    return torch.cat(outs).index_select(0, view.packing.unpad)
