"""FP8 kernels and GEMMs on one GPU: bit-equality with the reference, then speed against the floor.

    python bench/kernels.py --out kernels.json [--sections bits,quantizers,...]

Quantizers are bound by memory traffic. Per BF16 value a quantizer reads 2 bytes and writes 1 per
layout (`BYTES` counts each kernel's, with 4/128 bytes per layout for the scales). Its floor is
bytes / measured copy bandwidth, and its share of the copy bandwidth is the figure of merit (goal:
0.90 from 100 M elements on, 0.75 at 25 M). Quantizers and copies are timed inside a CUDA graph, so
the launch overhead does not count; the section `host` measures it.

A GEMM does 2 M N K operations. For the linears of a layer, forward and backward, the floor is the
sum of the GEMMs at the rate of the fastest backend. These times are medians of
triton.testing.do_bench. The L2 cache is cleared before each call; data is random.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernel_cases as cases
from gemms import gemm_correctness, gemms, layers, product
from timing import device_milliseconds, fp8, milliseconds, random

from infir2.numerics import gemm_scaled as gemm_backends
from infir2.numerics.error import relative_error
from infir2.numerics.formats import ROW_BLOCK, TILE_BLOCK
from infir2.numerics.kernels import conversions, norm, quantizers, swiglu

FORMATS = ("pow2", "fp32")
SIZES = {"25M": (6144, 4096), "100M": (24576, 4096), "150M": (36864, 4096)}
SCALE = 4 / 128
# Bytes per value of x (of y = silu(gate) * up for the last five), reads + writes.
BYTES = {
    "rows": 3 + SCALE,
    "gradient": 4 + 2 * SCALE,
    "input": 4 + SCALE,
    "transpose": 2 + SCALE,
    "weight": 5,
    "transpose bytes": 2,
    "norm": 4,
    "norm quantize": 3 + SCALE,
    "norm transposed": 3,
    "norm backward": 6,
    "swiglu": 6,
    "swiglu quantize": 5 + SCALE,
    "swiglu transposed": 5,
    "swiglu backward": 10,
    "swiglu backward quantize": 10 + 4 * SCALE,
}
# Kernels without a scale format.
FORMAT_FREE = ("transpose", "transpose bytes", "norm", "norm backward", "swiglu", "swiglu backward")


def bits(results: dict[str, Any]) -> None:
    """Compare every kernel bit by bit with the CPU reference; print the mismatches."""
    wrong = 0
    shapes = [(257, 576), (512, 1536), (8, 18944)]
    for name, (kernel, reference) in [*cases.CONVERSIONS.items(), *cases.FUSED.items()]:
        fused = name in cases.FUSED
        count = 0
        for shape in shapes if not fused else [(257, 640), (512, 1536)]:
            for make in (cases.gaussian,) if fused else (cases.gaussian, cases.hostile):
                x = make(*shape)
                for scale_format in FORMATS:
                    actual = kernel(x.cuda(), scale_format)
                    # The reference of a fused kernel quantizes the BF16 result of the GPU's
                    # producer.
                    expected = reference(x.cuda() if fused else x, scale_format)
                    count += sum(
                        cases.mismatches(a, e) for a, e in zip(actual, expected, strict=True)
                    )
        results[name] = count
        wrong += count
    for columns in (576, 1536, 3584):
        for name, (actual, expected) in cases.producer_results(
            cases.gaussian(512, columns).cuda()
        ).items():
            results[f"{name} {columns}: error"] = relative_error(expected, actual.cpu())
            results[f"{name} {columns}: differing"] = (
                (actual.cpu() != expected).double().mean().item()
            )
    print(
        f"bits: {wrong} mismatches",
        {name: n for name, n in results.items() if isinstance(n, int) and n},
    )
    worst = max((v, k) for k, v in results.items() if k.endswith("error"))
    print(f"producers against FP64: worst error {worst[0]:.2e} ({worst[1]})")


def copy_bandwidth(results: dict[str, Any]) -> None:
    """Device-to-device copy, bytes read + written; TB/s."""
    for name, (rows, columns) in SIZES.items():
        source = random(rows, columns)
        target = torch.empty_like(source)
        results[name] = 2 * source.nbytes / device_milliseconds(partial(target.copy_, source)) / 1e9
    print("copy TB/s:", {name: round(value, 2) for name, value in results.items()})


def calls(rows: int, columns: int, pow2: bool) -> dict[str, Callable[[], Any]]:
    """Every kernel on random data of one size."""
    x, other = random(rows, columns), random(rows, columns)
    pair = random(rows, 2 * columns)
    gate, up = pair[:, :columns], pair[:, columns:]
    weight = torch.ones(columns, device="cuda")
    master = random(rows, columns, torch.float32)
    _, rstd = norm.rms_norm(x, weight, 1e-6)
    codes, scale = quantizers.quantize_rows(x, True)
    tiles = quantizers.quantize_tiles(x, True, False)
    return {
        "rows": lambda: quantizers.quantize_rows(x, pow2),
        "gradient": lambda: quantizers.quantize_rows_and_columns(x, pow2),
        "input": lambda: quantizers.quantize_rows_and_tiles(x, pow2),
        "transpose": lambda: conversions.transpose_rows(codes, scale),
        "weight": lambda: quantizers.quantize_tiles(master, pow2, True),
        "transpose bytes": lambda: conversions.transpose_tiles(*tiles),
        "norm": lambda: norm.rms_norm(x, weight, 1e-6),
        "norm quantize": lambda: norm.rms_norm_quantize(x, weight, 1e-6, pow2),
        "norm transposed": lambda: norm.rms_norm_transposed(x, rstd, weight, pow2),
        "norm backward": lambda: norm.rms_norm_backward(other, x, rstd, weight, None),
        "swiglu": lambda: swiglu.swiglu(gate, up),
        "swiglu quantize": lambda: swiglu.swiglu_quantize(gate, up, pow2),
        "swiglu transposed": lambda: swiglu.swiglu_transposed(gate, up, pow2),
        "swiglu backward": lambda: swiglu.swiglu_backward(x, gate, up),
        "swiglu backward quantize": lambda: swiglu.swiglu_backward_quantize(x, gate, up, pow2),
    }


def share(name: str, rows: int, columns: int, time_ms: float, copy: float) -> float:
    """Bytes that a kernel must move / its time, as a share of the copy bandwidth [TB/s]."""
    return BYTES[name] * rows * columns / time_ms / 1e9 / copy


def quantizer_rates(results: dict[str, Any], copy: dict[str, float]) -> None:
    """Share of the copy bandwidth of every kernel, at three sizes and at both models' widths."""
    peak = max(copy.values())
    for scale_format in FORMATS:
        for size, (rows, columns) in SIZES.items():
            for name, call in calls(rows, columns, scale_format == "pow2").items():
                if scale_format == "pow2" or name not in FORMAT_FREE:
                    results[f"{name} {scale_format} {size}"] = share(
                        name, rows, columns, device_milliseconds(call), peak
                    )
            torch.cuda.empty_cache()
    for rows, columns in ((16384, 1536), (8192, 3584)):
        for name, call in calls(rows, columns, True).items():
            results[f"{name} pow2 {rows}x{columns}"] = share(
                name, rows, columns, device_milliseconds(call), peak
            )
    sizes = [*SIZES, "16384x1536", "8192x3584"]
    print(
        f"share of copy bandwidth ({peak:.2f} TB/s); floor 1.00\n{'':32s}"
        + "".join(f"{size:>11s}" for size in sizes)
    )
    for name in BYTES:
        for scale_format in FORMATS:
            row = [results.get(f"{name} {scale_format} {size}") for size in sizes]
            if any(row):
                print(
                    f"{name + ' ' + scale_format:32s}"
                    + "".join(f"{'' if v is None else f'{v:.2f}':>11s}" for v in row)
                )


