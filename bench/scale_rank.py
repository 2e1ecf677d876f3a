"""What one rank of bench/scale.py does: `torchrun ... scale_rank.py JOB.json OUT.json`; rank 0 writes after each result.

A job names one of `WORK` and its settings. With "share_gpu" all ranks work on one GPU and NCCL's part is done through the
host by gloo: no figure then means anything, but every line runs, on a machine with a single GPU.
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
from infir2.parallel import collectives as exchange
from infir2.parallel.mesh import Layout, Sizes
from infir2.parallel.parallel_model import ParallelModel
from infir2.parallel.ranks import Ranks, init_ranks, shutdown_ranks
from infir2.train.losses import NextTokenLoss, TokenScores, next_token_loss
from infir2.train.trainer import Trainer

# What 8 tensor-parallel ranks can share, with FP8's groups whole; and what a CPU's emulation does in a second.
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
)  # copies, and names of stretches of the program
GRADIENT = "decibels of the first gradient"
Report = dict[str, Any]


class Bench:
    """A job on this rank."""

    def __init__(self, job: Report, out: Path) -> None:
        self.job, self.out, self.report = job, out, Report()
        self.cuda = job["device"] == "cuda"
        if job.get("share_gpu"):
            os.environ["LOCAL_RANK"] = "0"
        self.ranks: Ranks = init_ranks(torch.device(job["device"]), 300.0)
        if job.get("share_gpu"):
            go_through_the_host()
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        )

    def note(self, key: str, value: Any) -> None:
        """Keep a result; rank 0 writes all so far."""
        self.report[key] = value
        if self.ranks.is_rank0:
            partial = self.out.with_suffix(".part")
            partial.write_text(json.dumps(self.report, indent=1), encoding="utf-8")
            partial.replace(self.out)

    def trainer(self, case: Case, sizes: Sizes, single_process: bool = False) -> Trainer:
        """The same weights on every rank and in every layout, sharded, and an optimizer."""
        torch.manual_seed(0)
        gc.collect()  # FSDP2's modules refer to each other in circles
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = build(case, str(self.device))
        parallel_model = (
            None if single_process else ParallelModel(model, Layout(sizes, self.ranks, self.device))
        )
        return Trainer(model, OptimizerSection(), case.loss_chunk_tokens, parallel_model)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Marks:
    """Moments of this rank's stream, in rows that `set(first=True)` begins."""

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
        """Between the moments of each row."""
        if self.cuda:
            torch.cuda.synchronize()
        between = (lambda a, b: a.elapsed_time(b)) if self.cuda else (lambda a, b: (b - a) * 1e3)
        return [[between(a, b) for a, b in itertools.pairwise(row)] for row in self.rows]


def go_through_the_host() -> None:
    """Let CUDA tensors of a collective travel as host tensors, over the same groups' gloo."""
    for name in COLLECTIVES:
        if original := getattr(dist, name, None):

            def on_host(*args: Any, _original: Callable[..., Any] = original, **words: Any) -> None:
                moved = {
                    id(x): x.cpu()
                    for x in (*args, *words.values())
                    if isinstance(x, Tensor) and x.is_cuda
                }
                _original(
                    *(moved.get(id(x), x) for x in args),
                    **{name: moved.get(id(x), x) for name, x in words.items()},
                )
                for x in (*args, *words.values()):
                    if id(x) in moved:
                        x.copy_(moved[id(x)])

            setattr(dist, name, on_host)
    exchange.all_gather_single = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )


def batch_of(ids: Tensor, length: int) -> Batch:
    """Windows of `length` tokens, each predicting its next."""
    positions, bounds = (
        torch.arange(length).repeat(len(ids) // length),
        torch.arange(0, len(ids) + 1, length, dtype=torch.int32),
    )
    mask = positions < length - 1
    return Batch(ids, positions, torch.where(mask, ids.roll(-1), 0), mask, bounds)


def tokens(case: Case, seed: int, text: str) -> Tensor:
    """A micro-batch of token ids: bytes of the text, or random ones."""
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
    found = hashlib.sha256()
    for x in tensors:  # a copy: numpy would pin memory that FSDP2 has to free
        found.update(x.contiguous().view(torch.uint8).cpu().clone().numpy().tobytes())
    return found.hexdigest()


def spy_on_bytes(model: Decoder) -> dict[str, str]:
    """name -> digest of the codes and scales that the first forward reads, filled in as it runs."""
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


def expected_bytes(bench: Bench, case: Case, parallel_model: ParallelModel) -> dict[str, str]:
    """The digests of one process's weights, cut as tensor parallelism cuts them."""
    torch.manual_seed(0)
    whole = {}
    for name, layer in build(case, str(bench.device)).named_modules():
        if isinstance(layer, Fp8Linear):
            fp8, split = layer.quantized_weight(), parallel_model.splits.get(f"{name}.weight")
            parts = (fp8.codes.view(torch.uint8), fp8.scale)
            whole[name] = digest(
                *(
                    parts
                    if split is None
                    else (x.chunk(split.count, split.dim)[split.index] for x in parts)
                )
            )
    return whole


def losses(trainer: Trainer, case: Case, job: Report, mine: slice) -> list[float]:
    """Of `steps` steps on the same micro-batches, `mine` of which this rank reads."""
    found = []
    for step in range(job["steps"]):
        numbers = range(step * job["micro_batches"], (step + 1) * job["micro_batches"])[mine]
        batches = [
            batch_of(tokens(case, number, job.get("text", "")), case.length) for number in numbers
        ]
        found.append(trainer.step(batches, next_token_loss, 1e-3).loss)
    return found


def first_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """name -> this rank's part of the first step's gradient, filled in as it runs."""
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
    pairs: Iterable[tuple[Tensor, Tensor]], gather: Callable[[Any], list[Any]] = lambda mine: [mine]
) -> float:
    """Of what was found against what was expected, the pairs of all ranks as one vector; 300 where they are equal."""
    error, total = 0.0, 0.0
    for found, expected in pairs:
        error += float((found - expected).double().square().sum())
        total += float(expected.double().square().sum())
    errors, totals = zip(*gather((error, total)), strict=True)
    return 10 * math.log10(sum(totals) / max(sum(errors), 1e-30 * sum(totals)))


