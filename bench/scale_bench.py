"""What the works of bench/scale_rank.py share: processes, models, batches, marks of a step."""

import gc
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import build
from step_cases import SHAPES, Case
from torch import Tensor

from infir2.config.schema import OptimizerSection
from infir2.data import Batch
from infir2.numerics import SavedActivations
from infir2.parallel import collectives, parallel_model
from infir2.parallel.mesh import Layout, Sizes
from infir2.parallel.parallel_model import ParallelModel
from infir2.parallel.ranks import Ranks, init_ranks
from infir2.train.trainer import Trainer

GATHERS = ("all_gather_into_tensor", "all_gather_single")  # until torch 2.12, and since
COLLECTIVES = (
    "all_reduce",
    *GATHERS,
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_to_all_single",
)
SENDS = ("ncclDevKernel", "ncclKernel", "gloo:")
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
        self, case: Case, sizes: Sizes | None, graphs: bool = False, **gathers: Any
    ) -> Trainer:
        """A trainer whose weights are the same in every layout; without `sizes`: a single process.

        `graphs`: as `train.cuda_graphs`. `gathers`: keys of the section `parallel` that say when
        weights are gathered.
        """
        torch.manual_seed(0)
        gc.collect()  # FSDP2's modules form reference cycles
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = build(case, str(self.device))
        parallel_model = None
        if sizes is not None:
            parallel_model = ParallelModel(model, Layout(sizes, self.ranks, self.device), **gathers)
        graph_tokens = case.tokens if graphs else 0
        chunk_tokens = case.loss_chunk_tokens
        return Trainer(model, OptimizerSection(), chunk_tokens, parallel_model, graph_tokens)

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
    parallel_model.all_reduce_together = _one_by_one


def _one_by_one(tensors: Iterable[Tensor], group: Any) -> None:
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)


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
