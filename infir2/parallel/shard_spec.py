"""Which part of a tensor this process holds: its shard in global coordinates."""

from collections.abc import Sequence
from typing import NamedTuple


class ShardSpec(NamedTuple):
    """Which part of a tensor this process holds: its shard in global coordinates.

    Example: rows 128 to 255 of a [512, 64] weight: `ShardSpec(global_shape=(512, 64), offset=(128, 0), local_shape=(128, 64), owned=True)`.
    """

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    local_shape: tuple[int, ...]
    owned: bool = True  # of all processes with this part, the one that saves it


def unsharded(shape: Sequence[int]) -> ShardSpec:
    """The spec of a tensor that one process holds whole."""
    return ShardSpec(tuple(shape), (0,) * len(shape), tuple(shape))