def parts_and_wanted(
    parallel_model: ParallelModel, parts: dict[str, Tensor], whole: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each gradient, found and cut out of the whole one."""
    for name, spec in parallel_model.shard_specs.items():
        ranges = tuple(
            slice(first, first + size)
            for first, size in zip(spec.offset, spec.local_shape, strict=True)
        )
        yield parts[name], whole[name][ranges]


def equality(bench: Bench) -> None:
    """Losses and the first gradient of every layout against one process, and the bytes of gathered FP8 weights."""
    for fp8 in (True, False):
        case, job = case_of(bench.job, fp8), bench.job
        name = "FP8" if fp8 else "BF16"
        # every rank works alone at the same time: none waits longer than a timeout for another
        trainer = bench.trainer(case, Sizes(), single_process=True)
        whole = first_gradients(trainer)
        single_process = losses(trainer, case, job, slice(None))
        del trainer
        bench.note(f"{name} alone", single_process)
        trainer = bench.trainer(
            case, Sizes(), single_process=True
        )  # what a GPU's own order of sums leaves of equality
        again = first_gradients(trainer)
        repeated = losses(trainer, case, job, slice(None))
        row = {
            "losses": repeated,
            "largest difference": max(
                abs(a - b) for a, b in zip(repeated, single_process, strict=True)
            ),
        }
        bench.note(
            f"{name} alone, again",
            row | {GRADIENT: decibels((again[key], whole[key]) for key in whole)},
        )
        del trainer, again
        for layout, numbers in job["layouts"].items():
            sizes = Sizes(*numbers)
            trainer = bench.trainer(case, sizes)
            expected = expected_bytes(bench, case, trainer.parallel_model) if fp8 else {}
            seen, parts = spy_on_bytes(trainer.model), first_gradients(trainer)
            found = losses(
                trainer,
                case,
                job,
                slice(trainer.parallel_model.layout.data_rank, None, sizes.num_data),
            )
            row = {
                "losses": found,
                "largest difference": max(
                    abs(a - b) for a, b in zip(found, single_process, strict=True)
                ),
            }
            row[GRADIENT] = decibels(
                parts_and_wanted(trainer.parallel_model, parts, whole), bench.ranks.all_gather
            )
            if fp8:
                row["bytes equal on all ranks"] = all(
                    bench.ranks.all_gather(bool(seen) and seen == expected)
                )
            bench.note(f"{name} {layout}", row)
            del trainer


def throughput(bench: Bench) -> None:
    """FP8 and BF16 with what both keep for the backward; on request also FP8 that keeps gate and up as FP8."""
    small = (
        {"FP8, gate/up in FP8": (True, SavedActivations(pre_activations="fp8"))}
        if bench.job.get("small")
        else {}
    )
    for name, (fp8, saved) in (
        {"FP8": (True, SavedActivations()), "BF16": (False, SavedActivations())} | small
    ).items():
        bench.note(name, measure(bench, replace(case_of(bench.job, fp8), saved=saved)))


def measure(bench: Bench, case: Case) -> dict[str, float]:
    """Medians of steps by the definitions of bench/step.py; tokens and operations are one GPU's share."""
    sizes, marks = Sizes(*bench.job["sizes"]), Marks(bench.cuda)
    trainer = bench.trainer(case, sizes)
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
    """One block's all-gather: bytes that a rank receives, milliseconds with its copies in and out."""
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
            bench.ranks.all_gather(None)  # all begin together
            marks.set(first=True)
            block.unshard()
            marks.set()
            bench.wait()
            block.reshard()
        size = sum(received) * (bench.ranks.size - 1) // bench.ranks.size
        median = statistics.median(span for (span,) in marks.milliseconds()[2:])
        bench.note(
            "FP8" if fp8 else "BF16",
            {"bytes": size, "milliseconds": median, "GB/s": size / median / 1e6},
        )
        del trainer, block


def count_gathered_bytes() -> list[int]:
    """Sizes of the results of all-gathers, filled in as they run."""
    sizes: list[int] = []
    for name in GATHERS:
        if original := getattr(dist, name, None):

            def counted(
                output: Tensor, *args: Any, _original: Callable[..., Any] = original, **words: Any
            ) -> Any:
                sizes.append(output.nbytes)
                return _original(output, *args, **words)

            setattr(dist, name, counted)
    return sizes


def overlap(bench: Bench) -> None:
    """The share of the communication's time that lies under computation, from a profile of one step."""
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
            bench.wait()
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
        total, under = sum(end - start for start, end in sends), covered(sends, works)
        bench.note(
            "FP8" if fp8 else "BF16",
            {
                "communication_ms": total / 1e3,
                "under_computation": under / total if total else None,
            },
        )
        del trainer


def covered(spans: Iterable[tuple[float, float]], by: Iterable[tuple[float, float]]) -> float:
    """How much of `spans` lies under the union of `by`. Example: `covered([(0, 4)], [(1, 2), (1.5, 3), (9, 10)])` -> 2."""
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
