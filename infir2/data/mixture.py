"""The order of training rows: a pure function of (seed, index) in O(1) memory.

The order does not depend on the number of ranks. A fixed pattern, proportional to the shares,
assigns each index of the endless stream to a source. Within a source, each epoch visits every row
once, in a new pseudo-random order.
"""

from collections.abc import Sequence
from typing import NamedTuple

ROUNDS = 6
PATTERN_ROWS = 1024  # length of the pattern, the resolution of the shares


class RowPosition(NamedTuple):
    """A row of the stream: its source, its index in that source, and the source's epoch."""

    source: int
    row: int
    epoch: int


class Mixture:
    """A mixture of sources of `sizes` rows in proportion to `shares` (of rows, any positive scale).

    >>> mixture = Mixture(sizes=[3], shares=[1.0], seed=0)
    >>> sorted(mixture.row_at(index).row for index in range(3, 6))
    [0, 1, 2]
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int) -> None:
        assert min(sizes) > 0
        self._sizes, self._seed = list(sizes), seed
        self._quotas = quotas(shares, PATTERN_ROWS * (1 + len(sizes) // 64))
        by_source = [source for source, quota in enumerate(self._quotas) for _ in range(quota)]
        length = len(by_source)
        self._pattern = [
            by_source[permute_index(index, length, (seed, -1, 0))] for index in range(length)
        ]
        counts = [0] * len(sizes)
        self._occurrences = []  # earlier occurrences of pattern[i]'s source in the pattern
        for source in self._pattern:
            self._occurrences.append(counts[source])
            counts[source] += 1

    @property
    def num_rows(self) -> int:
        """Rows of all sources: the length of an epoch."""
        return sum(self._sizes)

    def row_at(self, index: int) -> RowPosition:
        """Return the row at `index` >= 0 of the stream."""
        block, offset = divmod(index, len(self._pattern))
        source = self._pattern[offset]
        size = self._sizes[source]
        # Rows of this source before `index` in the stream.
        count = block * self._quotas[source] + self._occurrences[offset]
        epoch, position = divmod(count, size)
        return RowPosition(
            source, permute_index(position, size, (self._seed, source, epoch)), epoch
        )


def quotas(shares: Sequence[float], total: int) -> list[int]:
    """Return integers in proportion to the shares (largest remainder method), each at least 1.

    They sum to `total`, or to slightly more where tiny shares are raised to 1.
    """
    exact = [share / sum(shares) * total for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: total - sum(counts)]:
        counts[source] += 1
    return [max(1, count) for count in counts]


def permute_index(index: int, size: int, key: tuple[int, int, int]) -> int:
    """Return the image of `index` under the pseudo-random permutation of range(size) of `key`.

    This is a Feistel network over the next power of four, iterated until the result is below
    `size` ("cycle walking", Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It
    needs no table and is the same on every platform.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    seed = 0
    for part in key:
        seed = _mix(seed ^ (part & 0xFFFFFFFFFFFFFFFF))
    while True:
        left, right = index >> half_bits, index & mask
        for step in range(ROUNDS):
            left, right = right, left ^ (_mix(seed + (step << 56) + right) & mask)
        index = left << half_bits | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), on 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
