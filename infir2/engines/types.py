"""Interfaces of an engine: a request goes in, a completion comes out, new weights replace old ones.

Everything is token ids: sampled text is never tokenized again. `infir2/engines/generate.py` has the
functions that most callers want; a server calls `submit` and `step` itself.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from infir2.errors import ConfigError

MAX_TOP_LOGPROBS = 20
TopLogprobs = list[tuple[int, float]]  # token ids and log-probabilities, the most likely first


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one response.

    Example: `SamplingParams(temperature=1.0, max_tokens=96, stop_ids=(2,))`.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        max_tokens: the response ends after this many tokens, at least 1.
        stop_ids: the response ends with the first of these tokens, which belongs to it.
        top_p: sample from the smallest set of tokens with at least this probability; 1 keeps all.
        stop_texts: the response ends with the first token that completes one of them. It belongs to
            the response; the text before the stop text is what a client sees (`ResponseText`).
        top_logprobs: report as many of the most likely tokens at each position, at most
            MAX_TOP_LOGPROBS.
    """

    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    top_p: float = 1.0
    stop_texts: tuple[str, ...] = ()
    top_logprobs: int = 0


@dataclass(frozen=True)
class Request:
    """One response to generate.

    Example: `Request("p17/3", [5, 9, 2], params, key=sampling_key(1236, "p17", 3, 4))`.

    Attributes:
        id: unique among the unfinished requests of an engine.
        token_ids: the prompt, at least one token.
        params: how to sample.
        key: 64-bit seed of the request's randomness. With the same weights, prompt and params the
            response depends on nothing else: neither on the batch nor on when the request arrived.
        streams: the response is read with `OffersProgress` while it is generated.
    """

    id: str
    token_ids: Sequence[int]
    params: SamplingParams
    key: int
    streams: bool = False

    @property
    def max_total_tokens(self) -> int:
        """Length of the prompt and the longest response that `params` allows."""
        return len(self.token_ids) + self.params.max_tokens


@dataclass(frozen=True)
class Tokens:
    """A part of a response: its tokens, and what `Completion` says of each.

    Attributes:
        token_ids, top_logprobs: as in `Completion`.
        logprobs: one per token, float32 values.
    """

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs] = field(default_factory=list)

    def part(self, start: int, end: int | None = None) -> "Tokens":
        """The tokens from number `start` up to `end`."""
        which = slice(start, end)
        return Tokens(self.token_ids[which], self.logprobs[which], self.top_logprobs[which])

    def extend(self, later: "Tokens") -> None:
        """Add the part of the same response that follows."""
        self.token_ids.extend(later.token_ids)
        self.logprobs.extend(later.logprobs)
        self.top_logprobs.extend(later.top_logprobs)


@dataclass(frozen=True)
class Completion:
    """One generated response.

    Attributes:
        id: that of its request.
        token_ids: the response, with the stop token if there was one.
        rollout_logprobs: float32 [len(token_ids)], log-probability of each token at the sampling
            temperature (greedy: at temperature 1), before top-p truncation.
        finish: "stop" after a stop token or a stop text, "length" after `max_tokens`.
        policy_version: version of the weights that generated it, or its last tokens.
        top_logprobs: per token, the most likely ones at its position with their log-probabilities;
            empty unless the request asks for them.
        earlier: (policy version, number of tokens) of the beginnings that other versions generated,
            in order; only RL continues a response with newer weights (`continue_completion`).
        outside: [start, end) of tokens that an environment has written and not the policy (RL).
    """

    id: str
    token_ids: list[int]
    rollout_logprobs: np.ndarray
    finish: Literal["stop", "length"]
    policy_version: int
    top_logprobs: Sequence[TopLogprobs] = ()
    earlier: Sequence[tuple[int, int]] = ()
    outside: Sequence[tuple[int, int]] = ()

    @property
    def tokens(self) -> Tokens:
        """All of the response."""
        return Tokens(self.token_ids, self.rollout_logprobs.tolist(), list(self.top_logprobs))

    @property
    def oldest_version(self) -> int:
        """Version of the weights that generated the first token."""
        return self.earlier[0][0] if self.earlier else self.policy_version


class RequestFailedError(Exception):
    """An engine could not answer the request `id`; another attempt may succeed."""

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(message)
        self.id = request_id


