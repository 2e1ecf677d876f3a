"""The shard of a tensor that one rank holds, in coordinates of the global tensor."""

from collections.abc import Sequence
from typing import NamedTuple


class ShardSpec(NamedTuple):
    """A rectangle of a tensor. All tuples have one entry per dimension.

    Example: rows 128 to 255 of a [512, 64] weight are
    `ShardSpec(global_shape=(512, 64), offset=(128, 0), local_shape=(128, 64), owned=True)`.
    """

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    local_shape: tuple[int, ...]
    owned: bool = True  # one of the ranks that hold the same shard owns it, and saves it


def unsharded(shape: Sequence[int]) -> ShardSpec:
    """The spec of a tensor that is not sharded."""
    return ShardSpec(tuple(shape), (0,) * len(shape), tuple(shape))
