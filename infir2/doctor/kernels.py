"""Which kernels an FP8 layer would use and why, whether it is right, and how fast it is."""

import statistics
import time

import torch

from infir2.model.attention_cuda import flash_attention_4
from infir2.numerics import Fp8Linear, dequantize, quantize
from infir2.numerics.error import snr_db
from infir2.numerics.gemm_scaled import missing_block_scaling
from infir2.numerics.kernels import usable
from infir2.preflight.finding import Finding
from infir2.train.fast_path import fast_path, missing_libraries

MIN_OUTPUT_DB = 45.0  # against the product of the dequantized operands, which BF16 rounds
MIN_GRADIENT_DB = 25.0  # against FP32, which FP8 rounds
_TOKENS, _WIDTH = 256, 512


def check_kernels(device: torch.device) -> Finding:
    """What computes the GEMMs of FP8 layers, the quantizers and attention."""
    if device.type == "cpu":
        detail = "FP8 is emulated on a CPU, with the bits of the reference: right, and slower "
        return Finding("kernels", "ok", detail + "than BF16. Attention: the reference.")
    reason = missing_block_scaling(device)
    loaded = [each.name for each in fast_path(device) if each.loads]
    gemms = f"emulated ({reason})" if reason else "block-scaled, by cuBLAS"
    gemms += " or DeepGEMM, the faster one per shape" if "DeepGEMM" in loaded else ""
    quantizers = "Triton's" if usable(device) else "torch operations"
    attention = "FlashAttention 4" if flash_attention_4() else "cuDNN or torch's varlen"
    detail = f"FP8 GEMMs: {gemms}; quantizers, norms, SwiGLU: {quantizers}; attention: {attention}"
    return Finding("kernels", "warn" if reason else "ok", detail)


def check_speed(device: torch.device) -> Finding:
    """The libraries that would make a step faster."""
    if missing := missing_libraries(device, fp8=True):
        return Finding("fast path", "warn", missing)
    installed = ", ".join(f"{each.name} {each.version}" for each in fast_path(device))
    return Finding("fast path", "ok", installed or "nothing to install for a CPU")


def check_layer(device: torch.device) -> Finding:
    """One FP8 layer, forward and backward, against the product of its dequantized operands."""
    torch.manual_seed(0)
    layer = Fp8Linear(_WIDTH, _WIDTH, bias=False, device=device)
    x = torch.randn(_TOKENS, _WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(_TOKENS, _WIDTH, device=device, dtype=torch.bfloat16)
    out = layer(x)
    out.backward(grad)
    weight = layer.weight.detach()
    product = _values(x.detach(), (1, 128)) @ _values(weight.bfloat16(), (128, 128)).T
    assert x.grad is not None
    assert layer.weight.grad is not None
    decibels = {
        "output": (snr_db(product, out), MIN_OUTPUT_DB),
        "grad_x": (snr_db(grad.float() @ weight, x.grad), MIN_GRADIENT_DB),
        "grad_W": (snr_db(grad.float().T @ x.detach().float(), layer.weight.grad), MIN_GRADIENT_DB),
    }
    found = ", ".join(
        f"{name} {db:.0f} dB (at least {least:.0f})" for name, (db, least) in decibels.items()
    )
    if all(db >= least for db, least in decibels.values()):
        return Finding("FP8 layer", "ok", f"{found}; {_times(layer, x)}")
    detail = f"{found}: this machine computes FP8 wrongly; set INFIR2_GEMM=emulation and report it"
    return Finding("FP8 layer", "fail", detail)


def _values(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """FP64 values of x in FP8."""
    return dequantize(quantize(x, block)).double()


def _times(layer: Fp8Linear, x: torch.Tensor) -> str:
    plain = torch.nn.Linear(_WIDTH, _WIDTH, bias=False, device=x.device, dtype=torch.bfloat16)
    fp8, bf16 = _milliseconds(layer, x), _milliseconds(plain, x)
    return f"forward and backward {fp8:.2f} ms, in BF16 {bf16:.2f} ms, for {_TOKENS} tokens"


def _milliseconds(layer: torch.nn.Module, x: torch.Tensor) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        layer(x).sum().backward()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
