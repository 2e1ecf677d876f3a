"""A decoder's blocks as CUDA graphs: two launches for a micro-batch's forward and backward.

A step of a small model waits for the host, which launches thousands of short kernels one by one. A
graph launches all kernels of all blocks at once. It reads and writes fixed addresses:

    inputs      states after the embedding, rotation tables, bounds of the sequences: copied in
    weights     masters stay where they are; the graph of a step's first micro-batch quantizes or
                rounds them, to the same memory at each step
    gradients   the first micro-batch of a step writes them, the others add to them

Both kinds of micro-batch have a pair of graphs (forward, backward), captured after eager ones of
the same size have compiled every kernel. All graphs share one pool of memory, so what a micro-batch
saves for its backward must be used before the next one starts.

With FlashAttention 4 the bits are those without graphs; torch's attention takes the kernel for
sequences of any lengths, also where all are equal. A micro-batch that is nearly full is padded,
which changes sums; it is also padded where it runs eagerly, before the capture or after a failed
one, so that a resumed run repeats the bits of one that was not interrupted.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infir2.model.attention import AttentionContext
from infir2.model.attention_cuda import VarlenAttention, flash_attention_4
from infir2.numerics import nonfinite_blocks, quantize_weights
from infir2.numerics.gemm_scaled import missing_block_scaling
from infir2.numerics.ops import requantizer
from infir2.numerics.weight_cache import CachedValues, cached_values, invalidate, restore

Rope = tuple[Tensor, Tensor]
Run = Callable[[Tensor, Rope, AttentionContext], Tensor]

_EAGER_BATCHES = 2  # micro-batches before the first capture: they compile and choose kernels
LEAST_FILLED = 0.75  # a micro-batch with fewer of its tokens runs eagerly, without padding
_LEAST_SEQUENCES, _TOKENS_OF_A_SEQUENCE = 64, 64  # more or shorter ones run eagerly


@dataclass(frozen=True)
class _Inputs:
    """What the graphs read, [R] rows: a micro-batch and its padding."""

    x: Tensor
    rope: Rope
    bounds: Tensor  # int32 [most sequences + 2]; the padding is one, and the last ones are empty

    @classmethod
    def like(cls, x: Tensor, rope: Rope, rows: int, most_sequences: int) -> "_Inputs":
        def empty(t: Tensor) -> Tensor:
            return torch.zeros((rows, *t.shape[1:]), dtype=t.dtype, device=t.device)

        bounds = torch.zeros(most_sequences + 2, dtype=torch.int32, device=x.device)
        return cls(empty(x), (empty(rope[0]), empty(rope[1])), bounds)

    def fill(self, x: Tensor, rope: Rope, lengths: tuple[int, ...]) -> None:
        """Copy a micro-batch; its padding is a sequence of zeros."""
        for to, new in zip((self.x, *self.rope), (x, *rope), strict=True):
            to[: len(new)].copy_(new)
            to[len(new) :].zero_()
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        bounds = torch.full((len(self.bounds),), len(self.x), dtype=torch.int32)
        bounds[: len(ends)] = ends
        self.bounds.copy_(bounds, non_blocking=True)


@dataclass(frozen=True)
class _Pair:
    """Graphs of a forward and its backward, with what they write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    quantize: Callable[[], Tensor] | None  # owns the tables of addresses that the forward reads
    nonfinite: Tensor | None  # int64 [], blocks of the weights that the forward quantized
    out: Tensor  # [R, D]
    grad_out: Tensor  # [R, D], read by the backward
    grad_x: Tensor  # [R, D]


