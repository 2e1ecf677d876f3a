"""Padding a packed stream into rectangles for batched matrix products.

A loop over documents is slow when many are short, and one rectangle [B, longest] wastes most of its
rows when one is long. So sequences of similar length share a rectangle, a budget of scores bounds
its size, and a long one is computed in chunks of queries. Generation has few queries and many keys:
there the keys of a rectangle must fit a core's cache (256 sequences of 100 keys in one rectangle
took twice as long).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Scores (sequences x heads x queries x keys) of one matrix product; 8 MiB in FP64.
SCORE_BUDGET = 1 << 20
# Key elements (sequences x keys x G x H) of a rectangle; 2 MiB in FP64 stay in a core's cache.
KEY_BUDGET = 1 << 18
# Fewer queries waste the matrix product; one very long sequence exceeds the score budget instead.
MIN_QUERY_CHUNK = 16
# Sequences share a rectangle only if chunks of this many queries fit the score budget.
SHARED_QUERY_CHUNK = 64
# A causal chunk skips the keys after it, so chunks also save the upper triangle of the scores.
MAX_QUERY_CHUNK = 256
# A sequence joins a rectangle if it fills at least this share of its rows.
SAME_RECTANGLE = 0.7


@dataclass(frozen=True)
class Rectangle:
    """n sequences padded to L rows.

    Example: sequences 2 and 0, of 3 and 2 tokens, which start at rows 6 and 0 of the stream, have
    rows [[6, 7, 8], [0, 1, 1]].

    Attributes:
        members: indices of the n sequences in the stream.
        rows: row of the stream for each padded row, int64 [n, L]; padding repeats the last row.
        is_real: False in the padding, bool [n, L].
        query_chunk: queries to compute per matrix product.
    """

    members: list[int]
    rows: Tensor
    is_real: Tensor
    query_chunk: int

    @property
    def shape(self) -> tuple[int, int]:
        """(n, L)."""
        return self.rows.shape[0], self.rows.shape[1]


@dataclass(frozen=True)
class Packing:
    """The rectangles of one packed stream, shared by all layers of a forward pass.

    Attributes:
        rectangles: longest sequences first.
        unpad: each token's row in the concatenation of all rectangles' rows, int64 [T].
        num_tokens: T.
    """

    rectangles: list[Rectangle]
    unpad: Tensor
    num_tokens: int


def plan_packing(
    cu_seqlens: Tensor,
    num_heads: int,
    key_width: int,
    key_lengths: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Packing:
    """Lay out sequences for attention with `num_heads` query heads.

    Args:
        cu_seqlens: bounds of B sequences, [B+1]; empty ones are skipped.
        num_heads: query heads, N.
        key_width: elements of a token's keys, G * H.
        key_lengths: keys of each sequence; its own length by default, more with a KV cache.
        device: where the indices are stored; the device of cu_seqlens by default.
    """
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0, "cu_seqlens starts at 0"
    lengths = [end - start for start, end in pairwise(bounds)]
    assert all(length >= 0 for length in lengths), "cu_seqlens does not decrease"
    keys = lengths if key_lengths is None else list(key_lengths)
    device = device or cu_seqlens.device
    rectangles, order = [], []
    for members in _groups(lengths, keys, num_heads, key_width):
        starts = torch.tensor([bounds[member] for member in members])[:, None]
        sizes = torch.tensor([lengths[member] for member in members])[:, None]
        columns = torch.arange(lengths[members[0]])[None, :]
        rows, is_real = starts + torch.minimum(columns, sizes - 1), columns < sizes
        scores_per_query = len(members) * num_heads * max(keys[member] for member in members)
        chunk = min(max(MIN_QUERY_CHUNK, SCORE_BUDGET // scores_per_query), MAX_QUERY_CHUNK)
        rectangles.append(Rectangle(members, rows.to(device), is_real.to(device), chunk))
        order.append(torch.where(is_real, rows, -1).flatten())
    unpad = torch.empty(bounds[-1], dtype=torch.int64)
    if order:
        stream_rows = torch.cat(order)
        padded_rows = torch.nonzero(stream_rows >= 0).flatten()
        unpad[stream_rows[padded_rows]] = padded_rows
    return Packing(rectangles, unpad.to(device), bounds[-1])


def _groups(
    lengths: Sequence[int], keys: Sequence[int], num_heads: int, key_width: int
) -> Iterator[list[int]]:
    """Members of each rectangle, longest first.

    A rectangle is closed when the next sequence is too short for it or would exceed a budget.
    """
    order = sorted(
        (i for i, length in enumerate(lengths) if length),
        key=lambda i: (lengths[i], keys[i]),
        reverse=True,
    )
    group: list[int] = []
    longest = widest = 0
    for member in order:
        longest, widest = longest or lengths[member], max(widest, keys[member])
        num_keys = (len(group) + 1) * widest
        too_large = (
            num_keys * num_heads * min(longest, SHARED_QUERY_CHUNK) > SCORE_BUDGET
            or num_keys * key_width > KEY_BUDGET
        )
        if group and (lengths[member] < SAME_RECTANGLE * longest or too_large):
            yield group
            group, longest, widest = [], lengths[member], keys[member]
        group.append(member)
    if group:
        yield group
