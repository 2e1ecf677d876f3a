"""Allocation of codes and scales in the memory layouts that all kernels share (see tiles.py)."""

import torch
from torch import Tensor

from infir2.numerics.formats import E4M3, GROUP


def groups(size: int) -> int:
    """Number of groups of 128 that `size` values need, the last one partly filled."""
    return -(-size // GROUP)


def empty_codes(like: Tensor, rows: int, columns: int) -> Tensor:
    """Codes [rows, columns] on the device of `like`."""
    return torch.empty((rows, columns), dtype=E4M3, device=like.device)


def empty_row_scales(like: Tensor, rows: int, num_groups: int) -> Tensor:
    """1x128 scales [rows, num_groups] with strides (1, rows)."""
    return torch.empty((num_groups, rows), dtype=torch.float32, device=like.device).t()


def empty_tile_scales(like: Tensor, rows: int, columns: int) -> Tensor:
    """128x128 scales of a [rows, columns] matrix; cuBLAS needs row strides that 4 divides."""
    stride = -(-groups(columns) // 4) * 4
    padded = torch.empty((groups(rows), stride), dtype=torch.float32, device=like.device)
    return padded[:, : groups(columns)]


def rows_contiguous(x: Tensor) -> Tensor:
    """x [R, C] if the values of a row are adjacent in memory, else a contiguous copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def as_bytes(codes: Tensor) -> Tensor:
    """The same memory as uint8, because kernels process codes as bytes."""
    return codes.view(torch.uint8)
