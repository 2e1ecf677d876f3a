"""Several GPUs of one host: equality with one process, speed, memory, cost of communication.

All GPUs (docs/results/scale.md describes the measurements):

    python bench/scale.py --out docs/results/scale-h200-x2.json

Jobs, memory and minutes of a run, without a GPU:

    python bench/scale.py --gpus 4 --dry-run

Every code path on a CPU, or on one GPU with collectives through host memory:

    python bench/scale.py --tiny --device cpu --gpus 2 --out x.json
    python bench/scale.py --tiny --share-gpu --gpus 2 --out x.json

Each job is a torchrun of bench/scale_rank.py with a time limit, the most important one first.
Results are written after each job, so an interrupted run keeps them. A failed job prints one line
and the next one runs.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from scale_bench import case_of
from scale_equality import GRADIENT
from scale_runs import ENVIRONMENT, ROOT, Job, command, execute, ray, save
from step_cases import SHAPES, Case

from infir2.config.schema import ShapeSection
from infir2.model import ModelConfig
from infir2.parallel.mesh import Sizes, tp_problem
from infir2.preflight.gpu_memory import gpu_ledger

SECTIONS = ("equality", "throughput", "gather", "overlap", "save", "ray")
# The published reference, BF16 and FP8: (total ms, peak GB, TFLOP/s per GPU).
REFERENCE = {
    ("1.5B", 32768): ("TP2", (3170, 57.8, 345), (2950, 51.7, 360)),
    ("1.5B", 8192): ("TP1", (2030, 68.1, 340), (1590, 58.3, 376)),
    ("7B", 32768): ("TP4", (9590, 78.1, 409), (8360, 67.4, 461)),
    ("7B", 8192): ("TP2", (7080, 53.2, 453), (5530, 50.8, 537)),
}


def layouts(ranks: int) -> dict[str, tuple[int, int, int, int]]:
    """Every kind of layout for this number of ranks: name -> (dp_replicate, dp, cp, tp)."""
    layouts = {
        f"dp{ranks}": (1, ranks, 1, 1),
        f"tp{ranks}": (1, 1, 1, ranks),
        f"cp{ranks}": (1, 1, ranks, 1),
        f"copies{ranks}": (ranks, 1, 1, 1),
    }
    if ranks % 4 == 0:
        half = ranks // 2
        layouts |= {
            f"hsdp2x{half}": (2, half, 1, 1),
            f"dp{half}-tp2": (1, half, 1, 2),
            f"cp2-tp{half}": (1, 1, 2, half),
        }
        layouts[f"dp{half}-cp2"] = (1, half, 2, 1)
    if ranks == 8:
        layouts["dp2-cp2-tp2"] = (1, 2, 2, 2)
    return layouts


def plan(options: argparse.Namespace) -> list[Job]:
    """The jobs, the most important one first."""
    n, tiny = options.gpus, options.tiny
    small: dict[str, object] = {
        "model": "tiny" if tiny else "small",
        "layers": 2 if tiny else 4,
        "sequences": 1,
        "length": 256 if tiny else 4096,
    }
    layouts_of_small = {
        name: sizes
        for name, sizes in layouts(n).items()
        if not tp_problem(config_of(case_of(small, True)), sizes[3], True)
    }
    shared = {
        "steps": 2 if tiny else 10,
        "micro_batches": n,
        "layouts": layouts_of_small,
        "text": str(options.text or ""),
    }
    jobs = [Job("equality", "equality", n, 1.5, {"work": "equality", **small, **shared})]

    def speed(
        model: str, length: int, ranks: int, sizes: tuple[int, int, int, int], minutes: float
    ) -> Job:
        recompute = "full" if length == 32768 else "none"
        sequences = 2 if (model, length) == ("1.5B", 8192) else 1
        settings: dict[str, object] = {
            "model": model,
            "length": length,
            "sequences": sequences,
            "recompute": recompute,
            "layers": 28,
        }
        if tiny:
            settings = small
        settings["small"] = (model, length) == ("7B", 8192)
        settings["gathers"] = length == 8192 and sizes == (1, n, 1, 1)
        name = next(
            name
            for name, numbers in ({"one GPU": (1, 1, 1, 1)} | layouts(ranks)).items()
            if numbers == sizes
        )
        settings = {**settings, "work": "throughput", "sizes": sizes, "steps": 1 if tiny else 5}
        return Job("throughput", f"{model} {length} {name}", ranks, minutes, settings)

    dp, tp, cp = (1, n, 1, 1), (1, n // 2, 1, 2), (1, n // 2, 2, 1)
    cases = [
        ("7B", 8192, n, dp, 2.0),
        ("1.5B", 8192, n, dp, 1.2),
        ("1.5B", 8192, n, (n, 1, 1, 1), 0.8),
        ("1.5B", 8192, 1, (1, 1, 1, 1), 0.6),
    ]
    cases += [
        ("7B", 32768, n, dp, 1.3),
        ("1.5B", 32768, n, dp, 0.7),
        ("7B", 8192, n, tp, 1.0),
        ("7B", 32768, n, cp, 1.2),
    ]
    jobs += [speed(*numbers) for numbers in (cases[:1] if tiny else cases)]
    block = (
        {**small, "steps": 2}
        if tiny
        else {"model": "7B", "layers": 4, "sequences": 1, "length": 1024, "steps": 20}
    )
    jobs.insert(2, Job("gather", "one block of 7B", n, 0.5, {"work": "gather", **block}))
    step = small if tiny else {"model": "7B", "layers": 8, "sequences": 1, "length": 8192}
    jobs.insert(
        3, Job("overlap", "8 blocks of 7B", n, 0.6, {"work": "overlap", **step, "sizes": dp})
    )
    jobs.insert(4, Job("save", "save and resume", n, 1.0, {}))
    jobs.insert(5, Job("ray", "a Ray launch", n, 0.8, {}))
    return [job for job in jobs if job.section in options.sections.split(",")]


def config_of(case: Case) -> ModelConfig:
    shape = ShapeSection(**{**SHAPES[case.model], "num_layers": case.layers})
    return ModelConfig.from_shape(shape, shape.vocab_size)


def memory_gib(job: Job, fp8: bool) -> float:
    """Estimate of one GPU's peak memory in GiB, from the ledger of the job's case."""
    case = case_of(job.settings, fp8)
    sizes = Sizes(*job.settings.get("sizes", (1, job.ranks, 1, 1)))
    return sum(gpu_ledger(config_of(case), case.recipe(), sizes).values()) / 2**30


def ranks_job(
    job: Job, options: argparse.Namespace, seconds: float, directory: Path
) -> dict[str, Any]:
    spec, out = directory / "job.json", directory / "out.json"
    out.unlink(missing_ok=True)
    settings = job.settings | {"device": options.device, "share_gpu": options.share_gpu}
    spec.write_text(json.dumps(settings), encoding="utf-8")
    reason = execute(
        command(job, str(ROOT / "bench" / "scale_rank.py"), str(spec), str(out)), seconds
    )
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return result | ({"failed": reason} if reason else {})


def rows_of(job: Job, result: dict[str, Any]) -> list[str]:
    """The printed lines of a job's results."""
    rows = [f"{job.name}: {key}: {result[key]}" for key in ("failed", "skipped") if key in result]
    if job.section == "equality":
        rows += [
            f"{name:24s} largest loss difference {row['largest difference']:.2e},"
            f" first gradient {row[GRADIENT]:.0f} dB"
            + (
                f", bytes equal: {row['bytes equal on all ranks']}"
                if "bytes equal on all ranks" in row
                else ""
            )
            for name, row in result.items()
            if isinstance(row, dict)
        ]
    if job.section == "throughput":
        rows += throughput_rows(job, result)
    elif job.section != "equality" and not rows:
        rows += [f"{job.name}, {key}: {value}" for key, value in result.items()]
    return rows


