"""Which tensors live at a step's peak, from the allocator's own record, by the line that made them.

    python bench/peak.py [--cases 1.5B-32k] [--lines 25] --out peak.json

`bench/launches.py --peak` predicts the same list without a GPU.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from step import Step
from step_cases import CASES

ROOT = str(Path(__file__).resolve().parents[1])


def record(case: Any) -> dict[str, Any]:
    """The peak of a second step, in bytes, and (bytes, tensors, line) at it, the largest first."""
    torch.cuda.empty_cache()
    torch.cuda.memory._record_memory_history(
        enabled="all", context="alloc", stacks="python", max_entries=2_000_000
    )
    step = Step(case)
    step.forward().backward()
    step.update()
    torch.cuda.synchronize()
    before = len(torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()])
    torch.cuda.reset_peak_memory_stats()
    step.forward().backward()
    step.update()
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    peak, lines = at_peak(trace, before)
    allocated = torch.cuda.max_memory_allocated()
    del step
    return {"peak": peak, "allocated": allocated, "lines": lines}


def at_peak(trace: list[dict[str, Any]], first: int) -> tuple[int, list[tuple[int, int, str]]]:
    """(bytes, lines) at the largest sum of live blocks after the event `first`."""
    total, peak, where = 0, -1, 0
    for index, event in enumerate(trace):
        total += _change(event)
        if index >= first and total > peak:
            peak, where = total, index
    live: dict[int, dict[str, Any]] = {}
    for event in trace[: where + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
    sizes: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for event in live.values():
        line = _line(event["frames"])
        sizes[line] += event["size"]
        numbers[line] += 1
    return peak, [(size, numbers[line], line) for line, size in sizes.most_common()]


def _change(event: dict[str, Any]) -> int:
    size: int = event["size"]
    return {"alloc": size, "free_completed": -size}.get(event["action"], 0)


def _line(frames: list[dict[str, Any]]) -> str:
    """The innermost line of this project that lies outside the kernels' own files."""
    for frame in frames:
        name = frame["filename"]
        if ("/infir2/" in name or name.startswith(f"{ROOT}/bench/")) and "/kernels/" not in name:
            return f"{name.rpartition('/')[2]}:{frame['line']} {frame['name']}"
    return "torch"


def main() -> None:
    """Print the lines of FP8 and BF16, and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all lines")
    parser.add_argument("--cases", default="1.5B-32k", help="of bench/step.py, comma-separated")
    parser.add_argument("--lines", type=int, default=25, help="number of lines to print")
    options = parser.parse_args()
    report = {}
    for name in options.cases.split(","):
        for kind in ("FP8", "BF16"):
            found = report[f"{name} {kind}"] = record(CASES[name][kind])
            print(f"{name} {kind}: peak {found['peak'] / 2**30:.2f} GiB", flush=True)
            for size, number, line in found["lines"][: options.lines]:
                print(f"    {size / 2**20:10.1f} MiB {number:5d} {line}", flush=True)
    options.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
