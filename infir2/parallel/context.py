"""Context parallelism: the cp ranks share the tokens of a micro-batch of packed documents.

The stream is divided into 2 * cp chunks, and rank r holds chunks r and 2 * cp - 1 - r: under a
causal mask an early chunk is cheap and a late one expensive, so every rank has the same work. A
document that begins inside a chunk needs no other rank. Only a document that continues from an
earlier chunk attends to keys and values of other ranks, which are all-gathered (arXiv 2407.21783,
section 3.3.2: unlike a ring, all-gather works with any document mask).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from infir2.data import Batch
from infir2.model.attention import AttentionContext
from infir2.parallel.collectives import all_gather, to_device
from infir2.parallel.mesh import Layout

# Tokens. The FP8 tiles of a weight gradient then begin where those of a single process do.
CHUNK_MULTIPLE = 128

PlanAttention = Callable[[Tensor, torch.device], AttentionContext]


@dataclass(frozen=True)
class Continuation:
    """The part of a chunk that continues a document of an earlier chunk.

    Its queries are tokens [start, end) of this rank; its keys are tokens [first_key, last_key) of
    the global stream.
    """

    start: int
    end: int
    first_key: int
    last_key: int


def pad_batch(batch: Batch, multiple: int) -> Batch:
    """Append a sequence of untrained tokens so that T is a multiple of `multiple`."""
    missing = -len(batch.token_ids) % multiple
    if not missing:
        return batch

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (0, missing))

    total = len(batch.token_ids) + missing
    return replace(
        batch,
        token_ids=padded(batch.token_ids),
        positions=torch.cat((batch.positions, torch.arange(missing))),
        labels=padded(batch.labels),
        loss_mask=padded(batch.loss_mask),
        cu_seqlens=torch.cat(
            (batch.cu_seqlens, torch.tensor([total], dtype=batch.cu_seqlens.dtype))
        ),
        token_inputs={name: padded(values) for name, values in batch.token_inputs.items()},
    )


def local_tokens(rank: int, size: int, num_tokens: int) -> Tensor:
    """Indices in the global stream of a rank's tokens, [num_tokens / size]."""
    chunks = torch.arange(num_tokens).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def local_sequences(
    rank: int, size: int, cu_seqlens: list[int]
) -> tuple[list[int], list[Continuation]]:
    """(bounds of a rank's sequences in its own stream, those sequences that are continuations)."""
    chunk_tokens = cu_seqlens[-1] // (2 * size)
    bounds, continuations = [0], []
    for slot, chunk in enumerate((rank, 2 * size - 1 - rank)):
        chunk_start = chunk * chunk_tokens
        to_local = slot * chunk_tokens - chunk_start
        for first, last in pairwise(cu_seqlens):
            start, end = max(first, chunk_start), min(last, chunk_start + chunk_tokens)
            if start < end:
                bounds.append(end + to_local)
                if first < start:
                    continuations.append(Continuation(start + to_local, end + to_local, first, end))
    return bounds, continuations


class ContextParallel:
    """Splits batches over `layout.cp_group`, and computes attention across its ranks.

    `split(batch)` determines the attention of the next forward pass.

    Args:
        plan_attention: `(cu_seqlens [B+1], device) -> AttentionContext`, as
            `Decoder.plan_attention`.
    """

    def __init__(self, layout: Layout, plan_attention: PlanAttention) -> None:
        self.group, self.rank, self.size = layout.cp_group, layout.cp_rank, layout.sizes.cp
        self.multiple = 2 * self.size * math.lcm(CHUNK_MULTIPLE, layout.sizes.tp)
        self._plan_attention = plan_attention
        self._device = layout.device

    def split(self, batch: Batch) -> Batch:
        """This rank's tokens of a batch whose T is a multiple of `multiple`.

        Each continuation becomes a sequence of its own.
        """
        cu_seqlens = batch.cu_seqlens.tolist()
        tokens = local_tokens(self.rank, self.size, len(batch.token_ids))
        bounds = self._plan(cu_seqlens)
        return replace(
            batch,
            token_ids=batch.token_ids[tokens],
            positions=batch.positions[tokens],
            labels=batch.labels[tokens],
            loss_mask=batch.loss_mask[tokens],
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            token_inputs={name: values[tokens] for name, values in batch.token_inputs.items()},
        )

    def _plan(self, cu_seqlens: list[int]) -> list[int]:
        """Prepare `attend` for a batch; returns the bounds of this rank's sequences."""
        bounds, self._continuations = local_sequences(self.rank, self.size, cu_seqlens)
        self._any_continuation = any(
            local_sequences(rank, self.size, cu_seqlens)[1] for rank in range(self.size)
        )
        gathered = [local_tokens(rank, self.size, cu_seqlens[-1]) for rank in range(self.size)]
        # Index into the gathered keys of each token of the global stream.
        self._gathered_index = to_device(torch.cat(gathered).argsort(), self._device)
        is_complete = torch.ones(bounds[-1], dtype=torch.bool)
        for part in self._continuations:
            is_complete[part.start : part.end] = False
        complete = is_complete.nonzero().squeeze(1)
        order = [complete, *(torch.arange(part.start, part.end) for part in self._continuations)]
        self._complete = to_device(complete, self._device)
        self._restore = to_device(torch.cat(order).argsort(), self._device)
        lengths = [end - start for start, end in pairwise(bounds) if is_complete[start]]
        self._complete_attention = self._plan_attention(
            torch.tensor([0, *lengths]).cumsum(0).int(), self._device
        )
        return bounds

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Causal attention within documents of this rank's q [t, N, H] and k, v [t, G, H].

        The keys and values of continuations come from all ranks. Returns [t, N, H].
        """
        if not k.is_cuda:
            # A key's gradients from several ranks are added before they are rounded, as in a
            # single process.
            k, v = k.float(), v.float()
        q_c, k_c, v_c = (x.index_select(0, self._complete) for x in (q, k, v))
        parts = [self._complete_attention.attend(q_c, k_c, v_c, layer)]
        if self._any_continuation:
            gathered = all_gather(torch.stack((k, v), dim=1), self.group, k.dtype)
            for part in self._continuations:
                index = self._gathered_index[part.first_key : part.last_key]
                keys, values = gathered.index_select(0, index).unbind(1)
                queries = q[part.start : part.end]
                parts.append(attend_to_prefix(queries, keys, values, self._plan_attention, layer))
            if not self._continuations:
                # The backward of all_gather is a collective: this rank must take part in it too,
                # so an empty tensor connects `gathered` to the output.
                empty = gathered[:0].flatten(1)[:, :0].reshape(0, *q.shape[1:])
                parts.append(empty.to(q.dtype))
        return torch.cat(parts).index_select(0, self._restore)


def attend_to_prefix(
    q: Tensor, k: Tensor, v: Tensor, plan_attention: PlanAttention, layer: int = 0
) -> Tensor:
    """Causal attention of the last n tokens of a sequence, q [n, N, H], to all m: k, v [m, G, H].

    Returns [n, N, H]. On a CPU the attention of all m tokens is computed (zeros for the other
    queries), so that forward and backward round at the same points as a single process.
    """
    n, m = q.shape[0], k.shape[0]
    if q.is_cuda:
        from torch.nn.attention.bias import causal_lower_right

        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=causal_lower_right(n, m), enable_gqa=True
        )[0].transpose(0, 1)
    context = plan_attention(torch.tensor([0, m], dtype=torch.int32), q.device)
    return context.attend(F.pad(q, (0, 0, 0, 0, m - n, 0)), k, v, layer)[m - n :]
