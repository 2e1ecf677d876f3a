"""The `Runner` of a GPU: it samples on the device, and a decode pass is one CUDA graph.

A decode pass of a 1.5B model takes 300 launches; a host needs longer for them than the GPU for the
work. So the pass is captured once per batch size (rounded up, the rest are padding), and a step is
two copies to the device, one launch and one copy back. The newest token of each sequence stays on
the device: the scheduler starts a step before it reads the tokens of the one before.

A graph holds addresses. New weights or another cache mean new graphs (`reset`), which costs about
as much as one pass without them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from infir2.engines.kv_cache import KvCache, NewTokens, check_pages, pack
from infir2.engines.paged_attention_cuda import (
    PagedAttention,
    plan_paged,
    reads_pages,
    to_device,
)
from infir2.engines.runner import Decode, Sampled, SamplingRows, pair_top
from infir2.engines.sampling import most_likely, sample_on_device
from infir2.engines.types import MAX_TOP_LOGPROBS, TopLogprobs
from infir2.model import Decoder
from infir2.numerics import head_logits

MIN_BATCH, MIN_PAGES = 8, 4


class GraphRunner:
    """Decodes in CUDA graphs where attention reads pages, else without."""

    page_size, passes_ahead, prefill_tokens = 128, 1, 8192

    def __init__(self, model: Decoder, num_slots: int) -> None:
        self._model, self._device = model, model.head_weight.device
        # One slot more, for the rows of padding.
        self._newest = torch.zeros(num_slots + 1, dtype=torch.int64, device=self._device)
        self._graphs: dict[tuple[int, int, _Extras], _DecodeGraph] = {}
        self._memory: Any = None  # shared by the graphs: one runs at a time

    def prefill(
        self, cache: KvCache, new: Sequence[NewTokens], sampled: Sequence[int], how: SamplingRows
    ) -> Sampled:
        """As `Runner`."""
        check_pages(cache, new)
        stream = pack(new, cache.page_size)
        hidden = self._model.hidden_states(
            to_device(stream.token_ids, self._device),
            to_device(stream.positions, self._device),
            stream.cu_seqlens,
            plan_paged(cache, new, stream),
        )
        last = stream.cu_seqlens[1:][list(sampled)] - 1
        slots = to_device(np.array(how.slots, dtype=np.int64), self._device)
        options, extras = _options(how)
        rows = hidden[to_device(last, self._device)]
        return _Copied(
            self._sample(rows, slots, to_device(options, self._device), extras), len(last)
        )

    def decode(self, cache: KvCache, new: Sequence[Decode], how: SamplingRows) -> Sampled:
        """As `Runner`."""
        batch, width = _batch_size(len(new)), _width(new)
        indices = np.full((batch, 2 + width), cache.padding_page, dtype=np.int32)
        indices[:, :2] = len(self._newest) - 1, 0
        for row, each in zip(indices, new, strict=False):
            row[:2] = each.slot, each.position
            row[2 : 2 + len(each.pages)] = each.pages
        options, extras = _options(how, batch)
        inputs = to_device(indices, self._device), to_device(options, self._device)
        if not reads_pages():
            token_ids = self._newest[inputs[0][: len(new), 0].long()].tolist()
            tokens = [
                NewTokens([token_id], each.position, each.pages)
                for token_id, each in zip(token_ids, new, strict=True)
            ]
            return self.prefill(cache, tokens, range(len(new)), how)
        key = (batch, width, extras)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(cache, indices, options, extras)
        graph.indices.copy_(inputs[0])
        graph.options.copy_(inputs[1])
        graph.graph.replay()
        return _Copied(graph.output, len(new))

    def reset(self) -> None:
        """As `Runner`."""
        if self._graphs:
            torch.cuda.synchronize(self._device)  # a graph may still run
        self._graphs, self._memory = {}, None

    def _decode_pass(
        self, cache: KvCache, indices: Tensor, options: Tensor, extras: "_Extras"
    ) -> Tensor:
        """One decode pass, without waiting for the GPU. Returns as `_sample`."""
        batch, size = indices.shape[0], cache.page_size
        slots, positions = indices[:, 0].long(), indices[:, 1].long()
        pages = indices[:, 2:].contiguous()
        row = pages.gather(1, (positions // size)[:, None]).squeeze(1).long()
        bounds = np.arange(batch + 1)
        context = PagedAttention(
            cache,
            row * size + positions % size,
            torch.arange(batch + 1, dtype=torch.int32, device=self._device),
            pages,
            (positions + 1).int(),
            max_new=1,
        )
        hidden = self._model.hidden_states(self._newest[slots], positions, bounds, context)
        return self._sample(hidden, slots, options, extras)

    def _sample(self, hidden: Tensor, slots: Tensor, options: Tensor, extras: "_Extras") -> Tensor:
        """Sample after each state [n, D] and remember the tokens.

        Returns int32 [2, n]: token ids, and the bits of their FP32 log-probabilities. With the most
        likely tokens [2 + 2 k, n]: then their ids, then their log-probabilities.
        """
        logits = head_logits(hidden, self._model.head_weight)
        inverse, top_ps, draws = options.unbind()
        token_ids, logprobs = sample_on_device(logits, inverse, top_ps, draws, extras.truncate)
        self._newest.index_copy_(0, slots, token_ids)
        output = torch.stack([token_ids.int(), logprobs.view(torch.int32)])
        if not extras.top:
            return output
        temperatures = torch.where(inverse == 0, 1.0, 1 / inverse)
        top_ids, values = most_likely(logits, temperatures, MAX_TOP_LOGPROBS)
        return torch.cat([output, top_ids.int().T, values.view(torch.int32).T])

    def _capture(
        self, cache: KvCache, indices: np.ndarray, options: np.ndarray, extras: "_Extras"
    ) -> "_DecodeGraph":
        static = (
            torch.from_numpy(indices).to(self._device),
            torch.from_numpy(options).to(self._device),
        )
        # Padding only: the passes that warm up must not move any sequence on.
        static[0][:, 0], static[0][:, 1] = len(self._newest) - 1, 0
        static[0][:, 2:] = cache.padding_page
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, measures GEMMs, fills caches
                self._decode_pass(cache, *static, extras)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            output = self._decode_pass(cache, *static, extras)
        self._memory = graph.pool()
        return _DecodeGraph(graph, *static, output)


class _Extras(NamedTuple):
    """What a pass does only if a request asks for it: graphs with and without are different ones.

    Attributes:
        truncate: a top_p is below 1.
        top: report the most likely tokens.
    """

    truncate: bool
    top: bool


@dataclass(frozen=True)
class _DecodeGraph:
    """A captured pass over a batch of b sequences.

    Attributes:
        graph: reads `indices` and `options`, writes `output`.
        indices: slot, position and P pages of each sequence, int32 [b, 2 + P].
        options: see `_options`.
        output: see `GraphRunner._sample`.
    """

    graph: torch.cuda.CUDAGraph
    indices: Tensor
    options: Tensor
    output: Tensor


class _Copied:
    """The first `count` tokens of a pass, on their way to the host."""

    def __init__(self, output: Tensor, count: int) -> None:
        self._host = output[:, :count].to("cpu", non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def wait(self) -> tuple[list[int], list[float], list[TopLogprobs]]:
        """As `Sampled`."""
        self._done.synchronize()
        return unpack_sampled(self._host)


def unpack_sampled(output: Tensor) -> tuple[list[int], list[float], list[TopLogprobs]]:
    """What `GraphRunner._sample` returns, on the host."""
    count = len(output) // 2 - 1
    logprobs = output.view(torch.float32)
    top: list[TopLogprobs] = [[] for _ in range(output.shape[1])]
    if count:
        top = pair_top(output[2 : 2 + count].T, logprobs[2 + count :].T)
    return output[0].tolist(), logprobs[1].tolist(), top


def _options(how: SamplingRows, batch: int = 0) -> tuple[np.ndarray, _Extras]:
    """1 / temperature (0: greedy), top_p and draw of each sequence, float32 [3, n].

    With `batch`, padded to that many columns.
    """
    count = len(how.slots)
    options = np.ones((3, max(batch, count)), dtype=np.float32)
    greedy = how.temperatures == 0
    inverse = np.where(greedy, 0.0, 1.0 / np.where(greedy, 1.0, how.temperatures))
    options[:, :count] = inverse, how.top_ps, how.draws
    return options, _Extras(bool((how.top_ps < 1).any()), how.num_top > 0)


def _batch_size(count: int) -> int:
    """`count` rounded up to 1, 1.25, 1.5 or 1.75 times a power of two, at least MIN_BATCH."""
    step = max(MIN_BATCH, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step


def _width(new: Sequence[Decode]) -> int:
    """Columns of the page table: a power of two, so that graphs serve for a while."""
    return max(MIN_PAGES, 1 << (max(len(each.pages) for each in new) - 1).bit_length())
