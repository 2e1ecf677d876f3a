"""One rank of bench/scale.py: `torchrun ... scale_rank.py JOB.json OUT.json`.

A job names one of `WORK` and its settings; rank 0 writes OUT.json after each result. With
"share_gpu" all ranks use one GPU and gloo replaces NCCL through host memory: the figures mean
nothing then, but every line runs on a machine with a single GPU.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scale_bench import GATHERS, SENDS, Bench, Marks, batch_of, case_of, tokens
from scale_equality import equality
from step_cases import Case, flops
from torch import Tensor

from infir2.numerics import SavedActivations
from infir2.parallel.mesh import Sizes
from infir2.parallel.ranks import shutdown_ranks
from infir2.train.losses import NextTokenLoss, TokenScores, next_token_loss

# Keys of the section `parallel` that are measured beside the default.
WHEN_GATHERED: dict[str, dict[str, Any]] = {
    "gathered once": {"reshard_after_forward": False},
    "gathered once, two blocks at a time": {
        "reshard_after_forward": False,
        "blocks_per_gather": 2,
    },
}
NO_WORK = (
    "gloo:",
    "c10d::",
    "Mem",
    "FSDP::",
    "Optimizer.",
    "ProfilerStep",
)  # copies, and names of program regions


def throughput(bench: Bench) -> None:
    """Measure FP8 and BF16 with default activations; on request also FP8 pre-activations."""
    small = (
        {"FP8, gate/up in FP8": (True, SavedActivations(pre_activations="fp8"))}
        if bench.job.get("small")
        else {}
    )
    for name, (fp8, saved) in (
        {"FP8": (True, SavedActivations()), "BF16": (False, SavedActivations())} | small
    ).items():
        bench.record(name, measure(bench, replace(case_of(bench.job, fp8), saved=saved)))
    others = WHEN_GATHERED if bench.job.get("gathers") else {}
    sizes = Sizes(*bench.job["sizes"])
    if bench.cuda and sizes.num_shards * sizes.tp == 1:
        others = {"graphs": {"graphs": True}}
    for name, options in others.items():
        for fp8 in (True, False):
            row = measure(bench, case_of(bench.job, fp8), **options)
            bench.record(f"{'FP8' if fp8 else 'BF16'}, {name}", row)


def measure(bench: Bench, case: Case, **options: Any) -> dict[str, float]:
    """Medians over steps, defined as in bench/step.py; tokens and operations per GPU.

    `options`: of `Bench.trainer`.
    """
    sizes, marks = Sizes(*bench.job["sizes"]), Marks(bench.cuda)
    trainer = bench.trainer(case, sizes, **options)
    batch = batch_of(tokens(case, trainer.parallel_model.layout.data_rank, ""), case.length)

    class TimedLoss(NextTokenLoss):
        def __call__(self, scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
            marks.set()
            return super().__call__(scores)

    trainer.optimizer.register_step_pre_hook(lambda *_: marks.set())
    for step in range(bench.job["steps"] + 3):
        if step == 2 and bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        marks.set(first=True)
        loss = trainer.step([batch], TimedLoss(), 1e-5).loss
        marks.set()
    spans = marks.milliseconds()[3:]
    forward, backward, update = (statistics.median(span[i] for span in spans) for i in range(3))
    total, share = statistics.median(sum(span) for span in spans), sizes.num_data / sizes.world
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.cuda else 0.0
    row = {"forward": forward, "backward": backward, "update": update, "total": total, "loss": loss}
    row |= {
        "peak_gib": max(bench.ranks.all_gather(peak)),
        "tflops": share * flops(case) / (forward + backward) / 1e9,
    }
    return row | {"tokens_per_second": share * case.tokens / total * 1e3}


def gather(bench: Bench) -> None:
    """Measure one block's all-gather: received bytes, milliseconds including copies."""
    sizes = Sizes(dp=bench.ranks.size)
    for fp8 in (True, False):
        case = case_of(bench.job, fp8)
        trainer = bench.trainer(case, sizes)
        trainer.step(
            [batch_of(tokens(case, bench.ranks.rank, ""), case.length)], next_token_loss, 1e-5
        )
        received = count_gathered_bytes()
        block: Any = trainer.model.model.layers[1]
        marks = Marks(bench.cuda)
        for _ in range(bench.job["steps"] + 2):
            received.clear()
            bench.ranks.all_gather(None)  # a barrier, so all ranks start at the same time
            marks.set(first=True)
            block.unshard()
            marks.set()
            bench.synchronize()
            block.reshard()
        size = sum(received) * (bench.ranks.size - 1) // bench.ranks.size
        median = statistics.median(span for (span,) in marks.milliseconds()[2:])
        bench.record(
            "FP8" if fp8 else "BF16",
            {"bytes": size, "milliseconds": median, "GB/s": size / median / 1e6},
        )
        del trainer, block


def count_gathered_bytes() -> list[int]:
    """Sizes of all-gather results in bytes; filled as they run."""
    sizes: list[int] = []
    for name in GATHERS:
        if original := getattr(dist, name, None):

            def counted(
                output: Tensor, *args: Any, _original: Callable[..., Any] = original, **kwargs: Any
            ) -> Any:
                sizes.append(output.nbytes)
                return _original(output, *args, **kwargs)

            setattr(dist, name, counted)
    return sizes


def overlap(bench: Bench) -> None:
    """Profile one step: the share of communication time that computation hides."""
    activity = torch.profiler.ProfilerActivity
    for fp8 in (True, False):
        case = case_of(bench.job, fp8)
        trainer = bench.trainer(case, Sizes(*bench.job["sizes"]))
        batch = batch_of(tokens(case, trainer.parallel_model.layout.data_rank, ""), case.length)
        for _ in range(2):
            trainer.step([batch], next_token_loss, 1e-5)
        with torch.profiler.profile(
            activities=[activity.CUDA] if bench.cuda else [activity.CPU]
        ) as trace:
            trainer.step([batch], next_token_loss, 1e-5)
            bench.synchronize()
        kind = torch.autograd.DeviceType.CUDA if bench.cuda else torch.autograd.DeviceType.CPU
        spans = [
            (e.name, e.time_range.start, e.time_range.end)
            for e in trace.events()
            if e.device_type == kind
        ]
        sends = [span[1:] for span in spans if span[0].startswith(SENDS)]
        works = [
            span[1:] for span in spans if not span[0].startswith(NO_WORK) and "nccl" not in span[0]
        ]
        total, hidden = sum(end - start for start, end in sends), covered(sends, works)
        bench.record(
            "FP8" if fp8 else "BF16",
            {
                "communication_ms": total / 1e3,
                "under_computation": hidden / total if total else None,
            },
        )
        del trainer


def covered(spans: Iterable[tuple[float, float]], by: Iterable[tuple[float, float]]) -> float:
    """Length of `spans` that the union of `by` covers.

    Example: `covered([(0, 4)], [(1, 2), (1.5, 3), (9, 10)])` -> 2.
    """
    union: list[list[float]] = []
    for start, end in sorted(by):
        if union and start <= union[-1][1]:
            union[-1][1] = max(union[-1][1], end)
        else:
            union.append([start, end])
    return sum(
        max(0.0, min(end, u_end) - max(start, u_start))
        for start, end in spans
        for u_start, u_end in union
    )


WORK = {work.__name__: work for work in (equality, throughput, gather, overlap)}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if job["device"] == "cpu":
        torch.set_num_threads(1)
    bench = Bench(job, Path(sys.argv[2]))
    WORK[job["work"]](bench)
    shutdown_ranks()


if __name__ == "__main__":
    main()
