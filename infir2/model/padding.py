"""How the sequences of a packed stream are laid out for batched matrix products.

A stream of many short documents would need a loop over documents; a rectangle [B, longest] would explode next to one
long document. So sequences of similar length share a rectangle, a rectangle never holds more rows than a budget of
scores allows, and a long one is worked through in chunks of queries. Generation has few queries and many keys: there a
rectangle ends when its keys no longer fit a core's cache (256 sequences of 100 keys in one took twice as long).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SCORE_BUDGET = (
    1 << 20
)  # scores (sequences x heads x queries x keys) that exist at one time; 8 MiB in FP64
KEY_BUDGET = (
    1 << 18
)  # key elements (sequences x keys x G x H) of a rectangle: 2 MiB in FP64 stay in a core's cache
MIN_QUERY_CHUNK = 16  # fewer queries waste the matrix product; one very long sequence overdraws the budget instead
SHARED_QUERY_CHUNK = (
    64  # sequences share a rectangle only if chunks of this many queries fit the budget
)
MAX_QUERY_CHUNK = (
    256  # a causal chunk skips the keys after it, so chunks also save the upper triangle
)
SAME_RECTANGLE = 0.7  # a sequence joins a rectangle if it fills at least this share of its rows


@dataclass(frozen=True)
class Rectangle:
    """n sequences padded to L rows: `rows` [n, L] int64 indexes the stream, padding repeats a sequence's last row."""

    members: list[int]
    rows: Tensor
    is_real: Tensor  # [n, L] bool, False in the padding
    query_chunk: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.rows.shape[1]


@dataclass(frozen=True)
class Packing:
    """The rectangles of one packed stream, shared by all layers of a forward pass.

    `unpad` [T] int64 finds each token's row in the concatenation of all rectangles' rows.
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
    """Lay out the sequences of `cu_seqlens` [B+1] for attention with `num_heads` query heads and `key_width` = G * H.

    `key_lengths` says how many keys each sequence's queries look at (default: its own length, causal); with a KV cache
    it is longer. Sequences of zero tokens take no part. The indices lie on `device` (default: where cu_seqlens is).
    """
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0, "cu_seqlens starts at 0"
    lengths = [end - start for start, end in pairwise(bounds)]
    assert all(length >= 0 for length in lengths), "cu_seqlens does not decrease"
    keys = lengths if key_lengths is None else list(key_lengths)
    device = device or cu_seqlens.device
    rectangles, order = [], []
    for members in _groups(lengths, keys, num_heads, key_width):
        longest = lengths[members[0]]
        starts = torch.tensor([bounds[member] for member in members])[:, None]
        sizes = torch.tensor([lengths[member] for member in members])[:, None]
        columns = torch.arange(longest)[None, :]
        rows, is_real = starts + torch.minimum(columns, sizes - 1), columns < sizes
        chunk = max(
            MIN_QUERY_CHUNK,
            SCORE_BUDGET // (len(members) * num_heads * max(keys[member] for member in members)),
        )
        rectangles.append(
            Rectangle(members, rows.to(device), is_real.to(device), min(chunk, MAX_QUERY_CHUNK))
        )
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
    """Members of each rectangle, longest first; a rectangle closes when the next is too short or a budget is spent."""
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
