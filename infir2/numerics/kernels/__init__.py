"""Triton kernels behind the FP8 conversions and the operations fused with them.

`api` has the functions, with the signatures and the bits of `infir2.numerics.quantize_reference`.
This file does not import triton, so that `usable` also works without it.
"""

from functools import cache
from importlib.util import find_spec

import torch

SMALLEST_CAPABILITY = (8, 9)  # the first GPUs with an instruction that converts to E4M3


@cache
def usable(device: torch.device) -> bool:
    """Whether the kernels run on this device: triton is installed and the GPU converts to E4M3."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= SMALLEST_CAPABILITY