class CacheTooSmallError(ConfigError, ValueError):
    """A request is longer than the whole KV cache: the user's to repair, wherever it shows."""

    reported_by_rank0 = False  # the ranks have requests of their own


class Engine(Protocol):
    """Generates. Requests may be submitted at any time and join those that are running.

    One thread drives an engine: it submits requests and calls `step` until none is unfinished.

    Attributes:
        policy_version: version of the weights that it generates with.
        shared_by_ranks: False: each rank of a run has an engine of its own. True: all ranks have
            the same engines behind this object, and only rank 0 may submit requests to them.
    """

    policy_version: int
    shared_by_ranks: bool

    @property
    def num_unfinished(self) -> int:
        """Requests that were submitted and have neither finished nor been canceled."""
        ...

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises ValueError for an empty prompt, `max_tokens` below 1, or the id of an unfinished
        request.
        """
        ...

    def step(self) -> list[Completion]:
        """Do a little work, at most about a second; return what finished in it, often nothing."""
        ...

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Drop unfinished requests, so that no `step` returns them; other ids are ignored."""
        ...


class WeightSink(Protocol):
    """Accepts new weights. Every rank of a run calls `update_weights` at the same point."""

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replace the weights by `weights`, given under their exported names (FP8 pairs stay FP8).

        No request may be unfinished: its cached keys and values are those of the old weights.
        """
        ...


class RolloutEngine(Engine, WeightSink, Protocol):
    """What RL needs of an engine."""


class OffersProgress(Protocol):
    """An engine that shows responses while they are generated, for a server's streams."""

    def new_tokens(self) -> dict[str, Tokens]:
        """What the unfinished requests that stream have got since the last call, by id."""
        ...


class ServedEngine(Engine, OffersProgress, Protocol):
    """What a server needs of an engine. `step` may raise RequestFailedError; the others go on."""

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt with its response, as far as the engine bounds it."""
        ...

    def gauges(self) -> dict[str, int]:
        """What it does now, by name: "requests_running", and what else it knows."""
        ...


@runtime_checkable
class OffersDigest(Protocol):
    """An engine that can prove which weights it holds."""

    def weights_digest(self) -> dict[str, str]:
        """SHA-256 of each weight's bytes, by exported name."""
        ...


class UpdatableEngine(ServedEngine, OffersDigest, Protocol):
    """What the trainer's routes of a server need of an engine.

    Attributes:
        cache_tokens: that fit its KV cache.
        max_running_requests: it generates as many at a time.
        scale_format: of the model's FP8 layers; None without such layers.
    """

    cache_tokens: int
    max_running_requests: int
    scale_format: str | None

    def update_from_directory(self, directory: Path, policy_version: int) -> None:
        """Replace the weights by those of an exported Hugging Face directory.

        No request may be unfinished. Raises CheckpointError, and keeps the old weights, for another
        model's directory.
        """
        ...


@runtime_checkable
class OffersMetrics(Protocol):
    """An engine that counts what happens in it."""

    def metrics(self) -> dict[str, float]:
        """What has happened since the last call, by name; {} but on rank 0."""
        ...


def check_request(request: Request, unfinished_ids: Collection[str]) -> None:
    """Raise the ValueError of `Engine.submit`."""
    if not request.token_ids:
        problem = "the prompt has no tokens"
    elif request.params.max_tokens < 1:
        problem = f"max_tokens is {request.params.max_tokens}; it must be at least 1"
    elif not 0 <= request.params.top_logprobs <= MAX_TOP_LOGPROBS:
        problem = f"top_logprobs must be 0 to {MAX_TOP_LOGPROBS}"
    elif "" in request.params.stop_texts:
        problem = "a stop text is empty"
    elif request.id in unfinished_ids:
        problem = "a request of this id is not finished; choose another id"
    else:
        return
    raise ValueError(f"request {request.id}: {problem}")


@runtime_checkable
class CanSleep(Protocol):
    """An engine that can give up its GPU memory while the trainer needs it."""

    def sleep(self) -> None:
        """Free the memory of weights and KV cache until the next `update_weights`.

        Every rank calls this at the same point, with no request unfinished.
        """
        ...
