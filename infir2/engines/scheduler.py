"""Continuous batching: which requests run in a step, and in which slot of the KV cache.

The way of a request:

1. `submit` appends it to `waiting`, a queue: first come, first served.
2. `step` admits requests from the head of the queue while slots are free, prefills their prompts in
   one forward pass, and decodes one token for each request that was running before, in a second
   pass.
3. Each row of logits gives one token, sampled with its own request's parameters (`sampling.py`).
4. A sequence that has ended becomes a `Completion` and frees its slot, which the next step's
   admission fills.

The cache has a slot per running request, each as long as the longest request needs (prompt +
max_tokens). It is made for the requests at hand, grows when a longer request or more requests
arrive, and is freed when none is left, so a closed batch of requests never pays for more than it
uses. There is no preemption: an admitted request runs to its end.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from infir2.engines.kv_cache import KvCache, cached_hidden_states
from infir2.engines.sampling import sample, uniforms
from infir2.engines.types import Completion, Request, check_request
from infir2.model import Decoder
from infir2.numerics import head_logits

PREFILL_TOKENS = 4096  # prompt tokens in one forward pass, which bounds the memory of activations
GROWTH_TOKENS = 256  # a cache in use grows to multiples of this, so that it is not copied often


@dataclass(eq=False)
class Running:
    """A request that occupies a slot of the cache, and its response so far."""

    request: Request
    slot: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def uncached_tokens(self) -> list[int]:
        """Tokens that the cache does not hold yet: the prompt at first, then the newest token."""
        return self.token_ids[-1:] or list(self.request.token_ids)

    @property
    def last_position(self) -> int:
        """Position of the newest token."""
        return len(self.request.token_ids) + len(self.token_ids) - 1

    @property
    def stopped(self) -> bool:
        return self.token_ids[-1] in self.request.params.stop_ids

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.token_ids) >= self.request.params.max_tokens

    def completion(self, policy_version: int) -> Completion:
        return Completion(
            self.request.id,
            self.token_ids,
            np.array(self.logprobs, dtype=np.float32),
            "stop" if self.stopped else "length",
            policy_version,
        )


class Scheduler:
    """Runs at most `max_running_requests` requests at a time on `model`, the others wait.

    Example: after `scheduler.submit(request)`, call `scheduler.step(policy_version)` while
    `scheduler.num_unfinished` is not 0.
    """

    def __init__(self, model: Decoder, max_running_requests: int) -> None:
        self._model, self._max_running = model, max_running_requests
        self._waiting: deque[Request] = deque()
        self._running: list[Running] = []
        self._unfinished_ids: set[str] = set()
        self._cache: KvCache | None = None
        self._free_slots: list[int] = []
        self._tokens_per_slot = 0  # what the longest unfinished request needs

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished_ids)

    def submit(self, request: Request) -> None:
        """As `Engine.submit`."""
        check_request(request, self._unfinished_ids)
        self._unfinished_ids.add(request.id)
        self._waiting.append(request)
        self._tokens_per_slot = max(self._tokens_per_slot, request.max_total_tokens)

    @torch.inference_mode()
    def step(self, policy_version: int) -> list[Completion]:
        """One token for each running request; `policy_version` is recorded in the completions."""
        if not self._unfinished_ids:
            return []
        cache = self._reserve_cache()
        admitted = self._admit()
        for sequences in (admitted, self._running):
            if sequences:
                _append_tokens(self._model, cache, sequences)
        self._running += admitted
        finished = [sequence for sequence in self._running if sequence.finished]
        self._release({sequence.request.id for sequence in finished})
        return [sequence.completion(policy_version) for sequence in finished]

    def cancel(self, request_ids: Collection[str]) -> None:
        """As `Engine.cancel`; frees the slots of running requests."""
        canceled = self._unfinished_ids.intersection(request_ids)
        if canceled:
            self._waiting = deque(r for r in self._waiting if r.id not in canceled)
            self._release(canceled)
            unfinished = [*self._waiting, *(sequence.request for sequence in self._running)]
            self._tokens_per_slot = max((r.max_total_tokens for r in unfinished), default=0)

    def cancel_all(self) -> None:
        self.cancel(set(self._unfinished_ids))

    def _admit(self) -> list[Running]:
        """Move requests from the queue into free slots.

        Their prompts have at most PREFILL_TOKENS tokens together; a longer prompt is admitted by
        itself.
        """
        admitted, tokens = list[Running](), 0
        while self._waiting and self._free_slots:
            tokens += len(self._waiting[0].token_ids)
            if admitted and tokens > PREFILL_TOKENS:
                break
            admitted.append(Running(self._waiting.popleft(), self._free_slots.pop()))
        return admitted

    def _release(self, ids: Collection[str]) -> None:
        """Forget requests and free their slots; with the last request the cache goes."""
        self._unfinished_ids.difference_update(ids)
        self._free_slots += [s.slot for s in self._running if s.request.id in ids]
        self._running = [s for s in self._running if s.request.id not in ids]
        if not self._unfinished_ids:
            self._cache, self._free_slots, self._tokens_per_slot = None, [], 0

    def _reserve_cache(self) -> KvCache:
        """The cache, large enough for every unfinished request up to the bound of running ones."""
        slots, tokens = min(self._max_running, self.num_unfinished), self._tokens_per_slot
        cache = self._cache
        if cache and cache.num_slots >= slots and cache.max_tokens >= tokens:
            return cache
        if cache and self._running:
            self._grow(cache, slots, tokens)
            return cache
        self._cache = cache = None  # free the old one first
        model, device = self._model, self._model.head_weight.device
        self._cache = KvCache(model.config, slots, tokens, model.compute_dtype, device)
        self._free_slots = list(range(slots))
        return self._cache

    def _grow(self, cache: KvCache, slots: int, tokens: int) -> None:
        """Enlarge a cache in use, generously: a growth copies it."""
        old_slots = cache.num_slots
        if slots > old_slots:
            slots = min(self._max_running, max(slots, 2 * old_slots))
        if tokens > cache.max_tokens:
            tokens = -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS
        cache.grow(max(slots, old_slots), max(tokens, cache.max_tokens))
        self._free_slots += range(old_slots, cache.num_slots)


def _append_tokens(model: Decoder, cache: KvCache, sequences: list[Running]) -> None:
    """Sample the next token of each sequence, with one forward pass."""
    logits = _next_logits(model, cache, sequences)
    params = [sequence.request.params for sequence in sequences]
    keys = np.array([sequence.request.key for sequence in sequences], dtype=np.uint64)
    counters = np.array([len(sequence.token_ids) for sequence in sequences])
    token_ids, logprobs = sample(
        logits,
        np.array([each.temperature for each in params], dtype=np.float64),
        np.array([each.top_p for each in params], dtype=np.float64),
        uniforms(keys, counters),
    )
    for sequence, token_id, logprob in zip(
        sequences, token_ids.tolist(), logprobs.tolist(), strict=True
    ):
        sequence.token_ids.append(token_id)
        sequence.logprobs.append(logprob)


def _next_logits(model: Decoder, cache: KvCache, sequences: list[Running]) -> Tensor:
    """FP32 logits [len(sequences), V] after each sequence's last token."""
    new = [sequence.uncached_tokens for sequence in sequences]
    lengths = np.array([len(tokens) for tokens in new])
    ends = np.cumsum(lengths)
    positions = np.concatenate(
        [
            np.arange(sequence.last_position - length + 1, sequence.last_position + 1)
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
    )
    device = model.head_weight.device
    hidden = cached_hidden_states(
        model,
        cache,
        torch.tensor([sequence.slot for sequence in sequences], device=device),
        torch.tensor([token for tokens in new for token in tokens], device=device),
        torch.from_numpy(positions).to(device),
        torch.from_numpy(np.concatenate([[0], ends])).to(device, torch.int32),
    )
    return head_logits(hidden[torch.from_numpy(ends - 1).to(device)], model.head_weight)
