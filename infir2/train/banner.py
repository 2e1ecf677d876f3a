"""The line with which a run or an evaluation begins: what it computes with."""

import torch

from infir2.config.schema import Fp8Section
from infir2.convert.weights import parameter_shapes
from infir2.model import ModelConfig
from infir2.numerics.gemm_scaled import missing_block_scaling
from infir2.parallel.mesh import Sizes


def start_banner(
    config: ModelConfig, fp8: Fp8Section, device: torch.device, sizes: Sizes | None = None
) -> str:
    """Model, device, precision and layout in one line.

    Example: "qwen2, 1.2 M parameters, on cpu (2 threads), FP8 emulated, 1 process"
    """
    shapes = parameter_shapes(config.to_hf()).values()
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes)
    return (
        f"{config.architecture}, {_count(num_parameters)} parameters, on {_device(device)}, "
        f"{_precision(fp8, device)}, {_layout(sizes or Sizes())}"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' if threads > 1 else ''})"


def _precision(fp8: Fp8Section, device: torch.device) -> str:
    if not fp8.enabled:
        return "no FP8"
    return "FP8 emulated" if missing_block_scaling(device) else "FP8 kernels"


def _layout(sizes: Sizes) -> str:
    """The axes with more than one rank: "8 processes (dp 4, tp 2)"."""
    axes = ("dp_replicate", "dp", "cp", "tp")
    used = [f"{name} {getattr(sizes, name)}" for name in axes if getattr(sizes, name) > 1]
    return f"{sizes.world} processes ({', '.join(used)})" if used else "1 process"
