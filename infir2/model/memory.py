"""The memory of a device, and the refusal of a model that is larger."""

import contextlib
import os
import re
from pathlib import Path

import torch

from infir2.errors import ConfigError

GIB = 2**30


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or bytes of the machine's memory that a process could still allocate."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory()


def host_memory() -> int:
    """Bytes of the machine's memory that a process could still allocate."""
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        if match := re.search(r"MemAvailable: *(\d+) kB", text):
            return int(match[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(num_bytes: int, device: torch.device | str = "cpu") -> None:
    """Raise ConfigError if weights of `num_bytes` do not fit the device; call it before allocating.

    Otherwise the system kills the process, or torch fails in the middle of loading.
    """
    device = torch.device(device)
    available = device_memory(device)
    if num_bytes > available:
        raise ConfigError(
            f"the model's weights need {num_bytes / GIB:,.1f} GiB, and {device.type} has "
            f"{available / GIB:,.1f} GiB; use a smaller model or a machine with more memory."
        )