def throughput_rows(job: Job, result: dict[str, Any]) -> list[str]:
    rows, bf16 = [], result.get("BF16")
    for name, row in result.items():
        if not isinstance(row, dict):
            continue
        numbers = ("total", "forward", "backward", "peak_gib", "tflops", "tokens_per_second")
        text = f"{job.name:22s} {name:20s} " + ", ".join(
            f"{key} {row[key]:,.1f}" for key in numbers
        )
        if bf16 and row is not bf16:
            memory = (
                f", memory {row['peak_gib'] / bf16['peak_gib']:.2f}x" if bf16["peak_gib"] else ""
            )
            text += f": {bf16['total'] / row['total']:.2f}x as fast as BF16{memory}"
        rows.append(text)
    if reference := REFERENCE.get((job.settings["model"], job.settings["length"])):
        layout, (slow, much, _), (fast, less, flops) = reference
        rows.append(
            f"{'the reference, ' + layout:43s} FP8 {slow / fast:.2f}x as fast,"
            f" memory {less / much:.2f}x, {flops} TFLOP/s"
        )
    return rows


def dry_run(jobs: list[Job], options: argparse.Namespace) -> None:
    """Print every job with its expected memory and minutes."""
    print(" ".join(f"{name}={value}" for name, value in ENVIRONMENT.items()))
    for job in jobs:
        memory = ""
        if "model" in job.settings:
            memory = ", GiB a GPU: " + ", ".join(
                f"{name} {memory_gib(job, fp8):.0f}"
                for name, fp8 in (("FP8", True), ("BF16", False))
            )
        print(
            f"{job.section}: {job.name}: {job.minutes:g} minutes{memory}\n"
            f"    {job.settings or 'infir2 cpt on the demo'}"
        )
        print(f"    torchrun --standalone --nproc_per_node={job.ranks}")
    print(f"{sum(job.minutes for job in jobs):.1f} minutes in all; {options.minutes:g} allowed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers")
    parser.add_argument(
        "--gpus", type=int, default=torch.cuda.device_count(), help="ranks (default: all GPUs)"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated")
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.3,
        help="time budget; a job that would exceed it is skipped",
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="train the equality section on this file's bytes instead of random tokens",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the jobs")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--share-gpu", action="store_true", help="all ranks on one GPU, to test the command"
    )
    options = parser.parse_args()
    if options.gpus < 2:
        parser.error(
            f"this needs at least 2 GPUs, not {options.gpus};"
            " set --gpus (any number works with --dry-run)"
        )
    jobs = plan(options)
    if options.dry_run:
        dry_run(jobs, options)
        return
    if options.out is None:
        parser.error("--out FILE.json is required for the results")
    began = time.monotonic()
    report: dict[str, Any] = {
        "command": sys.argv,
        "torch": torch.__version__,
        "gpus": options.gpus,
    }
    if options.device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
    host_jobs = {"save": save, "ray": ray}
    with tempfile.TemporaryDirectory(prefix="infir2-scale-") as directory:
        for job in jobs:
            left = 60 * options.minutes - (time.monotonic() - began)
            result: dict[str, Any] = {
                "skipped": f"{left:.0f} s left, about {60 * job.minutes:.0f} s needed"
            }
            if left >= 60 * job.minutes:
                try:
                    result = host_jobs.get(job.section, ranks_job)(
                        job, options, min(left, 180 * job.minutes), Path(directory)
                    )
                except Exception as error:  # record it and run the next job
                    result = {"failed": f"{type(error).__name__}: {error}"}
            report[f"{job.section}: {job.name}"] = result
            print(*rows_of(job, result), sep="\n", flush=True)
            options.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
