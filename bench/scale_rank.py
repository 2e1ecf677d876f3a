"""One rank of bench/scale.py: `torchrun ... scale_rank.py JOB.json OUT.json`.

A job names one of `WORK` and its settings; rank 0 writes OUT.json after each result. With
"share_gpu" all ranks use one GPU and gloo replaces NCCL through host memory: the figures mean
nothing then, but every line runs on a machine with a single GPU.
"""

import gc
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import SHAPES, Case, build, flops
from torch import Tensor

from infir2.config.schema import OptimizerSection
from infir2.data import Batch
from infir2.model import Decoder
from infir2.numerics import Fp8Linear, SavedActivations
from infir2.numerics.weight_cache import local_tensor
from infir2.parallel import collectives
from infir2.parallel.mesh import Layout, Sizes
from infir2.parallel.parallel_model import ParallelModel
from infir2.parallel.ranks import Ranks, init_ranks, shutdown_ranks
from infir2.train.losses import NextTokenLoss, TokenScores, next_token_loss
from infir2.train.trainer import Trainer

# Keys of the section `parallel` that are measured beside the default.
WHEN_GATHERED: dict[str, dict[str, Any]] = {
    "gathered once": {"reshard_after_forward": False},
    "gathered once, two blocks at a time": {
        "reshard_after_forward": False,
        "blocks_per_gather": 2,
    },
}
# "small" splits over 8 tensor-parallel ranks without cutting an FP8 block; "tiny" takes a second on
# a CPU.
SHAPES["small"] = SHAPES["1.5B"] | {
    "hidden_size": 1024,
    "num_heads": 8,
    "num_kv_heads": 4,
    "ffn_size": 4096,
    "vocab_size": 32768,
}
SHAPES["tiny"] = SHAPES["1.5B"] | {
    "hidden_size": 256,
    "num_heads": 2,
    "num_kv_heads": 2,
    "ffn_size": 256,
    "vocab_size": 256,
}
GATHERS = ("all_gather_into_tensor", "all_gather_single")  # until torch 2.12, and since
COLLECTIVES = (
    "all_reduce",
    *GATHERS,
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_to_all_single",
)
SENDS = ("ncclDevKernel", "ncclKernel", "gloo:")
NO_WORK = (
    "gloo:",
    "c10d::",
    "Mem",
    "FSDP::",
    "Optimizer.",
    "ProfilerStep",
)  # copies, and names of program regions
GRADIENT = "decibels of the first gradient"
Report = dict[str, Any]


