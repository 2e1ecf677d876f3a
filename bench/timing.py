"""Times of calls on a GPU, and random operands."""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))


from infir2.numerics.formats import Fp8Tensor
from infir2.numerics.kernels import api


def milliseconds(call: Callable[[], Any], rep: int = 40) -> float:
    """Median time of a call."""
    return float(do_bench(call, warmup=10, rep=rep, return_mode="median"))


def device_milliseconds(call: Callable[[], Any], calls_per_graph: int = 8) -> float:
    """Median time of a call on the device with a cold L2 cache.

    A CUDA graph of calls and cache flushes is timed, and a graph of flushes only is subtracted.
    """
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def graph_milliseconds(work: Callable[[], Any]) -> float:
        work()  # compiles and picks backends
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls_per_graph):
                flush.zero_()
                work()
        return float(statistics.median(_replay_milliseconds(graph) for _ in range(7)))

    return (graph_milliseconds(call) - graph_milliseconds(lambda: None)) / calls_per_graph


def _replay_milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def random(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gaussian values on the GPU."""
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).to(dtype)


def fp8(rows: int, columns: int, block: tuple[int, int]) -> Fp8Tensor:
    """A random quantized matrix."""
    return api.quantize(random(rows, columns), block)
