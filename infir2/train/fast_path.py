"""The libraries that make a step on a GPU fast, and what it loses without each.

The losses are measured (docs/results/hopper.md): of 332 ms of a step of 1.5B in FP8, FlashAttention
4 saved 10; its attention at 32,768 tokens takes 12 % less time; DeepGEMM's GEMMs of a layer take
8 % (1.5B) and 4 % (7B) less time than cuBLAS's, a third of a step.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from infir2.model.attention_cuda import flash_attention_4
from infir2.numerics.gemm_scaled import deep_gemm, missing_block_scaling

INSTALL = "pip install 'infir2[gpu]'"  # brings them all, with the torch that they fit


@dataclass(frozen=True)
class Library:
    """A library of the fast path.

    Attributes:
        loads: whether it can be used.
        loss: how much slower a step is without it.
    """

    name: str
    package: str
    loads: bool
    loss: str

    @property
    def version(self) -> str:
        """The installed version, or ""."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return ""

    @property
    def advice(self) -> str:
        """What it costs not to have it, and what to do."""
        found = f" ({self.package} {self.version} does not load; a warning says why)"
        return f"without {self.name} {self.loss}{found if self.version else ''}: {INSTALL}"


def fast_path(device: torch.device, fp8: bool = True) -> list[Library]:
    """The libraries that a step on this device would use; none on a CPU and on AMD's GPUs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return []
    loads = find_spec("triton") is not None
    loss = "an FP8 step is many times slower" if fp8 else "norms, SwiGLU and the head are slower"
    libraries = [Library("Triton", "triton", loads, loss)]
    if missing_block_scaling(device):  # not Hopper
        return libraries
    loss = "a step is 3 % slower (of 8,192 tokens; more with longer sequences)"
    loads = flash_attention_4() is not None
    libraries.append(Library("FlashAttention 4", "flash-attn-4", loads, loss))
    if fp8:
        loss, loads = "a step is 2 to 3 % slower", deep_gemm() is not None
        libraries.append(Library("DeepGEMM", "sgl-deep-gemm", loads, loss))
    return libraries


def missing_libraries(device: torch.device, fp8: bool) -> str:
    """What a run should be told, or "".

    Example: "without DeepGEMM a step is 2 to 3 % slower: pip install 'infir2[gpu]'"
    """
    return "; ".join(each.advice for each in fast_path(device, fp8) if not each.loads)