class Bench:
    """A job on this rank: its settings, process group and results."""

    def __init__(self, job: Report, out: Path) -> None:
        self.job, self.out, self.report = job, out, Report()
        self.cuda = job["device"] == "cuda"
        if job.get("share_gpu"):
            os.environ["LOCAL_RANK"] = "0"
        self.ranks: Ranks = init_ranks(torch.device(job["device"]), 300.0)
        if job.get("share_gpu"):
            use_host_collectives()
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        )

    def record(self, key: str, value: Any) -> None:
        """Record a result; rank 0 writes all results so far."""
        self.report[key] = value
        if self.ranks.is_rank0:
            partial = self.out.with_suffix(".part")
            partial.write_text(json.dumps(self.report, indent=1), encoding="utf-8")
            partial.replace(self.out)

    def trainer(
        self, case: Case, sizes: Sizes, single_process: bool = False, **gathers: Any
    ) -> Trainer:
        """A trainer whose weights are the same in every layout, sharded unless `single_process`.

        `gathers`: keys of the section `parallel` that say when weights are gathered.
        """
        torch.manual_seed(0)
        gc.collect()  # FSDP2's modules form reference cycles
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = build(case, str(self.device))
        layout = Layout(sizes, self.ranks, self.device)
        parallel_model = None if single_process else ParallelModel(model, layout, **gathers)
        return Trainer(model, OptimizerSection(), case.loss_chunk_tokens, parallel_model)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Marks:
    """Time marks on this rank's stream; `set(first=True)` starts a new row."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.rows: list[list[Any]] = []

    def set(self, first: bool = False) -> None:
        if first:
            self.rows.append([])
        if self.cuda:
            self.rows[-1].append(torch.cuda.Event(enable_timing=True))
            self.rows[-1][-1].record()
        else:
            self.rows[-1].append(time.perf_counter())

    def milliseconds(self) -> list[list[float]]:
        """Times between neighboring marks, row by row."""
        if self.cuda:
            torch.cuda.synchronize()
        between = (lambda a, b: a.elapsed_time(b)) if self.cuda else (lambda a, b: (b - a) * 1e3)
        return [[between(a, b) for a, b in itertools.pairwise(row)] for row in self.rows]


def use_host_collectives() -> None:
    """Run collectives of CUDA tensors on host copies, with gloo in the same groups."""
    for name in COLLECTIVES:
        if original := getattr(dist, name, None):

            def on_host(
                *args: Any, _original: Callable[..., Any] = original, **kwargs: Any
            ) -> None:
                host = {
                    id(x): x.cpu()
                    for x in (*args, *kwargs.values())
                    if isinstance(x, Tensor) and x.is_cuda
                }
                _original(
                    *(host.get(id(x), x) for x in args),
                    **{name: host.get(id(x), x) for name, x in kwargs.items()},
                )
                for x in (*args, *kwargs.values()):
                    if id(x) in host:
                        x.copy_(host[id(x)])

            setattr(dist, name, on_host)
    collectives.all_gather_single = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )


def batch_of(ids: Tensor, length: int) -> Batch:
    """A batch of sequences of `length` tokens that predict their next token."""
    positions, bounds = (
        torch.arange(length).repeat(len(ids) // length),
        torch.arange(0, len(ids) + 1, length, dtype=torch.int32),
    )
    mask = positions < length - 1
    return Batch(ids, positions, torch.where(mask, ids.roll(-1), 0), mask, bounds)


def tokens(case: Case, seed: int, text: str) -> Tensor:
    """Token ids of a micro-batch: bytes of the file `text`, or random ones."""
    if text:
        data = torch.frombuffer(bytearray(Path(text).read_bytes()), dtype=torch.uint8).long()
        return data.repeat(-(-(seed + 1) * case.tokens // len(data)))[
            seed * case.tokens : (seed + 1) * case.tokens
        ]
    return torch.randint(
        0,
        SHAPES[case.model]["vocab_size"],
        (case.tokens,),
        generator=torch.Generator().manual_seed(seed),
    )


def case_of(job: Report, fp8: bool) -> Case:
    return Case(
        job["model"],
        job["sequences"],
        job["length"],
        fp8,
        SavedActivations(),
        job.get("recompute", "none"),
        job["layers"],
    )


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes."""
    sha = hashlib.sha256()
    for x in tensors:  # a copy: numpy would pin memory that FSDP2 has to free
        sha.update(x.contiguous().view(torch.uint8).cpu().clone().numpy().tobytes())
    return sha.hexdigest()


def record_codes(model: Decoder) -> dict[str, str]:
    """name -> digest of the codes and scales that the first forward reads; filled as it runs."""
    seen: dict[str, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Fp8Linear):

            def read(name: str = name, layer: Fp8Linear = layer) -> Any:
                fp8 = Fp8Linear.quantized_weight(layer)
                if name not in seen:
                    seen[name] = digest(fp8.codes, fp8.scale)
                return fp8

            layer.quantized_weight = read  # type: ignore[method-assign]
    return seen


def expected_codes(bench: Bench, case: Case, parallel_model: ParallelModel) -> dict[str, str]:
    """The digests of a single process's weights, split as tensor parallelism splits them."""
    torch.manual_seed(0)
    digests = {}
    for name, layer in build(case, str(bench.device)).named_modules():
        if isinstance(layer, Fp8Linear):
            fp8, split = (
                layer.quantized_weight(),
                parallel_model.tensor_shards.get(f"{name}.weight"),
            )
            parts = (fp8.codes.view(torch.uint8), fp8.scale)
            digests[name] = digest(
                *(
                    parts
                    if split is None
                    else (x.chunk(split.count, split.dim)[split.index] for x in parts)
                )
            )
    return digests


def losses(trainer: Trainer, case: Case, job: Report, micro_batches: slice) -> list[float]:
    """Losses of `steps` steps; `micro_batches` selects those that this rank reads."""
    values = []
    for step in range(job["steps"]):
        numbers = range(step * job["micro_batches"], (step + 1) * job["micro_batches"])[
            micro_batches
        ]
        batches = [
            batch_of(tokens(case, number, job.get("text", "")), case.length) for number in numbers
        ]
        values.append(trainer.step(batches, next_token_loss, 1e-3).loss)
    return values


