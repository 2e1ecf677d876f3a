"""`infir2 bench`: the rates of this machine's GPU, as `infir2 plan` reads them."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from infir2.errors import ConfigError, OutputExistsError, disk_reason
from infir2.files import write_atomically
from infir2.model.attention_cuda import flash_attention_4, plan_varlen
from infir2.model.memory import GIB
from infir2.numerics import quantize
from infir2.numerics.gemm_scaled import gemm_nt, missing_block_scaling
from infir2.planner.gpus import Gpu, find_gpu
from infir2.terminal import begin_phase

TOKENS, WIDTH, WIDE = 8192, 3584, 18944  # of a GEMM of a 7B model
_CALLS = 12


def measure_gpu(path: Path) -> str:
    """Measure the first GPU, write `path`, and return what was found.

    Raises ConfigError, and OutputExistsError for a file that is something else."""
    _check_output(path)
    if not torch.cuda.is_available():
        raise ConfigError(
            "infir2 bench measures a GPU, and torch sees none here; `infir2 plan --gpu h100` uses "
            "the rates that ship with infir2."
        )
    gpu = _measure()
    try:
        write_atomically(path, json.dumps(asdict(gpu), indent=1).encode() + b"\n")
    except OSError as error:
        raise ConfigError(
            f"--to {path}: cannot be written ({disk_reason(error)}); name another file."
        ) from error
    rates = ", ".join(f"{name} {value}" for name, value in asdict(gpu).items())
    return f"{path}: {rates}. Use it: infir2 plan RECIPE.toml --gpu {path}"


def _check_output(path: Path) -> None:
    """Raise ConfigError or OutputExistsError for what could not be written or named as --gpu."""
    if path.is_dir():
        raise ConfigError(f"--to {path}: is a directory; name a file, such as {path / 'gpu.json'}.")
    if path.suffix != ".json":
        raise ConfigError(f"--to {path}: the file is JSON; name it {path}.json.")
    if not path.parent.is_dir():
        raise ConfigError(f"--to {path}: {path.parent} is no directory; make it first.")
    if path.exists():
        try:
            find_gpu(str(path))
        except ConfigError as error:
            raise OutputExistsError(
                f"--to {path}: exists and is not a file of infir2 bench; name another file."
            ) from error


def _measure() -> Gpu:
    device = torch.device("cuda", 0)
    start = find_gpu("h200" if "H200" in torch.cuda.get_device_name(device) else "h100")
    begin_phase("measuring copies")
    x = torch.empty(2**29, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    bandwidth = 2 * x.numel() / _seconds(lambda: y.copy_(x)) / 1e12
    begin_phase("measuring GEMMs")
    flops = 2.0 * TOKENS * WIDTH * WIDE
    a = torch.randn(TOKENS, WIDTH, device=device, dtype=torch.bfloat16)
    b = torch.randn(WIDE, WIDTH, device=device, dtype=torch.bfloat16)
    fp8 = 0.0 if missing_block_scaling(device) else flops / _seconds(_fp8_gemm(a, b)) / 1e12
    begin_phase("measuring attention")
    attention = _attention(device)
    is_flash = flash_attention_4() is not None
    return replace(
        start,
        name=torch.cuda.get_device_name(device),
        memory_gib=round(torch.cuda.get_device_properties(device).total_memory / GIB, 1),
        bandwidth=round(bandwidth, 2),
        bf16_tflops=round(flops / _seconds(lambda: a @ b.T) / 1e12),
        fp8_tflops=round(fp8),
        flash_tflops=attention if is_flash else start.flash_tflops,
        torch_tflops=start.torch_tflops if is_flash else attention,
        link_gb_s=_link(start.link_gb_s),
        launch_us=round(_launch_seconds(device) * 1e6, 1),
        origin=f"infir2 bench, torch {torch.__version__}; network_gb_s is an assumption",
    )


def _seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call on the GPU."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_CALLS + 1)]
    for _ in range(3):
        call()
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    spans = [a.elapsed_time(b) for a, b in pairwise(marks)]
    return statistics.median(spans) * 1e-3


def _fp8_gemm(a: Tensor, b: Tensor) -> Callable[[], object]:
    x, w = quantize(a), quantize(b, (128, 128))
    return lambda: gemm_nt(x.codes, x.scale, w.codes, w.scale, x.block, w.block)


def _attention(device: torch.device) -> tuple[float, float]:
    """TFLOP/s of causal attention over one sequence of 8,192 tokens: forward, backward."""
    q = torch.randn(TOKENS, 28, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(TOKENS, 4, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    context = plan_varlen((TOKENS,), device)
    flops = 2.0 * TOKENS * TOKENS * 28 * 128
    forward = _seconds(lambda: context.attend(q, k, v, 0))
    out = context.attend(q, k, v, 0)
    gradient = torch.randn_like(out)
    backward = _seconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))
    return round(flops / forward / 1e12), round(2.5 * flops / backward / 1e12)


def _link(assumed: float) -> float:
    """GB/s of a copy between two GPUs; what is assumed if there is one."""
    if torch.cuda.device_count() < 2:
        return assumed
    x = torch.empty(2**29, device="cuda:0", dtype=torch.uint8)
    y = torch.empty_like(x, device="cuda:1")
    return round(x.numel() / _seconds(lambda: y.copy_(x)) / 1e9)


def _launch_seconds(device: torch.device) -> float:
    """Seconds of the host for one small operation of torch."""
    x = torch.zeros(16, device=device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(500):
        x.add_(1)
    seconds = (time.perf_counter() - start) / 500
    torch.cuda.synchronize()
    return seconds
