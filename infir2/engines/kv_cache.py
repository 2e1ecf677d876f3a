"""The KV cache of sequences that are being generated, and attention to it.

A sequence owns a slot. Attention reads the slot's prefix up to each query's position; the entries
after it, left over from another sequence or never written, contribute exactly zero even if they are
NaN.

Shapes: T new tokens of B sequences, N query heads, G key heads, H head size; n sequences of L rows
in a rectangle of the packing, S keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infir2.model import Decoder, ModelConfig
from infir2.model.attention import heads_first, softmax_values, tokens_first
from infir2.model.padding import Packing, Rectangle, plan_packing


class KvCache:
    """Per layer, keys and values [num_slots, G, max_tokens, H] in `dtype`.

    Example: `cache = KvCache(model.config, num_slots=256, max_tokens=1024)`. A prompt of 5 tokens
    goes into slot 7 with `cached_hidden_states(model, cache, torch.tensor([7]), token_ids,
    torch.arange(5), torch.tensor([0, 5]))`; the next token of that sequence has positions [5] and
    cu_seqlens [0, 1].
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
        self.num_slots, self.max_tokens = num_slots, max_tokens
        self.num_heads, self.key_width = config.num_heads, config.num_kv_heads * config.head_dim
        self.keys, self.values = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
            for _ in range(2)
        )

    def grow(self, num_slots: int, max_tokens: int) -> None:
        """Enlarge to these sizes and keep the content. Copies the cache, one layer at a time."""
        assert num_slots >= self.num_slots, "a cache only grows"
        assert max_tokens >= self.max_tokens, "a cache only grows"
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                larger = old.new_empty((num_slots, old.shape[1], max_tokens, old.shape[3]))
                larger[: self.num_slots, :, : self.max_tokens] = old
                tensors[layer] = larger
        self.num_slots, self.max_tokens = num_slots, max_tokens


@dataclass(frozen=True)
class CachedAttention:
    """An `AttentionContext`: new tokens are written to a cache and attend to their slot's prefix.

    Attributes:
        cache: where keys and values are stored.
        packing: the rectangles of the new tokens.
        token_slots: slot of each new token, [T].
        positions: position of each new token in its slot, [T].
        slots: per rectangle, slot of each sequence, [n].
        blocked: per rectangle, whether a key stands after the query's position, [n, 1, L, S].
        unused: per rectangle, which of the last U of the S keys stand after all tokens of the
            sequence, [n, U].
    """

    cache: KvCache
    packing: Packing
    token_slots: Tensor
    positions: Tensor
    slots: list[Tensor]
    blocked: list[Tensor]
    unused: list[Tensor]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Write k, v [T, G, H] to the cache and attend with q [T, N, H] to it; [T, N, H]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.token_slots, :, self.positions] = k
        values[self.token_slots, :, self.positions] = v
        if not self.packing.rectangles:
            return torch.zeros_like(q)
        outs = [
            tokens_first(self._attend_rectangle(i, rectangle, q, keys, values).to(q.dtype))
            for i, rectangle in enumerate(self.packing.rectangles)
        ]
        return torch.cat(outs).index_select(0, self.packing.unpad)

    def _attend_rectangle(
        self, index: int, rectangle: Rectangle, q: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """FP64 output [n, G, R, L, H] of one rectangle's queries."""
        blocked, unused = self.blocked[index], self.unused[index]
        num_keys = blocked.shape[-1]
        # Padded queries repeat the sequence's last one, position included: the mask covers them.
        q_r = heads_first(q, rectangle, keys.shape[1], torch.float64).mul_(q.shape[-1] ** -0.5)
        k_r, v_r = (x[:, :, :num_keys].index_select(0, self.slots[index]) for x in (keys, values))
        v_r[:, :, num_keys - unused.shape[-1] :].masked_fill_(unused[:, None, :, None], 0.0)
        k_r, v_r = (x.flatten(0, 1).to(torch.float64) for x in (k_r, v_r))
        chunks = zip(
            q_r.split(rectangle.query_chunk, dim=3),
            blocked.split(rectangle.query_chunk, dim=2),
            strict=True,
        )
        parts = [
            softmax_values(part.flatten(2, 3).flatten(0, 1), k_r, v_r, mask)[0].view(part.shape)
            for part, mask in chunks
        ]
        return torch.cat(parts, dim=3)


def plan_cached(
    cache: KvCache, slots: Tensor, positions: Tensor, cu_seqlens: Tensor
) -> CachedAttention:
    """The context of new tokens of B sequences, at `positions` [T] of their `slots` [B].

    `cu_seqlens` [B+1] bounds the sequences; positions of one sequence increase by one. Raises
    ValueError when a position or slot lies outside the cache.
    """
    if positions.numel() and (largest := int(positions.max())) >= cache.max_tokens:
        raise ValueError(
            f"position {largest} lies outside the KV cache of {cache.max_tokens} tokens per slot"
        )
    if slots.numel() and (largest := int(slots.max())) >= cache.num_slots:
        raise ValueError(f"slot {largest} lies outside the KV cache of {cache.num_slots} slots")
    assert slots.unique().numel() == slots.numel(), "two sequences share a slot"
    lengths = cu_seqlens.diff().to(torch.int64)
    last_rows = (cu_seqlens[1:].to(torch.int64) - 1).clamp_min(0)
    key_lengths = (
        (positions[last_rows] + 1).tolist() if positions.numel() else [0] * lengths.numel()
    )
    packing = plan_packing(cu_seqlens, cache.num_heads, cache.key_width, key_lengths)
    rectangle_slots, blocked, unused = [], [], []
    for rectangle in packing.rectangles:
        query_positions = positions[rectangle.rows]
        own_keys = [key_lengths[member] for member in rectangle.members]
        columns = torch.arange(max(own_keys), device=positions.device)
        rectangle_slots.append(slots[rectangle.members])
        blocked.append((columns > query_positions[..., None])[:, None])
        unused.append(columns[min(own_keys) :] > query_positions[:, -1:])
    token_slots = slots.repeat_interleave(lengths)
    return CachedAttention(cache, packing, token_slots, positions, rectangle_slots, blocked, unused)


@torch.no_grad()
def cached_hidden_states(
    model: Decoder,
    cache: KvCache,
    slots: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    cu_seqlens: Any,
) -> Tensor:
    """States [T, D] after the final norm, without gradients; the tokens' keys are added to `cache`.

    Arguments and errors are those of `plan_cached` and `Decoder.hidden_states`.
    """
    context = plan_cached(cache, slots, positions, torch.as_tensor(cu_seqlens))
    return model.hidden_states(token_ids, positions, cu_seqlens, context)