def first_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """name -> this rank's shard of the first step's gradient; filled as it runs."""
    seen: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        if not seen:
            seen.update(
                {
                    name: local_tensor(p.grad).clone()
                    for name, p in trainer.model.named_parameters()
                    if p.grad is not None
                }
            )

    trainer.optimizer.register_step_pre_hook(keep)
    return seen


def decibels(
    pairs: Iterable[tuple[Tensor, Tensor]], gather: Callable[[Any], list[Any]] = lambda sums: [sums]
) -> float:
    """Signal-to-error ratio of (actual, expected) pairs of all ranks as one vector.

    Equal pairs give 300 dB.
    """
    error, total = 0.0, 0.0
    for actual, expected in pairs:
        error += float((actual - expected).double().square().sum())
        total += float(expected.double().square().sum())
    errors, totals = zip(*gather((error, total)), strict=True)
    return 10 * math.log10(sum(totals) / max(sum(errors), 1e-30 * sum(totals)))


def gradient_pairs(
    parallel_model: ParallelModel, shards: dict[str, Tensor], full: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(this rank's shard, the same part of the full gradient) of every parameter."""
    for name, spec in parallel_model.shard_specs.items():
        ranges = tuple(
            slice(first, first + size)
            for first, size in zip(spec.offset, spec.local_shape, strict=True)
        )
        yield shards[name], full[name][ranges]


def equality(bench: Bench) -> None:
    """Compare every layout with a single process: losses, first gradient, gathered FP8 codes."""
    for fp8 in (True, False):
        case, job = case_of(bench.job, fp8), bench.job
        name = "FP8" if fp8 else "BF16"
        # Every rank trains the full model at the same time, so no rank waits into a timeout.
        trainer = bench.trainer(case, Sizes(), single_process=True)
        full = first_gradients(trainer)
        single_process = losses(trainer, case, job, slice(None))
        del trainer
        bench.record(f"{name} single process", single_process)
        # A repetition shows how far a GPU's summation order alone differs.
        trainer = bench.trainer(case, Sizes(), single_process=True)
        again = first_gradients(trainer)
        repeated = losses(trainer, case, job, slice(None))
        row = {
            "losses": repeated,
            "largest difference": max(
                abs(a - b) for a, b in zip(repeated, single_process, strict=True)
            ),
        }
        bench.record(
            f"{name} single process, repeated",
            row | {GRADIENT: decibels((again[key], full[key]) for key in full)},
        )
        del trainer, again
        for layout, numbers in job["layouts"].items():
            sizes = Sizes(*numbers)
            trainer = bench.trainer(case, sizes)
            expected = expected_codes(bench, case, trainer.parallel_model) if fp8 else {}
            codes, shards = record_codes(trainer.model), first_gradients(trainer)
            layout_losses = losses(
                trainer,
                case,
                job,
                slice(trainer.parallel_model.layout.data_rank, None, sizes.num_data),
            )
            row = {
                "losses": layout_losses,
                "largest difference": max(
                    abs(a - b) for a, b in zip(layout_losses, single_process, strict=True)
                ),
            }
            row[GRADIENT] = decibels(
                gradient_pairs(trainer.parallel_model, shards, full), bench.ranks.all_gather
            )
            if fp8:
                row["bytes equal on all ranks"] = all(
                    bench.ranks.all_gather(bool(codes) and codes == expected)
                )
            bench.record(f"{name} {layout}", row)
            del trainer


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
    for name, gathers in WHEN_GATHERED.items() if bench.job.get("gathers") else ():
        for fp8 in (True, False):
            row = measure(bench, case_of(bench.job, fp8), **gathers)
            bench.record(f"{'FP8' if fp8 else 'BF16'}, {name}", row)


def measure(bench: Bench, case: Case, **gathers: Any) -> dict[str, float]:
    """Medians over steps, defined as in bench/step.py; tokens and operations per GPU."""
    sizes, marks = Sizes(*bench.job["sizes"]), Marks(bench.cuda)
    trainer = bench.trainer(case, sizes, **gathers)
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
