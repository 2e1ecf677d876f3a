"""Continuous batching: which requests run in a step, and which pages of the KV cache they use.

The way of a request:

1. `submit` appends it to `waiting`, a queue: first come, first served.
2. `step` starts one decode pass over all running sequences, then admits requests from the head of
   the queue while slots and pages are free and starts one pass over their prompts. A long prompt is
   computed in chunks over several steps. Pages that hold the beginning of a prompt are shared.
3. Each row of logits gives one token, sampled with its own request's parameters (`sampling.py`).
   On a GPU the next step is started before this one's tokens are read.
4. A sequence that has ended becomes a `Completion`; its slot and pages serve the next.
5. When no page is free for the next token of a running sequence, the sequence that was admitted
   last is preempted: it waits at the head of the queue and computes its keys again later. Its
   tokens stay, and those to come are the same.

The cache takes at most `cache_bytes`, and no more than the unfinished requests need. It is freed
with the last request, unless `keep_cache` holds it at its full size for the next ones.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from infir2.engines.kv_cache import KvCache, NewTokens, page_bytes
from infir2.engines.pages import PagePool
from infir2.engines.response_text import Decode as DecodeText
from infir2.engines.response_text import ResponseText
from infir2.engines.runner import Decode, Runner, Sampled, SamplingRows
from infir2.engines.sampling import uniforms
from infir2.engines.types import (
    CacheTooSmallError,
    Completion,
    Request,
    Tokens,
    TopLogprobs,
    check_request,
)
from infir2.model import Decoder


@dataclass(eq=False)
class Running:
    """A request that occupies a slot, and its response so far.

    Attributes:
        request: what to generate.
        text: of the response, if the request has stop texts.
        token_ids: the response, as far as the host knows it.
        logprobs: one per token.
        top_logprobs: one per token if the request asks for them.
        slot: index of the sequence in the runner; -1 while it waits.
        pages: of the cache.
        num_cached: tokens whose keys are in the cache, or will be after the passes that started.
        num_started: response tokens whose passes started.
        num_shown: response tokens that `show` has returned.
    """

    request: Request
    text: ResponseText | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_started: int = 0
    num_shown: int = 0

    @property
    def known_tokens(self) -> list[int]:
        """Prompt and response."""
        return [*self.request.token_ids, *self.token_ids]

    @property
    def stopped(self) -> bool:
        if self.text is not None and self.text.stopped:
            return True
        return self.token_ids[-1:] != [] and self.token_ids[-1] in self.request.params.stop_ids

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.token_ids) >= self.request.params.max_tokens

    def append(self, token_id: int, logprob: float, top: TopLogprobs) -> None:
        """Add a token that was sampled."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if count := self.request.params.top_logprobs:
            self.top_logprobs.append(top[:count])
        if self.text is not None:
            self.text.add(token_id)

    def show(self) -> Tokens:
        """The tokens since the last call."""
        start, self.num_shown = self.num_shown, len(self.token_ids)
        return Tokens(self.token_ids[start:], self.logprobs[start:], self.top_logprobs[start:])

    def completion(self, policy_version: int) -> Completion:
        return Completion(
            self.request.id,
            self.token_ids,
            np.array(self.logprobs, dtype=np.float32),
            "stop" if self.stopped else "length",
            policy_version,
            self.top_logprobs,
        )


@dataclass(frozen=True)
class _Started:
    """A pass whose tokens have not been read yet."""

    sequences: list[Running]
    sampled: Sampled


