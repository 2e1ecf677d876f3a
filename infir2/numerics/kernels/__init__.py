"""Triton kernels behind the FP8 conversions and the operations fused with them.

`operations` has the functions, with the signatures and the bits of the reference in `infir2.numerics.quantize_reference`. This
file imports no triton, so that a machine without it can ask.
"""

from functools import cache
from importlib.util import find_spec

import torch

SMALLEST_CAPABILITY = (8, 9)  # the first GPUs that convert to E4M3


@cache
def usable(device: torch.device) -> bool:
    """Whether the kernels run on this device: triton is installed and the GPU converts to E4M3."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= SMALLEST_CAPABILITY
