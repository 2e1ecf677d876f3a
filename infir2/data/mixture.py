"""The order of rows: a pure function of (seed, index), whatever the number of ranks, and O(1) in memory.

Row number `index` of the endless stream belongs to a source by a fixed pattern of shares; inside a source, pass after
pass visits every row once, each pass in an order of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

ROUNDS = 6
PATTERN_ROWS = 1024  # resolution of the shares


class RowPosition(NamedTuple):
    """Where a row of the stream comes from."""

    source: int
    row: int
    epoch: int  # passes over this source before this one


class Mixture:
    """Sources of `sizes` rows mixed by `shares` (of rows, any positive scale).

    >>> mixture = Mixture(sizes=[3], shares=[1.0], seed=0)
    >>> sorted(mixture.place(index).row for index in range(3, 6))
    [0, 1, 2]
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int) -> None:
        assert min(sizes) > 0
        self._sizes, self._seed = list(sizes), seed
        resolution = PATTERN_ROWS * (1 + len(sizes) // 64)
        self._quotas = quotas(shares, resolution)
        by_source = [source for source, quota in enumerate(self._quotas) for _ in range(quota)]
        self._pattern = [
            by_source[permute_index(place, len(by_source), (seed, -1, 0))]
            for place in range(len(by_source))
        ]
        seen = [0] * len(sizes)
        self._rank = []  # how often the pattern's source has come before
        for source in self._pattern:
            self._rank.append(seen[source])
            seen[source] += 1

    @property
    def num_rows(self) -> int:
        """Rows of all sources: the length of an epoch."""
        return sum(self._sizes)

    def place(self, index: int) -> RowPosition:
        """Source, row and source epoch at place `index` >= 0 of the stream."""
        block, offset = divmod(index, len(self._pattern))
        source = self._pattern[offset]
        epoch, position = divmod(
            block * self._quotas[source] + self._rank[offset], self._sizes[source]
        )
        return RowPosition(
            source, permute_index(position, self._sizes[source], (self._seed, source, epoch)), epoch
        )


def quotas(shares: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to the shares (largest remainder), at least 1 each; they sum to `total` or slightly more."""
    exact = [share / sum(shares) * total for share in shares]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda source: whole[source] - exact[source])
    for source in by_remainder[: total - sum(whole)]:
        whole[source] += 1
    return [max(1, quota) for quota in whole]


def permute_index(index: int, size: int, key: tuple[int, int, int]) -> int:
    """The image of `index` under a pseudo-random permutation of range(size) that belongs to `key`.

    A Feistel network over the next power of four, walked until it falls into the range (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002). No table, the same on every platform.
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
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
