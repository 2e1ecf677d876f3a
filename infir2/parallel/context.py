"""Context parallelism: ranks share the tokens of a micro-batch, packed documents included.

The stream is cut into 2 * cp chunks and rank r takes chunks r and 2 * cp - 1 - r, a cheap one and a dear one, so that causal
attention is balanced. A document that begins inside a chunk needs nothing from elsewhere; only the one that a chunk cuts looks
back, at keys and values gathered from all ranks (arXiv 2407.21783, section 3.3.2: all-gather, which takes any document mask).
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infir2.data import Batch
from infir2.parallel.collectives import all_gather, to_device
from infir2.parallel.mesh import Layout

CHUNK_MULTIPLE = 128  # tokens: FP8 tiles of the weight gradient begin where those of one process do


@dataclass(frozen=True)
class Cut:
    """Rows [start, end) of the local stream that continue a document; their keys are rows [first, last) of the whole stream."""

    start: int
    end: int
    first: int
    last: int


def pad_batch(batch: Batch, multiple: int) -> Batch:
    """The batch with a last sequence of untrained tokens up to a multiple."""
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


def rows_of(rank: int, size: int, num_tokens: int) -> Tensor:
    """Rows of the stream that a rank holds, in its order: chunks `rank` and `2 * size - 1 - rank` of 2 * size."""
    chunks = torch.arange(num_tokens).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def cuts_of(rank: int, size: int, bounds: list[int]) -> tuple[list[int], list[Cut]]:
    """Where sequences begin and end in a rank's local stream, and which of them continue a document."""
    num_tokens = bounds[-1]
    length = num_tokens // (2 * size)
    local, cuts = [0], []
    for place, chunk in enumerate((rank, 2 * size - 1 - rank)):
        begin = chunk * length
        for first, last in pairwise(bounds):
            start, end = max(first, begin), min(last, begin + length)
            if start < end:
                shift = place * length - begin
                local.append(end + shift)
                if first < start:
                    cuts.append(Cut(start + shift, end + shift, first, end))
    return local, cuts


class ContextParallel:
    """Splits batches over the ranks of `layout.cp_group` and attends across them; `split` comes before the forward it is for."""

    def __init__(self, layout: Layout, plan: Any) -> None:
        """`plan(cu_seqlens, device)`, such as `Decoder.plan_attention`, is the attention within sequences."""
        self.group, self.rank, self.size, self._plan = (
            layout.cp_group,
            layout.cp_rank,
            layout.sizes.cp,
            plan,
        )
        self.multiple = 2 * self.size * math.lcm(CHUNK_MULTIPLE, layout.sizes.tp)
        self._device = layout.device

    def split(self, batch: Batch) -> Batch:
        """This rank's rows of a padded batch, cut documents as sequences of their own."""
        num_tokens, bounds = len(batch.token_ids), batch.cu_seqlens.tolist()
        rows = rows_of(self.rank, self.size, num_tokens)
        local, self._cuts = cuts_of(self.rank, self.size, bounds)
        self._any_cut = any(cuts_of(rank, self.size, bounds)[1] for rank in range(self.size))
        held = torch.cat([rows_of(rank, self.size, num_tokens) for rank in range(self.size)])
        self._order = to_device(
            held.argsort(), self._device
        )  # where the gathered keys have each row of the stream
        inside = torch.ones(len(rows), dtype=torch.bool)
        for cut in self._cuts:
            inside[cut.start : cut.end] = False
        pieces = [
            inside.nonzero().squeeze(1),
            *(torch.arange(cut.start, cut.end) for cut in self._cuts),
        ]
        self._inside, self._restore = (
            to_device(x, self._device) for x in (pieces[0], torch.cat(pieces).argsort())
        )
        lengths = [end - start for start, end in pairwise(local) if inside[start]]
        self._packing = self._plan(torch.tensor([0, *lengths]).cumsum(0).int(), self._device)
        return replace(
            batch,
            token_ids=batch.token_ids[rows],
            positions=batch.positions[rows],
            labels=batch.labels[rows],
            loss_mask=batch.loss_mask[rows],
            cu_seqlens=torch.tensor(local, dtype=torch.int32),
            token_inputs={name: values[rows] for name, values in batch.token_inputs.items()},
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Causal attention of this rank's q [T, N, H] within documents, k and v [T, G, H] of all ranks where they are needed."""
        if not k.is_cuda:  # gradients of keys from several places are added before they are rounded, as in one process
            k, v = k.float(), v.float()
        inside_q, inside_k, inside_v = (x.index_select(0, self._inside) for x in (q, k, v))
        parts = [self._packing.attend(inside_q, inside_k, inside_v, layer)]
        if self._any_cut:
            everything = all_gather(torch.stack((k, v), dim=1), self.group, k.dtype)
            for cut in self._cuts:
                keys, values = everything.index_select(0, self._order[cut.first : cut.last]).unbind(
                    1
                )
                parts.append(
                    attend_to_prefix(q[cut.start : cut.end], keys, values, self._plan, layer)
                )
            if not self._cuts:  # its backward is a collective that the others wait in
                parts.append(everything[:0].flatten(1)[:, :0].reshape(0, *q.shape[1:]).to(q.dtype))
        return torch.cat(parts).index_select(0, self._restore)


def attend_to_prefix(q: Tensor, k: Tensor, v: Tensor, plan: Any, layer: int = 0) -> Tensor:
    """Attention of the last n tokens of a sequence, q [n, N, H], to all its m keys, k and v [m, G, H]; [n, N, H].

    On a CPU as part of the whole sequence's, so that forward and backward round where those of one process do.
    """
    n, m = q.shape[0], k.shape[0]
    if q.is_cuda:
        from torch.nn.attention.bias import causal_lower_right

        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=causal_lower_right(n, m), enable_gqa=True
        )[0].transpose(0, 1)
    context = plan(torch.tensor([0, m], dtype=torch.int32), q.device)
    return context.attend(F.pad(q, (0, 0, 0, 0, m - n, 0)), k, v, layer)[m - n :]
