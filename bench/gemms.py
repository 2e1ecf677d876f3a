"""The sections `gemm_correctness`, `gemms` and `layers` of bench/kernels.py."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from layer import MODELS, LayerLinears
from timing import fp8, milliseconds, random

from infir2.numerics import gemm_scaled as gemm_backends
from infir2.numerics.error import relative_error
from infir2.numerics.formats import ROW_BLOCK, TILE_BLOCK, Fp8Tensor


def product(
    a: Fp8Tensor, b: Fp8Tensor, dtype: torch.dtype = torch.bfloat16, backend: str | None = None
) -> Tensor:
    """`gemm_nt` of two quantized matrices."""
    return gemm_backends.gemm_nt(
        a.codes, a.scale, b.codes, b.scale, a.block, b.block, dtype, backend
    )


def gemms(results: dict[str, Any]) -> None:
    """TFLOP/s of every GEMM of both models' layers, by backend."""
    backends = ("bf16", "cublas", "deepgemm", "cublas 128x1", "cublas 1x1", "deepgemm 1x1")
    print(f"GEMM TFLOP/s\n{'':44s}" + "".join(f"{name:>14s}" for name in backends))
    for model, (tokens, linears) in MODELS.items():
        for linear, (n, k) in linears.items():
            for kind, (m_, n_, k_) in {
                "out": (tokens, n, k),
                "grad_x": (tokens, k, n),
                "grad_W": (n, k, tokens),
            }.items():
                rates = {
                    name: 2e-9 * m_ * n_ * k_ / t
                    for name, t in gemm_times(m_, n_, k_, kind).items()
                }
                results[f"{model} {linear} {kind}"] = rates
                columns = "".join(f"{rates.get(name, 0):>14.0f}" for name in backends)
                print(f"{model + ' ' + linear + ' ' + kind:24s} {f'{m_}x{n_}x{k_}':>19s}{columns}")
        torch.cuda.empty_cache()


def gemm_times(m: int, n: int, k: int, kind: str) -> dict[str, float]:
    """Milliseconds by backend of one GEMM [m, k] x [n, k].T."""
    out = torch.float32 if kind == "grad_W" else torch.bfloat16
    x, w = random(m, k), random(n, k)
    a, b = fp8(m, k, ROW_BLOCK), fp8(n, k, TILE_BLOCK)
    if kind == "grad_W":  # BF16 reads both operands along the token dimension, as stored
        x, w = random(k, m).t(), random(k, n).t()
    times = {
        "bf16": milliseconds(lambda: x @ w.t()),
        "cublas": milliseconds(lambda: product(a, b, out, "cublas")),
    }
    if "deepgemm" in gemm_backends.candidates(_operand(a), _operand(b), out):
        times["deepgemm"] = milliseconds(lambda: product(a, b, out, "deepgemm"))
    if kind == "grad_W":
        rows_b, tiles_a = fp8(n, k, ROW_BLOCK), fp8(m, k, TILE_BLOCK)
        times["cublas 1x1"] = milliseconds(lambda: product(a, rows_b, out, "cublas"))
        times["cublas 128x1"] = milliseconds(lambda: product(tiles_a, rows_b, out, "cublas"))
        if gemm_backends.deep_gemm() is not None:
            times["deepgemm 1x1"] = milliseconds(lambda: product(a, rows_b, out, "deepgemm"))
    return times


def _operand(t: Fp8Tensor) -> gemm_backends.Operand:
    return gemm_backends.Operand(t.codes, t.scale, t.block[0])


def gemm_correctness(results: dict[str, Any]) -> None:
    """Compare every backend with the emulation, on full, padded and partial blocks."""
    shapes = [
        (256, 512, 1024),
        (100, 200, 576),
        (33, 48, 72),
        (16, 8960, 1536),
        (128, 1536, 8960),
        (7, 5, 3),
        (2000, 576, 1536),
    ]
    pairs = [(ROW_BLOCK, TILE_BLOCK), (TILE_BLOCK, ROW_BLOCK), (ROW_BLOCK, ROW_BLOCK)]
    worst = (0.0, "")
    for m, n, k in shapes:
        for a_block, b_block in pairs:
            for dtype in (torch.bfloat16, torch.float32):
                a, b = fp8(m, k, a_block), fp8(n, k, b_block)
                expected = product(a, b, torch.float32, "emulation")
                for backend in gemm_backends.candidates(_operand(a), _operand(b), dtype):
                    name = f"{backend} {m}x{n}x{k} {a_block[0]}x{b_block[0]} {dtype}"
                    try:
                        results[name] = relative_error(expected, product(a, b, dtype, backend))
                    except Exception as error:
                        results[name] = f"{type(error).__name__}: {str(error)[:300]}"
                        print(f"  {name}: {results[name][:160]}")
                        continue
                    worst = max(worst, (results[name], name)) if "bfloat16" not in name else worst
    print(f"GEMMs against emulation: worst FP32 error {worst[0]:.2e} ({worst[1]})")


def layers(results: dict[str, Any]) -> None:
    """All linears of one decoder layer, forward + backward: ratio of BF16 time to FP8 time."""
    for model, (tokens, linears) in MODELS.items():
        layer = LayerLinears(tokens, linears)
        times = {name: milliseconds(call, rep=200) for name, call in layer.variants().items()}
        times["weights quantized"] = milliseconds(layer.quantize_weights)
        plain, fused = (
            times["bf16 linears"],
            times["fp8 fused"] - (times["bf16 with producers"] - times["bf16 linears"]),
        )
        ratios = {
            "separate quantizers": plain / times["fp8 linears"],
            "fused producers": plain / fused,
            "GEMMs only (floor)": plain / times["fp8 GEMMs only"],
            "forward only": times["bf16 forward"] / times["fp8 forward"],
            "layer without attention": times["bf16 with producers"] / times["fp8 fused"],
        }
        results[model] = {"milliseconds": times, "ratios": ratios}
        print(f"{model}, {tokens} tokens, ms:", {k: round(v, 3) for k, v in times.items()})
        print(f"{model}: BF16 / FP8:", {k: round(v, 3) for k, v in ratios.items()})
        del layer
        torch.cuda.empty_cache()
