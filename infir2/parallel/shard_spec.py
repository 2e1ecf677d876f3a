"""Where a process's part of a tensor lies in the whole."""

from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """Where a process's part of a tensor lies in the whole.

    Example: rows 128 to 255 of a [512, 64] weight: `Place(shape=(512, 64), offset=(128, 0), size=(128, 64), owned=True)`.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    owned: bool = True  # of all processes with this part, the one that saves it


def whole(shape: Sequence[int]) -> Place:
    """The place of a tensor that one process has all of."""
    return Place(tuple(shape), (0,) * len(shape), tuple(shape))
