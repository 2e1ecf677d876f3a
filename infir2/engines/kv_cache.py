"""The paged KV cache of sequences that are being generated, and the reference attention to it.

A sequence owns a list of pages (`pages.py`). Attention reads its keys in order, up to each query's
position; what stands after it in a page, left over from another sequence or never written,
contributes exactly zero even if it is NaN. `paged_attention_cuda.py` is the same on a GPU.

Shapes: T new tokens of B sequences, N query heads, G key heads, H head size; n sequences of L rows
in a rectangle of the packing, S keys in P pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infir2.model import Decoder, ModelConfig
from infir2.model.attention import heads_first, softmax_values, tokens_first
from infir2.model.padding import Packing, Rectangle, plan_packing


class KvCache:
    """Per layer, keys and values [num_pages + 1, page_size, G, H] in `dtype`.

    The last page, `padding_page`, belongs to no sequence: a batch's rows of padding write there.
    The memory starts as zeros: a GPU's attention multiplies the end of a page by 0, which leaves a
    NaN what it is.

    Example: `cache = KvCache(model.config, num_pages=100, page_size=16)`; then
    `cached_hidden_states(model, cache, [NewTokens([5, 9, 2], 0, [7])])` stores a prompt of 3 tokens
    in page 7, and `NewTokens([4], 3, [7])` adds the next token.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_pages + 1, page_size, config.num_kv_heads, config.head_dim)
        self.num_pages, self.page_size = num_pages, page_size
        self.num_heads, self.key_width = config.num_heads, config.num_kv_heads * config.head_dim
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
            for _ in range(2)
        )

    @property
    def padding_page(self) -> int:
        return self.num_pages

    def grow(self, num_pages: int) -> None:
        """Enlarge to `num_pages` and keep the content. Copies the cache, one layer at a time."""
        assert num_pages >= self.num_pages, "a cache only grows"
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                larger = old.new_zeros((num_pages + 1, *old.shape[1:]))
                larger[: self.num_pages] = old[:-1]
                tensors[layer] = larger
        self.num_pages = num_pages


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page, keys and values of all layers."""
    values = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return values * page_size * dtype.itemsize


@dataclass(frozen=True)
class NewTokens:
    """What one sequence adds to the cache in a forward pass.

    Attributes:
        token_ids: the new tokens, at least one.
        start: position of the first of them; the keys before it are in the cache.
        pages: the sequence's pages, from position 0 to the last new token.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]

    @property
    def end(self) -> int:
        """Position after the last new token."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class Stream:
    """The new tokens of B sequences, packed; host arrays.

    Attributes:
        token_ids: [T].
        positions: [T].
        cu_seqlens: bounds of the sequences in the stream, [B+1].
        rows: index of each token in the cache's pages, page * page_size + offset, [T].
    """

    token_ids: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    rows: np.ndarray


def pack(sequences: Sequence[NewTokens], page_size: int) -> Stream:
    """Lay the new tokens of sequences end to end."""
    positions = [np.arange(each.start, each.end) for each in sequences]
    rows = [
        np.asarray(each.pages)[at // page_size] * page_size + at % page_size
        for each, at in zip(sequences, positions, strict=True)
    ]
    return Stream(
        np.concatenate([np.asarray(each.token_ids, dtype=np.int64) for each in sequences]),
        np.concatenate(positions),
        np.cumsum([0, *(len(each.token_ids) for each in sequences)]),
        np.concatenate(rows),
    )


@dataclass(frozen=True)
class CachedAttention:
    """An `AttentionContext`: new tokens are written to a cache and attend to their sequence's keys.

    Attributes:
        cache: where keys and values are stored.
        packing: the rectangles of the new tokens.
        rows: where each new token is stored, [T].
        pages: per rectangle, the pages of each sequence, [n, P]; short lists are padded with 0.
        blocked: per rectangle, whether a key stands after the query's position, [n, 1, L, S].
        unused: per rectangle, which of the last U of the S keys stand after all tokens of the
            sequence, [n, U].
    """

    cache: KvCache
    packing: Packing
    rows: Tensor
    pages: list[Tensor]
    blocked: list[Tensor]
    unused: list[Tensor]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Write k, v [T, G, H] to the cache and attend with q [T, N, H] to it; [T, N, H]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.flatten(0, 1)[self.rows] = k
        values.flatten(0, 1)[self.rows] = v
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
        q_r = heads_first(q, rectangle, keys.shape[2], torch.float64).mul_(q.shape[-1] ** -0.5)
        k_r, v_r = (_gather(x, self.pages[index], num_keys) for x in (keys, values))
        v_r[:, :, num_keys - unused.shape[-1] :].masked_fill_(unused[:, None, :, None], 0.0)
        k_r, v_r = (x.flatten(0, 1) for x in (k_r, v_r))
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


def _gather(content: Tensor, pages: Tensor, num_keys: int) -> Tensor:
    """The first `num_keys` entries of each row of `pages` [n, P], FP64 [n, G, num_keys, H]."""
    rows = content.index_select(0, pages.flatten()).unflatten(0, pages.shape)
    heads = rows.flatten(1, 2)[:, :num_keys].transpose(1, 2)
    return heads.to(torch.float64, memory_format=torch.contiguous_format)


def plan_cached(cache: KvCache, sequences: Sequence[NewTokens], stream: Stream) -> CachedAttention:
    """The context of the new tokens of a `stream`, on the cache's device."""
    device, size = cache.keys[0].device, cache.page_size
    key_lengths = [each.end for each in sequences]
    cu_seqlens = torch.from_numpy(stream.cu_seqlens)
    packing = plan_packing(cu_seqlens, cache.num_heads, cache.key_width, key_lengths, device)
    positions = torch.from_numpy(stream.positions).to(device)
    pages, blocked, unused = [], [], []
    for rectangle in packing.rectangles:
        own_keys = [key_lengths[member] for member in rectangle.members]
        tables = np.zeros((len(own_keys), -(-max(own_keys) // size)), dtype=np.int64)
        for row, member in zip(tables, rectangle.members, strict=True):
            used = -(-key_lengths[member] // size)
            row[:used] = sequences[member].pages[:used]
        query_positions = positions[rectangle.rows]
        columns = torch.arange(max(own_keys), device=device)
        pages.append(torch.from_numpy(tables).to(device))
        blocked.append((columns > query_positions[..., None])[:, None])
        unused.append(columns[min(own_keys) :] > query_positions[:, -1:])
    rows = torch.from_numpy(stream.rows).to(device)
    return CachedAttention(cache, packing, rows, pages, blocked, unused)


def check_pages(cache: KvCache, sequences: Sequence[NewTokens]) -> None:
    """Raise ValueError when a sequence's pages do not hold its tokens or lie outside the cache."""
    for each in sequences:
        if each.end > len(each.pages) * cache.page_size:
            raise ValueError(
                f"position {each.end - 1} lies outside the sequence's {len(each.pages)} pages of "
                f"{cache.page_size} tokens"
            )
        if max(each.pages) >= cache.num_pages:
            raise ValueError(
                f"page {max(each.pages)} lies outside the KV cache of {cache.num_pages} pages"
            )


@torch.no_grad()
def cached_hidden_states(
    model: Decoder, cache: KvCache, sequences: Sequence[NewTokens]
) -> tuple[Tensor, Tensor]:
    """(states [T, D] after the final norm, without gradients; row of each sequence's last, [B]).

    The tokens' keys and values are added to `cache`. A sequence may read pages that another one of
    the same pass writes: a layer writes all keys before it attends. Raises as `check_pages`.
    """
    check_pages(cache, sequences)
    stream = pack(sequences, cache.page_size)
    device = cache.keys[0].device
    hidden = model.hidden_states(
        torch.from_numpy(stream.token_ids).to(device),
        torch.from_numpy(stream.positions).to(device),
        stream.cu_seqlens,
        plan_cached(cache, sequences, stream),
    )
    return hidden, torch.from_numpy(stream.cu_seqlens[1:] - 1).to(device)
