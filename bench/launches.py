"""What a step asks of a GPU, counted without one: launches, allocations, views, memory at its peak.

    python bench/launches.py [--model 1.5B] [--tokens 8192] [--recompute full] [--peak]

The step runs on torch's meta device through the code of a GPU. Tensors have no memory and kernels
do not run, so that real sizes cost nothing and the same step gives the same numbers everywhere.

    launches      operations that start work on the GPU: Triton kernels, GEMMs, and torch's own
    allocations   new tensors of torch's allocator
    views         operations that cost the host time only
    peak          the largest sum of live storages, and the lines that made them (--peak)

Attention, whose library differs, counts as one launch forward and two backward.
"""

import argparse
import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from step import Step
from step_cases import CASES, SHAPES, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infir2.model import attention_cuda, decoder
from infir2.numerics import adamw, gemm_scaled, head_cuda, operands_cuda, ops
from infir2.train import optimizer

ROOT = str(Path(__file__).resolve().parents[1])
HERE = (f"{ROOT}/infir2/", f"{ROOT}/bench/")
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass
class Counts:
    """Numbers of operations by name, and the storages that live at the peak."""

    launches: Counter[str] = field(default_factory=Counter)
    allocations: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    live: dict[int, tuple[int, str]] = field(default_factory=dict)
    peak: int = 0
    at_peak: dict[int, tuple[int, str]] = field(default_factory=dict)

    def totals(self) -> dict[str, int]:
        """The number of each kind."""
        kinds = ("launches", "allocations", "views")
        return {kind: getattr(self, kind).total() for kind in kinds}

    def lines(self) -> list[tuple[int, int, str]]:
        """(bytes, number of tensors, line that made them) at the peak, the largest first."""
        sizes: Counter[str] = Counter()
        numbers: Counter[str] = Counter()
        for size, line in self.at_peak.values():
            sizes[line] += size
            numbers[line] += 1
        return [(size, numbers[line], line) for line, size in sizes.most_common()]


class Count(TorchDispatchMode):
    """Counts what runs inside it. Example: `with Count() as counts: step.forward()`."""

    def __init__(self, peak: bool = False) -> None:
        super().__init__()
        self.counts, self.peak, self.inside = Counts(), peak, 0
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves((args, kwargs, out))):
            return out  # the host's own arithmetic
        name = function.overloadpacket.__name__
        aliases = [argument.alias_info for argument in function._schema.arguments]
        if name in _ALLOCATIONS:
            self.counts.allocations[name] += 1
        elif name == "detach" or any(info and not info.is_write for info in aliases):
            self.counts.views[name] += 1
        else:
            self.launch(name)
        if self.peak:
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                self.track(tensor)
        return out

    def launch(self, name: str) -> None:
        """Count a launch."""
        if not self.inside:
            self.counts.launches[name] += 1

    @contextmanager
    def one_launch(self, name: str, number: int = 1) -> Iterator[None]:
        """Count what happens inside as `number` launches."""
        self.counts.launches[name] += number
        self.inside += 1
        yield
        self.inside -= 1

    def track(self, tensor: Any) -> None:
        """Follow the storage of a tensor from here on."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key, counts = storage._cdata, self.counts
        if key in counts.live or not storage.nbytes():
            return
        counts.live[key] = storage.nbytes(), _line()
        self.total += storage.nbytes()
        weakref.finalize(storage, self.drop, key)
        if self.total > counts.peak:
            counts.peak, counts.at_peak = self.total, dict(counts.live)

    def drop(self, key: int) -> None:
        """A storage is gone."""
        self.total -= self.counts.live.pop(key)[0]


def _line() -> str:
    """The line of this project, outside the kernels' own files, that is running."""
    frame: Any = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(HERE) and "/kernels/" not in name and name != __file__:
            return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, count: Count) -> Tensor:
        with count.one_launch("attention"):
            out = torch.empty(tuple(q.shape), dtype=q.dtype, device=q.device)
            sums = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.count = count
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.count.one_launch("attention backward", 2):
            grads = [
                torch.empty(tuple(t.shape), dtype=t.dtype, device=t.device)
                for t in ctx.saved_tensors[:3]
            ]
        return *grads, None


