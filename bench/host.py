"""The host's time for a step beside the GPU's: which of the two a step waits for.

    python bench/host.py [--cases 135M-8k,0.5B-8k,1.5B-8k] [--operators 12] --out host.json

    host ms      forward, backward and update as the host issues them, with so few tokens that the
                 GPU is never waited for; real number of layers, real weights
    GPU ms       time during which a kernel runs in a step of real size, from the profiler
    step ms      median of steps of real size
    launches     kernels and copies of a step of real size
    graphs       the same with the blocks as CUDA graphs (`train.cuda_graphs`)

FP8 cannot be faster than the host: where host ms exceeds GPU ms, fewer launches make a step faster.
`--operators` lists the host's own time in torch's operators and ours.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step import Step
from step_cases import CASES, Case
from torch.profiler import ProfilerActivity, profile

TINY = 128  # tokens: one block of every kernel


def host_milliseconds(step: Step, count: int = 9) -> dict[str, float]:
    """Medians of the host's time to issue forward, backward and update, without waiting."""
    spans: list[tuple[float, ...]] = []
    for _ in range(count):
        torch.cuda.synchronize()
        times = [time.perf_counter()]
        loss = step.forward()
        times.append(time.perf_counter())
        loss.backward()
        del loss
        times.append(time.perf_counter())
        step.update()
        times.append(time.perf_counter())
        spans.append(tuple(1e3 * (b - a) for a, b in itertools.pairwise(times)))
    parts = [statistics.median(column) for column in zip(*spans[3:], strict=True)]
    return dict(zip(("forward", "backward", "update"), parts, strict=True)) | {"total": sum(parts)}


def operators(step: Step, number: int) -> list[tuple[str, float, int]]:
    """(operator, own host ms, calls) of one step, the longest first, as profiling slows it."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        one_step(step)
    rows = [(e.key, e.self_cpu_time_total / 1e3, e.count) for e in trace.key_averages()]
    return sorted(rows, key=lambda row: -row[1])[:number]


def one_step(step: Step) -> None:
    step.forward().backward()
    step.update()
    torch.cuda.synchronize()


def gpu_milliseconds(step: Step, count: int = 5) -> dict[str, float]:
    """Busy time and launches of a step of real size, and the median time of a step."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        one_step(step)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        one_step(step)
        times.append(1e3 * (time.perf_counter() - start))
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        one_step(step)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    busy = union(spans) / 1e3
    row = {"gpu": busy, "step": statistics.median(times), "launches": len(spans)}
    # Of the memory that a graph holds, the allocator counts little as allocated.
    kinds = {
        "allocated": torch.cuda.max_memory_allocated,
        "reserved": torch.cuda.max_memory_reserved,
    }
    return row | {f"{kind}_gib": measure() / 2**30 for kind, measure in kinds.items()}


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans. Example: `union([(0, 2), (1, 3), (5, 6)])` -> 4."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def measure(case: Case, number: int, graphs: bool) -> dict[str, Any]:
    """The row of one case."""
    row: dict[str, Any] = {}
    for each in (replace(case, sequences=1, length=TINY), case):
        gc.collect()  # a decoder with graphs refers to itself
        torch.cuda.empty_cache()
        step = Step(each)
        if graphs:
            step.use_graphs()
        if each is case:
            row |= gpu_milliseconds(step)
        else:
            row |= host_row(step, number)
        del step
    return row


def host_row(step: Step, number: int) -> dict[str, Any]:
    """The host's times, and its `number` longest operators."""
    for _ in range(5):
        one_step(step)
    row: dict[str, Any] = {"host": host_milliseconds(step)}
    return row | ({"operators": operators(step, number)} if number else {})


def main() -> None:
    """Print a row per case, then write the raw numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the raw numbers")
    parser.add_argument("--cases", default="135M-8k,0.5B-8k,1.5B-8k", help="of bench/step.py")
    parser.add_argument("--operators", type=int, default=0, help="number of operators to list")
    options = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in options.cases.split(","):
        for kind, graphs in itertools.product(("BF16", "FP8"), (False, True)):
            row = measure(CASES[name][kind], options.operators, graphs)
            kind += ", graphs" if graphs else ""
            report[f"{name} {kind}"] = row
            host = ", ".join(f"{key} {value:.1f}" for key, value in row["host"].items())
            peaks = ", ".join(
                f"{row[f'{each}_gib']:.2f} {each}" for each in ("allocated", "reserved")
            )
            print(
                f"{name} {kind:12s} host ms: {host}; GPU ms {row['gpu']:.1f}, step ms "
                f"{row['step']:.1f}, launches {row['launches']}, peak GiB {peaks}",
                *(
                    f"    {ms:8.2f} ms {calls:5d} {key}"
                    for key, ms, calls in row.get("operators", ())
                ),
                sep="\n",
                flush=True,
            )
            options.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