def host(results: dict[str, Any]) -> None:
    """Host microseconds per operator call; hidden as long as the GPU is busy for longer."""
    x = random(128, 128)
    a, b = fp8(128, 128, ROW_BLOCK), fp8(128, 128, TILE_BLOCK)
    for name, call in {
        "rows": lambda: quantizers.quantize_rows(x, True),
        "gemm": lambda: product(a, b),
        "bf16 mm": lambda: x @ x,
    }.items():
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            times.append((time.perf_counter() - start) * 1e4)
        results[name] = statistics.median(times)
    print("host microseconds per call:", {k: round(v, 1) for k, v in results.items()})


def _warps(*pairs: tuple[int, int | None]) -> list[dict[str, int]]:
    """Launch configurations from (warps, maximum registers per thread)."""
    return [
        {"num_warps": warps} | ({"maxnreg": registers} if registers else {})
        for warps, registers in pairs
    ]


TILES = _warps((4, None), (8, None), (4, 168), (4, 128), (8, 128), (8, 96), (8, 80))
TUNED = {
    "rows": (
        quantizers.ROWS_CONFIG,
        [{"BLOCK_ROWS": r, "num_warps": w} for r, w in ((16, 2), (16, 4), (64, 4))],
    ),
    "gradient": (quantizers.GRADIENT_CONFIG, TILES),
    "input": (quantizers.INPUT_CONFIG, TILES),
    "transpose": (
        quantizers.TILE_CONFIG,
        _warps((4, None), (8, None), (8, 128), (8, 64), (16, 64)),
    ),
    "norm transposed": (norm.TRANSPOSED_CONFIG, TILES),
    "swiglu transposed": (swiglu.TRANSPOSED_CONFIG, TILES),
    "swiglu quantize": (
        quantizers.ROWS_CONFIG,
        [{"BLOCK_ROWS": r, "num_warps": w} for r, w in ((16, 4), (32, 4), (64, 8))],
    ),
    "swiglu backward quantize": (
        swiglu.BACKWARD_QUANTIZE_CONFIG,
        [*TILES, *_warps((8, 168), (8, 144), (16, 128), (16, 96))],
    ),
    "norm quantize": (
        norm.FORWARD_CONFIG,
        [
            {"values": v, "num_warps": w}
            for v, w in ((1024, 1), (2048, 2), (2048, 4), (4096, 4), (4096, 8), (8192, 8))
        ],
    ),
    "norm backward": (
        norm.BACKWARD_CONFIG,
        [
            {"values": v, "num_warps": w, "programs_per_processor": p}
            for v, w, p in ((2048, 2, 16), (2048, 4, 8), (4096, 4, 8), (4096, 4, 16), (4096, 8, 8))
        ],
    ),
}


