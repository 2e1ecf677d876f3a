"""Attention to a paged KV cache on a GPU, by the fastest library that is installed.

    FlashAttention 4        reads pages (optional: the package flash-attn-4)
    torch's varlen, 2.13    reads pages
    torch's varlen, 2.11    reads a copy of the keys, gathered from the pages

`kv_cache.CachedAttention` defines the values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infir2.engines.kv_cache import KvCache, NewTokens, Stream
from infir2.model.attention_cuda import flash_attention_4
from infir2.numerics.torch_compat import varlen_causal, varlen_paged, varlen_reads_pages


@dataclass(frozen=True)
class PagedAttention:
    """An `AttentionContext`: new tokens are written to a cache and attend to their sequence's keys.

    Attributes:
        cache: where keys and values are stored, BF16.
        rows: where each of the T new tokens is stored, int64 [T].
        cu_seqlens: bounds of the B sequences' new tokens, int32 [B+1].
        page_table: the pages of each sequence, int32 [B, P].
        key_lengths: keys of each sequence with its new tokens, int32 [B].
        max_new: most new tokens of a sequence.
        gathered: index of each key in the cache's pages and the bounds of the sequences' keys, for
            a library that reads no pages.
    """

    cache: KvCache
    rows: Tensor
    cu_seqlens: Tensor
    page_table: Tensor
    key_lengths: Tensor
    max_new: int
    gathered: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Write k, v [T, G, H] to the cache and attend with q [T, N, H] to it; [T, N, H]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.flatten(0, 1).index_copy_(0, self.rows, k)
        values.flatten(0, 1).index_copy_(0, self.rows, v)
        max_keys = self.page_table.shape[1] * self.cache.page_size
        flash = flash_attention_4()
        if flash is not None:
            out = flash(
                q, keys, values, cu_seqlens_q=self.cu_seqlens, seqused_k=self.key_lengths,
                max_seqlen_q=self.max_new, max_seqlen_k=max_keys, page_table=self.page_table,
                causal=True,
            )  # fmt: skip
            return out[0] if isinstance(out, tuple) else out
        if self.gathered is None:
            longest = (self.max_new, max_keys)
            return varlen_paged(
                q, keys, values, self.cu_seqlens, self.key_lengths, self.page_table, longest
            )
        rows, bounds = self.gathered
        k, v = (x.flatten(0, 1).index_select(0, rows) for x in (keys, values))
        return varlen_causal(q, k, v, self.cu_seqlens, self.max_new, bounds, max_keys)


def reads_pages() -> bool:
    """Whether the installed libraries read pages; a CUDA graph of a decode pass needs that."""
    return flash_attention_4() is not None or varlen_reads_pages()


def plan_paged(cache: KvCache, sequences: Sequence[NewTokens], stream: Stream) -> PagedAttention:
    """The context of the new tokens of a `stream`, on the cache's device."""
    device, size = cache.keys[0].device, cache.page_size
    ends = np.array([each.end for each in sequences])
    table = np.zeros((len(sequences), -(-int(ends.max()) // size)), dtype=np.int32)
    for row, each in zip(table, sequences, strict=True):
        used = -(-each.end // size)
        row[:used] = each.pages[:used]
    gathered = None
    if not reads_pages():
        rows = [
            row[np.arange(end) // size] * size + np.arange(end) % size
            for row, end in zip(table, ends, strict=True)
        ]
        bounds = np.concatenate([[0], ends.cumsum()]).astype(np.int32)
        gathered = to_device(np.concatenate(rows), device), to_device(bounds, device)
    return PagedAttention(
        cache,
        to_device(stream.rows, device),
        to_device(stream.cu_seqlens.astype(np.int32), device),
        to_device(table, device),
        to_device(ends.astype(np.int32), device),
        max(len(each.token_ids) for each in sequences),
        gathered,
    )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the GPU that the host does not wait for."""
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