class Scheduler:
    """Runs at most `max_running_requests` requests at a time, within `cache_bytes`; others wait.

    Example: after `scheduler.submit(request)`, call `scheduler.step(policy_version)` while
    `scheduler.num_unfinished` is not 0.
    """

    def __init__(
        self,
        model: Decoder,
        runner: Runner,
        max_running_requests: int,
        cache_bytes: int,
        keep_cache: bool = False,
        decode: DecodeText | None = None,
    ) -> None:
        self._model, self._runner, self._decode = model, runner, decode
        self._max_running, self._keep_cache = max_running_requests, keep_cache
        one_page = page_bytes(model.config, runner.page_size, model.compute_dtype)
        self._max_pages = cache_bytes // one_page
        self._cache_bytes, self._page_bytes = cache_bytes, one_page
        self._waiting: deque[Running] = deque()
        self._prefilling: list[Running] = []  # at most one: a prompt that is computed in chunks
        self._running: list[Running] = []  # in the order of their admission
        self._unfinished: dict[str, Running] = {}
        self._free_slots = list(range(max_running_requests))
        self._started: deque[list[_Started]] = deque()  # per step
        self._cache: KvCache | None = None
        self._pool = PagePool(0, runner.page_size)
        self._longest = 0  # tokens of the longest unfinished request

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    @property
    def num_running(self) -> int:
        """Requests that have a slot; the other unfinished ones wait."""
        return len(self._running) + len(self._prefilling)

    @property
    def used_cache_tokens(self) -> int:
        """Tokens of the pages that running requests use."""
        return (self._pool.num_pages - self._pool.num_free) * self._runner.page_size

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds when it has its full size."""
        return self._max_pages * self._runner.page_size

    def submit(self, request: Request) -> None:
        """As `Engine.submit`; also CacheTooSmallError."""
        check_request(request, self._unfinished)
        if (needed := self._pool.pages_for(request.max_total_tokens)) > self._max_pages:
            raise CacheTooSmallError(
                f"request {request.id}: {request.max_total_tokens} tokens need "
                f"{needed * self._page_bytes / 2**30:.2f} GiB of KV cache, and the engine has "
                f"{self._cache_bytes / 2**30:.2f} GiB; allow fewer tokens or a larger cache "
                "(rollout.cache_gib)"
            )
        text, stop_texts = None, request.params.stop_texts
        if stop_texts:
            if self._decode is None:
                raise ValueError(f"request {request.id}: an engine without tokenizer stops at ids")
            text = ResponseText(self._decode, stop_texts)
        self._unfinished[request.id] = Running(request, text)
        self._waiting.append(self._unfinished[request.id])
        self._longest = max(self._longest, request.max_total_tokens)

    @torch.inference_mode()
    def step(self, policy_version: int) -> list[Completion]:
        """Start passes for the running requests and return what finished in earlier ones.

        `policy_version` is recorded in the completions.
        """
        if not self._unfinished:
            return []
        cache = self._reserve_cache()
        finished = self._make_room()
        started = [*self._start_decode(cache), *self._start_prefill(cache)]
        self._started.append(started)
        # A step that started nothing has nothing to run beside: read what is left.
        finished += self._read(self._runner.passes_ahead if started else 0)
        self._release({sequence.request.id for sequence in finished})
        return [sequence.completion(policy_version) for sequence in finished]

    def new_tokens(self) -> dict[str, Tokens]:
        """As `OffersProgress`."""
        running = (s for s in self._running if s.request.streams)
        return {s.request.id: s.show() for s in running if len(s.token_ids) > s.num_shown}

    def cancel(self, request_ids: Collection[str]) -> None:
        """As `Engine.cancel`; frees the slots and pages of running requests."""
        canceled = self._unfinished.keys() & set(request_ids)
        if canceled:
            self._waiting = deque(s for s in self._waiting if s.request.id not in canceled)
            for sequence in [*self._prefilling, *self._running]:
                if sequence.request.id in canceled:
                    self._retire(sequence)
            self._release(canceled)
            left = self._unfinished.values()
            self._longest = max((s.request.max_total_tokens for s in left), default=0)

    def cancel_all(self) -> None:
        self.cancel(set(self._unfinished))

    def forget_weights(self) -> None:
        """Call when the weights change, with no request unfinished: cached keys are void."""
        assert not self.num_unfinished, "finish or cancel all requests before new weights"
        self._started.clear()
        self._pool.forget_all()
        self._runner.reset()

    # Memory

    def _reserve_cache(self) -> KvCache:
        """The cache, with pages for every unfinished request up to the bounds."""
        slots = min(self._max_running, self.num_unfinished)
        pages = min(self._max_pages, slots * self._pool.pages_for(self._longest))
        if self._keep_cache:
            pages = self._max_pages
        if self._cache is None:
            model, device = self._model, self._model.head_weight.device
            size, dtype = self._runner.page_size, model.compute_dtype
            self._runner.reset()
            self._cache = KvCache(model.config, pages, size, dtype, device)
            self._pool = PagePool(pages, size)
        elif pages > self._pool.num_pages:
            # Generously, for a growth copies the cache.
            pages = min(self._max_pages, max(pages, 2 * self._pool.num_pages))
            self._runner.reset()
            self._cache.grow(pages)
            self._pool.grow(pages)
        return self._cache

    def _make_room(self) -> list[Running]:
        """A page for the next token of each running sequence; returns what finished meanwhile."""
        finished = list[Running]()
        for sequence in list(self._running):
            while sequence.slot >= 0 and self._needs_page(sequence):
                if self._pool.num_free:
                    sequence.pages += self._pool.allocate(1)
                elif self._started:
                    finished += self._read(0)  # the newest tokens, some of which may be the last
                else:
                    self._preempt([*self._running, *self._prefilling][-1])
        return finished

    def _needs_page(self, sequence: Running) -> bool:
        full = len(sequence.pages) * self._pool.page_size
        return _decodes(sequence) and sequence.num_cached >= full

    def _preempt(self, sequence: Running) -> None:
        """Back to the head of the queue, without pages."""
        self._retire(sequence)
        sequence.num_cached, sequence.num_started = 0, len(sequence.token_ids)
        self._waiting.appendleft(sequence)

    def _retire(self, sequence: Running) -> None:
        """Take a sequence out of those that run; passes that started for it are not read."""
        for running in (self._prefilling, self._running):
            if sequence in running:
                running.remove(sequence)
        self._pool.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], -1

    def _release(self, ids: Collection[str]) -> None:
        """Forget requests; with the last one the cache goes."""
        for name in ids:
            del self._unfinished[name]
        if not self._unfinished:
            self._longest = 0
            if not self._keep_cache:
                self._started.clear()
                self._cache, self._pool = None, PagePool(0, self._runner.page_size)

    # Passes

    def _start_decode(self, cache: KvCache) -> list[_Started]:
        sequences = [sequence for sequence in self._running if _decodes(sequence)]
        if not sequences:
            return []
        how = _sampling_rows(sequences)
        new = [Decode(s.slot, s.num_cached, s.pages) for s in sequences]
        started = _Started(sequences, self._runner.decode(cache, new, how))
        for sequence in sequences:
            sequence.num_cached += 1
            sequence.num_started += 1
        return [started]

    def _start_prefill(self, cache: KvCache) -> list[_Started]:
        """One pass over the next chunk of a long prompt and the prompts of admitted requests."""
        new, sampled = list[NewTokens](), list[int]()
        sequences, budget = list[Running](), self._runner.prefill_tokens
        while budget and (sequence := self._next_to_prefill()):
            tokens = sequence.known_tokens
            start, end = sequence.num_cached, min(len(tokens), sequence.num_cached + budget)
            new.append(NewTokens(tokens[start:end], start, sequence.pages))
            self._pool.index(sequence.pages, tokens[:end])
            sequence.num_cached, budget = end, budget - (end - start)
            if end == len(tokens):
                sampled.append(len(new) - 1)
                sequences.append(sequence)
                self._prefilling.remove(sequence)
        if not new:
            return []
        how = _sampling_rows(sequences)
        for sequence in sequences:
            sequence.num_started += 1
        self._running += sequences
        return [_Started(sequences, self._runner.prefill(cache, new, sampled, how))]

    def _next_to_prefill(self) -> Running | None:
        """The sequence in `prefilling`, or else the head of the queue if it can be admitted."""
        if self._prefilling:
            return self._prefilling[0]
        if not self._waiting or not self._free_slots:
            return None
        sequence = self._waiting[0]
        tokens = sequence.known_tokens
        shared = self._pool.share_prefix(tokens)
        missing = self._pool.pages_for(len(tokens)) - len(shared)
        # A page is left for the sequences that run, or the next step would preempt this one.
        if missing + bool(self._running) > self._pool.num_free:
            self._pool.release(shared)
            return None
        self._waiting.popleft()
        sequence.pages = shared + self._pool.allocate(missing)
        sequence.num_cached = len(shared) * self._pool.page_size
        sequence.slot = self._free_slots.pop()
        self._prefilling.append(sequence)
        return sequence

    def _read(self, passes_ahead: int) -> list[Running]:
        """Read the tokens of all steps but the newest `passes_ahead`; returns what finished."""
        finished = list[Running]()
        while len(self._started) > passes_ahead:
            for started in self._started.popleft():
                values = zip(started.sequences, *started.sampled.wait(), strict=True)
                for sequence, token_id, logprob, top in values:
                    if sequence.slot < 0:
                        continue  # canceled, or finished in an earlier pass
                    sequence.append(token_id, logprob, top)
                    if sequence.finished:
                        self._pool.index(sequence.pages, sequence.known_tokens[:-1])
                        self._retire(sequence)
                        finished.append(sequence)
        return finished


def _decodes(sequence: Running) -> bool:
    return sequence.num_started < sequence.request.params.max_tokens


def _sampling_rows(sequences: Sequence[Running]) -> SamplingRows:
    """How to sample the next token of each sequence."""
    params = [sequence.request.params for sequence in sequences]
    keys = np.array([sequence.request.key for sequence in sequences], dtype=np.uint64)
    counters = np.array([sequence.num_started for sequence in sequences], dtype=np.int64)
    return SamplingRows(
        [sequence.slot for sequence in sequences],
        np.array([each.temperature for each in params], dtype=np.float64),
        np.array([each.top_p for each in params], dtype=np.float64),
        uniforms(keys, counters),
        max((each.top_logprobs for each in params), default=0),
    )