def tune(results: dict[str, Any], copy: dict[str, float], names: list[str]) -> None:
    """Share of the copy bandwidth by launch configuration, at 150 M and 25 M elements."""
    peak = max(copy.values())
    for name in names:
        config, variants = TUNED[name]
        before = dict(config)
        for variant in variants:
            config.clear()
            config.update(variant)
            row = {}
            for scale_format in FORMATS if name in ("rows", "gradient") else ("pow2",):
                for size in ("150M", "25M"):
                    call = calls(*SIZES[size], scale_format == "pow2")[name]
                    row[f"{scale_format} {size}"] = share(
                        name, *SIZES[size], milliseconds(call, 20), peak
                    )
            results[f"{name} {variant}"] = row
            print(f"{name:26s} {variant!s:72s}", {k: round(v, 2) for k, v in row.items()})
        config.clear()
        config.update(before)


def environment() -> dict[str, str]:
    """Hardware and library versions."""
    deep_gemm = gemm_backends.deep_gemm()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "deepgemm": str(getattr(deep_gemm, "__version__", deep_gemm is not None)),
    }


def main() -> None:
    """Run the sections; an error in one is recorded and the others still run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the raw numbers")
    parser.add_argument(
        "--tune", default="", help="kernels for the section `tune`, comma-separated (default: all)"
    )
    parser.add_argument(
        "--sections",
        default="bits,gemm_correctness,quantizers,gemms,layers,host,tune",
        help="comma-separated",
    )
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "environment": environment(),
        "command": sys.argv,
        "seconds": {},
        "copy": {},
    }
    print(report["environment"])
    torch.manual_seed(0)
    copy_bandwidth(report["copy"])
    sections: dict[str, Callable[[dict[str, Any]], None]] = {
        "bits": bits,
        "gemm_correctness": gemm_correctness,
        "quantizers": lambda results: quantizer_rates(results, report["copy"]),
        "gemms": gemms,
        "layers": layers,
        "host": host,
        "tune": lambda results: tune(
            results, report["copy"], arguments.tune.split(",") if arguments.tune else list(TUNED)
        ),
    }
    for name in arguments.sections.split(","):
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        report[name] = {}
        try:
            sections[name](report[name])
        except Exception:
            report[name]["error"] = traceback.format_exc()
            print("".join(traceback.format_exc().splitlines(keepends=True)[-6:]))
        report["seconds"][name] = time.perf_counter() - start
        arguments.out.write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")
        torch.cuda.empty_cache()
    print("seconds:", {name: round(value) for name, value in report["seconds"].items()})


if __name__ == "__main__":
    main()