def _stubs(count: Count) -> list[Any]:
    """Patches that send a meta tensor down a GPU's path, where nothing runs."""
    from triton.runtime.jit import JITFunction

    def launch(self: Any, *_: Any, **__: Any) -> None:
        count.launch(f"triton {self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")

    def scaled_mm(a: Tensor, b: Tensor, *_: Any, output_dtype: torch.dtype) -> Tensor:
        with count.one_launch("scaled_mm"):
            return torch.empty((a.shape[0], b.shape[1]), dtype=output_dtype, device=a.device)

    def product(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
        with count.one_launch("mm in FP32"):
            shape = (a.shape[0], b.shape[1])
            return torch.empty(shape, device=a.device) if total is None else total

    def on_gpu(*_: Any) -> bool:
        return True

    conversions = import_module("infir2.numerics.quantize")  # hidden by the function's name
    places: list[Any] = [decoder, conversions, adamw, ops, optimizer]
    return [
        patch.object(JITFunction, "run", launch),
        patch.object(F, "scaled_mm", scaled_mm),
        *(patch.object(place, "usable", on_gpu) for place in places),
        patch.object(ops, "runs_on_kernels", lambda x, dtype=None: x.dtype == torch.bfloat16),
        patch.object(gemm_scaled, "missing_block_scaling", lambda device: None),
        patch.object(gemm_scaled, "deep_gemm", lambda: None),
        patch.object(operands_cuda, "fp32_product", product),
        patch.object(head_cuda, "fp32_product", product),
        patch.object(
            attention_cuda,
            "_varlen_attention",
            lambda q, k, v, plan: _Attention.apply(q, k, v, count),
        ),
    ]


def count_step(case: Case, peak: bool = False, device: str = "meta") -> dict[str, Counts]:
    """The counts of "forward", "backward" and "update" of a step that is not the first.

    With `peak`, those of the whole step as "step", which follow every storage.
    """
    found = {}
    with ExitStack() as stack:
        outer = Count(peak)
        for stub in _stubs(outer):
            stack.enter_context(stub)
        with outer:
            step = Step(case, device)
            step.forward().backward()
            step.update()
            outer.counts.peak = 0
            for name in ("forward", "backward", "update"):
                if not peak:
                    outer.counts = found[name] = Counts()
                if name == "forward":
                    loss = step.forward()
                elif name == "backward":
                    loss.backward()
                    del loss
                else:
                    step.update()
    return {"step": outer.counts} if peak else found


def block_counts(case: Case) -> dict[str, dict[str, float]]:
    """The counts that one block adds: (a step of three layers - a step of one) / 2.

    "once" has those of the whole step of one layer: head, clipping and what all weights share.
    """
    few, many = (count_step(replace(case, layers=layers)) for layers in (1, 3))
    totals = {name: (few[name].totals(), many[name].totals()) for name in few}
    added = {
        name: {kind: (three[kind] - one[kind]) / 2 for kind in one}
        for name, (one, three) in totals.items()
    }
    kinds = next(iter(added.values()))
    once = {kind: float(sum(one[kind] for one, _ in totals.values())) for kind in kinds}
    return added | {"once": once}


def block_of(name: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`block_counts` of "FP8" or "BF16"."""
    case = CASES["1.5B-8k"][name]
    return block_counts(replace(case, model=options.model, sequences=1, length=options.tokens))


def main() -> None:
    """Print the counts of FP8 and BF16 side by side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="1.5B", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=0, help="instead of the model's own")
    parser.add_argument("--recompute", default="none", choices=("none", "full"))
    parser.add_argument("--peak", action="store_true", help="list what lives at the peak")
    parser.add_argument("--names", action="store_true", help="list the launches by name")
    parser.add_argument("--blocks", action="store_true", help="count what one block adds, only")
    parser.add_argument("--out", type=Path, help="JSON file for the counts of a block")
    options = parser.parse_args()
    if options.blocks:
        blocks = {name: block_of(name, options) for name in ("FP8", "BF16")}
        print(json.dumps(blocks, indent=1))
        if options.out:
            options.out.write_text(json.dumps(blocks), encoding="utf-8")
        return
    layers = options.layers or SHAPES[options.model]["num_layers"]
    for fp8 in (True, False):
        case = replace(
            CASES["1.5B-8k"]["FP8"], model=options.model, sequences=1, length=options.tokens,
            fp8=fp8, layers=layers, recompute=options.recompute,
        )  # fmt: skip
        for name, counts in count_step(case, options.peak).items():
            print(f"{'FP8' if fp8 else 'BF16':4s} {name:8s}", counts.totals(), flush=True)
            for launch, number in counts.launches.most_common() if options.names else ():
                print(f"    {number:6d} {launch}")
            if options.peak:
                print(f"    peak {counts.peak / 2**30:.3f} GiB")
                for size, number, line in counts.lines()[:40]:
                    print(f"    {size / 2**20:10.1f} MiB {number:5d} {line}")


if __name__ == "__main__":
    main()
