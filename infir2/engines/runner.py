"""Runs forward passes for the scheduler and samples their tokens: the interface, and the CPU's.

A running request has a slot. A runner remembers the newest token of each slot, so that the next
pass can start before the host knows it (`graph_runner.py` does that on a GPU).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from infir2.engines.kv_cache import KvCache, NewTokens, cached_hidden_states
from infir2.engines.sampling import most_likely, sample
from infir2.engines.types import TopLogprobs
from infir2.model import Decoder
from infir2.numerics import head_logits


@dataclass(frozen=True)
class SamplingRows:
    """How to sample a token for each of n sequences; arrays [n], float64 but for the slots.

    Attributes:
        slots: where to remember the tokens.
        temperatures: 0 is greedy.
        top_ps: probability mass to sample from.
        draws: uniform numbers in [0, 1).
        num_top: most likely tokens to report beside each token; 0 for none.
    """

    slots: Sequence[int]
    temperatures: np.ndarray
    top_ps: np.ndarray
    draws: np.ndarray
    num_top: int = 0


@dataclass(frozen=True)
class Decode:
    """A sequence whose newest token, remembered by the runner, is the next pass's input.

    Attributes:
        slot: where the runner remembers the token.
        position: of that token.
        pages: the sequence's pages, that of `position` included.
    """

    slot: int
    position: int
    pages: Sequence[int]


class Sampled(Protocol):
    """The tokens of one pass."""

    def wait(self) -> tuple[list[int], list[float], list[TopLogprobs]]:
        """Per sampled sequence: token id, its log-probability, and the `num_top` most likely."""
        ...


class Runner(Protocol):
    """Runs passes in the order of the calls.

    Attributes:
        page_size: tokens of a page of the cache.
        passes_ahead: how many steps the scheduler should start before it waits for the first.
        prefill_tokens: most prompt tokens of a pass, which bounds the memory of activations.
    """

    page_size: int
    passes_ahead: int
    prefill_tokens: int

    def prefill(
        self, cache: KvCache, new: Sequence[NewTokens], sampled: Sequence[int], how: SamplingRows
    ) -> Sampled:
        """Store the new tokens of sequences; sample a token after those numbered in `sampled`."""
        ...

    def decode(self, cache: KvCache, new: Sequence[Decode], how: SamplingRows) -> Sampled:
        """Store the newest token of each sequence, and sample the next."""
        ...

    def reset(self) -> None:
        """Forget what was derived from the cache or the weights: one of them is replaced."""
        ...


@dataclass(frozen=True)
class _Known:
    token_ids: list[int]
    logprobs: list[float]
    top: list[TopLogprobs]

    def wait(self) -> tuple[list[int], list[float], list[TopLogprobs]]:
        return self.token_ids, self.logprobs, self.top


def _top(logits: Tensor, how: SamplingRows) -> list[TopLogprobs]:
    if not how.num_top:
        return [[] for _ in how.slots]
    temperatures = np.where(how.temperatures == 0, 1.0, how.temperatures)
    token_ids, logprobs = most_likely(
        logits.double(), torch.from_numpy(temperatures).to(logits.device), how.num_top
    )
    return pair_top(token_ids, logprobs)


def pair_top(token_ids: Tensor, logprobs: Tensor) -> list[TopLogprobs]:
    """What two tensors [n, k] on the host say of each sequence."""
    rows = zip(token_ids.tolist(), logprobs.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


class ReferenceRunner:
    """The `Runner` of a CPU: every pass is done when it returns."""

    page_size, passes_ahead, prefill_tokens = 16, 0, 4096

    def __init__(self, model: Decoder, num_slots: int) -> None:
        self._model = model
        self._newest = np.zeros(num_slots, dtype=np.int64)

    def prefill(
        self, cache: KvCache, new: Sequence[NewTokens], sampled: Sequence[int], how: SamplingRows
    ) -> Sampled:
        """As `Runner`."""
        hidden, last = cached_hidden_states(self._model, cache, new)
        if not sampled:
            return _Known([], [], [])
        rows = hidden[last[list(sampled)]]
        logits = head_logits(rows, self._model.head_weight)
        token_ids, logprobs = sample(logits, how.temperatures, how.top_ps, how.draws)
        self._newest[list(how.slots)] = token_ids.cpu().numpy()
        return _Known(token_ids.tolist(), logprobs.tolist(), _top(logits, how))

    def decode(self, cache: KvCache, new: Sequence[Decode], how: SamplingRows) -> Sampled:
        """As `Runner`."""
        tokens = [NewTokens([int(self._newest[d.slot])], d.position, d.pages) for d in new]
        return self.prefill(cache, tokens, range(len(tokens)), how)

    def reset(self) -> None:
        """As `Runner`: nothing is derived."""