class BlockGraphs:
    """Runs a decoder's blocks as graphs where a micro-batch allows it (`run`).

    Args:
        blocks: the decoder's blocks, whose parameters are whole and on one GPU.
        run: the blocks' states [R, D] of x [R, D], eagerly.
        rows: tokens of a full micro-batch; a multiple of 128.
    """

    def __init__(self, blocks: nn.ModuleList, run: Run, rows: int) -> None:
        self._run, self._rows = run, rows
        self._most_sequences = max(_LEAST_SEQUENCES, rows // _TOKENS_OF_A_SEQUENCE)
        self._parameters = [p for p in blocks.parameters() if p.requires_grad]
        self._weights: list[Tensor] = list(blocks.parameters())
        self._groups = [group for block in cast(Any, blocks) for group in block.groups]
        self._made: CachedValues = []  # from the weights, in memory that the graphs read
        self._gradients: list[Tensor | None] = []  # of the first micro-batch, where graphs write
        self._inputs: _Inputs | None = None
        self._pairs: dict[bool, _Pair] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # of every capture
        self._eager = 0
        self._active = self._failed = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, `run` may use graphs: every forward is followed by its backward."""
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def run(self, x: Tensor, rope: Rope, context: AttentionContext) -> Tensor | None:
        """States [T, D] after the blocks of x [T, D]; None: this micro-batch does not fit."""
        if not self._active or not self._fits(x, context):
            return None
        assert isinstance(context, VarlenAttention)
        if self._inputs is None:
            self._inputs = _Inputs.like(x, rope, self._rows, self._most_sequences)
        self._inputs.fill(x.detach(), rope, context.lengths)
        is_first = all(p.grad is None for p in self._parameters)
        pair = self._pair(is_first)
        if pair is None:
            return self._padded(x, self._inputs)
        return _Replay.apply(x, pair, self if is_first else None)

    def publish_gradients(self) -> None:
        """Make what the first micro-batch's graph wrote the parameters' gradients."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _fits(self, x: Tensor, context: AttentionContext) -> bool:
        if not isinstance(context, VarlenAttention) or not x.requires_grad:
            return False
        is_full = LEAST_FILLED * self._rows <= len(x) <= self._rows
        return is_full and len(context.lengths) <= self._most_sequences

    def _padded(self, x: Tensor, inputs: _Inputs) -> Tensor:
        """The blocks of x without graphs, with the graphs' padding."""
        self._eager += 1
        quantize_weights(x, self._groups)
        padded = F.pad(x, (0, 0, 0, self._rows - len(x)))
        return self._run(padded, inputs.rope, self._context())[: len(x)]

    def _pair(self, is_first: bool) -> _Pair | None:
        """The graphs of this kind of micro-batch, captured if that is due; None: run eagerly."""
        if self._failed or self._eager < _EAGER_BATCHES:
            return None
        if not is_first and not self._holds_gradients():
            return None
        return self._pairs.get(is_first) or self._captured(is_first)

    def _holds_gradients(self) -> bool:
        """Whether the gradients so far are in the memory that the graphs add to."""
        return bool(self._gradients) and all(
            p.grad is g for p, g in zip(self._parameters, self._gradients, strict=True)
        )

    def _captured(self, is_first: bool) -> _Pair | None:
        """The pair of graphs for this kind of micro-batch; None, with a warning, if it fails."""
        assert self._inputs is not None
        try:
            with nonfinite_blocks.ignored(self._inputs.x.device), _without_garbage():
                pair = self._capture_first() if is_first else self._capture_other()
        except RuntimeError as error:  # a library that waits for the GPU, or no memory
            self._give_up(error, is_first)
            return None
        self._pairs[is_first] = pair
        return pair

    def _capture_first(self) -> _Pair:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._forget_copies()
        quantize = requantizer(self._groups)
        pair = self._capture(quantize)
        self._made = cached_values(self._weights)
        self._gradients = [p.grad for p in self._parameters]
        self._drop_gradients()
        return pair

    def _capture_other(self) -> _Pair:
        restore(self._weights, self._made)
        return self._capture(None)

    def _give_up(self, error: RuntimeError, is_first: bool) -> None:
        """Go on without graphs, and without what the failed capture has made."""
        self._failed = True
        warnings.warn(f"training without CUDA graphs: {error.__context__ or error}", stacklevel=4)
        self._pairs, self._made, self._gradients = {}, [], []
        if is_first:
            self._drop_gradients()
        for weight in self._weights:  # their copies were recorded, not computed
            invalidate(weight)
        torch.cuda.synchronize()

    def _forget_copies(self) -> None:
        """Only FP8 codes of the weights stay; other copies of them are the graph's to make."""
        assert self._inputs is not None
        for weight in self._weights:
            invalidate(weight)
        quantize_weights(self._inputs.x, self._groups)

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _context(self) -> VarlenAttention:
        assert self._inputs is not None
        return VarlenAttention((), self._inputs.bounds, self._rows)

    def _capture(self, quantize: Callable[[], Tensor] | None) -> _Pair:
        assert self._inputs is not None
        x = self._inputs.x.detach().requires_grad_()
        grad_out = torch.zeros_like(x)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()):  # is current again after a failure
            with self._recording(forward):
                nonfinite = quantize() if quantize else None
                out = self._run(x, self._inputs.rope, self._context())
            with self._recording(backward):
                out.backward(grad_out)
        assert x.grad is not None
        return _Pair(forward, backward, quantize, nonfinite, out.detach(), grad_out, x.grad)

    def _recording(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        # Other threads, such as that of a background save, may wait for the GPU meanwhile.
        return torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )


def graphs_are_tested_on(device: torch.device) -> bool:
    """Whether graphs have been tested with what this device computes with."""
    return missing_block_scaling(device) is None and flash_attention_4() is not None


@contextmanager
def _without_garbage() -> Iterator[None]:
    """No object dies by garbage collection inside: freeing a graph or event ends a capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Replay(torch.autograd.Function):
    """(x, pair, graphs whose gradients are new or None) -> states after the blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pair: _Pair, graphs: BlockGraphs | None) -> Tensor:
        ctx.pair, ctx.graphs, ctx.rows = pair, graphs, len(x)
        pair.forward.replay()
        if pair.nonfinite is not None:
            nonfinite_blocks.add_count(pair.nonfinite)
        return pair.out[: len(x)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        pair, rows = ctx.pair, ctx.rows
        pair.grad_out[:rows].copy_(grad)
        pair.grad_out[rows:].zero_()
        pair.backward.replay()
        if ctx.graphs is not None:
            ctx.graphs.publish_gradients()
        return pair.grad_x[:rows], None, None
