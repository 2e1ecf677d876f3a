"""A server that generates, as the pool sees it: the protocol of its client, and what is an answer.

A client belongs to one server. Its methods are coroutines of one event loop, so that hundreds of
requests wait in one thread. A client raises EngineError for everything that another server, or the
same one later, may do better, and a UserError for what nobody can repair but the user.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from infir2.engines.types import Completion, Request
from infir2.engines.weight_buckets import WeightBuckets
from infir2.errors import ConfigError
from infir2.model.hf_names import weights_digest
from infir2.model.safetensors_io import HfWeights

NUM_HASHERS = 4
LOGPROB_ERROR = 1e-3  # a server's rounding may put a probability a little above 1


class EngineError(Exception):
    """A server failed. `reason` is a word for the metrics: "gone", "status", "cut", "hang", ..."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class EngineGoneError(EngineError):
    """The server cannot be reached, or closed the connection."""

    def __init__(self, message: str) -> None:
        super().__init__("gone", message)


class HungUpError(EngineGoneError):
    """The server had the request and closed the connection without an answer."""


class BadAnswerError(EngineError):
    """An answer that must not be trained on.

    `status` is that of HTTP, 200 for a wrong content; `said` is the sentence of an error of
    OpenAI's form.
    """

    def __init__(self, reason: str, message: str, status: int = 200, said: str = "") -> None:
        super().__init__(reason, message)
        self.status, self.said = status, said


class WeightsDifferError(EngineError):
    """The server does not hold the weights that were published."""

    def __init__(self, message: str) -> None:
        super().__init__("weights", message)


@dataclass(frozen=True)
class WeightProbe:
    """A fixed prompt with what the trainer computes of it.

    Attributes:
        token_ids: the prompt, n tokens.
        logprobs: float32 [n - 1], log-probability of each token but the first, at temperature 1.
    """

    token_ids: list[int]
    logprobs: np.ndarray


@dataclass(frozen=True, eq=False)
class PublishedWeights:
    """One version of the trainer's weights: a Hugging Face directory, or tensors to broadcast.

    Attributes:
        directory: absolute; config.json, tokenizer, safetensors; FP8 pairs or BF16.
        policy_version: that of the weights.
        num_bytes: of the tensors.
        probe: with these weights; for servers that do not show what they hold.
        buckets: the weights if they are not those of `directory`, which then has another version's.
        seconds: what the slowest engine needed, by part: "transfer", "load", "proof".
    """

    directory: Path
    policy_version: int
    num_bytes: int
    probe: WeightProbe | None = None
    buckets: WeightBuckets | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def took(self, part: str, seconds: float) -> None:
        """Note how long a part took at one engine."""
        self.seconds[part] = max(seconds, self.seconds.get(part, 0.0))

    def metrics(self, write_seconds: float) -> dict[str, float]:
        """Seconds of all parts and bytes, by the metric's name."""
        parts = {"write": write_seconds} | self.seconds
        named = {f"publish_{part}_seconds": seconds for part, seconds in parts.items()}
        return named | {"publish_bytes": float(self.num_bytes)}

    @property
    def tensors(self) -> HfWeights | WeightBuckets:
        """The weights by name."""
        return self.buckets or HfWeights(self.directory)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each tensor's bytes by name, as `weights_digest`."""
        files = HfWeights(self.directory)
        found: dict[str, str] = {}
        with ThreadPoolExecutor(NUM_HASHERS) as hashers:  # hashlib releases Python's lock
            names = files.names()
            for each in hashers.map(lambda n: weights_digest([(n, files.read(n))]), names):
                found |= each
        return found


class WeightPublisher(Protocol):
    """Where a new version of the trainer's weights is kept for the servers."""

    def publish(
        self, weights: Iterable[tuple[str, Tensor]], policy_version: int
    ) -> PublishedWeights:
        """Keep a version. Raises CheckFailedError unless it has the tensors of `rollout.model`."""
        ...

    def remove_before(self, weights: PublishedWeights) -> None:
        """Remove all versions but this one."""
        ...

    def close(self) -> None:
        """Remove everything."""
        ...


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself; None or "" for what it does not tell.

    Attributes:
        release: name and version, such as "sglang 0.5.12.post1".
        model: path or name of the model that it was started with.
        scale_format: of its FP8 weights, "pow2" or "fp32"; "none" for weights that are not FP8.
        max_positions: longest prompt with response, tokens.
        max_running_requests: as many it generates at a time.
        tokenizer_sha256: of tokenizer.json.
    """

    release: str
    model: str = ""
    scale_format: str | None = None
    max_positions: int | None = None
    max_running_requests: int | None = None
    tokenizer_sha256: str = ""


class EngineClient(Protocol):
    """Client of one server.

    Attributes:
        url: of the server, for messages.
    """

    url: str

    async def info(self) -> ServerInfo:
        """Ask the server what it is. Raises ConfigError for a release that lacks a route."""
        ...

    async def check_health(self) -> None:
        """Return once the server has shown that it generates tokens. Raises EngineError."""
        ...

    async def generate(self, request: Request, policy_version: int) -> Completion:
        """The response to a request, by weights of `policy_version`.

        The pool limits the time. A canceled call ends the request at the server too. Raises
        EngineError; `checked_completion` finds most wrong answers.
        """
        ...

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """End requests at the server that are still running; others are ignored."""
        ...

    async def update_weights(self, weights: PublishedWeights) -> None:
        """Let the server load `weights` and forget every cached key and value.

        What is unfinished is canceled first. Raises EngineError.
        """
        ...

    async def prove_weights(self, weights: PublishedWeights) -> None:
        """Compare what the server holds with `weights`. Raises WeightsDifferError."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


@runtime_checkable
class SleepingClient(Protocol):
    """An `EngineClient` of a server that can give up its GPU memory."""

    async def sleep(self) -> None:
        """Free weights and KV cache until the next `update_weights`. Raises EngineError."""
        ...


class EngineHost(Protocol):
    """Where the server of a client comes from: a process of ours, or a URL.

    Attributes:
        name: of the engine in messages, such as "engine 1".
        max_restarts: how often it may be started again after a failure.
    """

    name: str
    max_restarts: int

    async def start(self) -> EngineClient:
        """Start the server if it is ours; return when it has generated a token.

        Raises EngineError, which counts as a failure, or UserError, which ends the run.
        """
        ...

    def kill(self) -> None:
        """End the server's processes at once if they are ours. A later `start` begins anew."""
        ...


@contextlib.contextmanager
def reading_answer(url: str) -> Iterator[None]:
    """Raise BadAnswerError where an answer lacks what the code inside the block reads of it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadAnswerError("form", f"{url}: not the expected form ({error!r})") from error


@contextlib.contextmanager
def requiring_route(sentence: str) -> Iterator[None]:
    """Raise ConfigError with `sentence` where the server lacks a route: waiting gives it none."""
    try:
        yield
    except BadAnswerError as error:
        if error.status != 404:
            raise
        raise ConfigError(sentence) from error


def checked_completion(
    request: Request, token_ids: Sequence[int], logprobs: Sequence[float], policy_version: int
) -> Completion:
    """The completion that a server's answer describes.

    `logprobs` are as `Completion.rollout_logprobs`. Raises BadAnswerError for another number of
    them than of tokens, for values that are none, and for a response that goes on after a stop
    token or ends without one before `max_tokens`.
    """
    params = request.params
    values = np.asarray(logprobs, dtype=np.float32)
    stopped = bool(token_ids) and token_ids[-1] in params.stop_ids
    if not token_ids or len(token_ids) > params.max_tokens:
        problem = "tokens", f"{len(token_ids)} tokens, not 1 to {params.max_tokens}"
    elif values.shape != (len(token_ids),):
        problem = "logprobs", f"{len(logprobs)} log-probabilities for {len(token_ids)} tokens"
    elif not (np.isfinite(values).all() and (values <= LOGPROB_ERROR).all()):
        problem = "not_finite", "values that are no log-probabilities"
    elif set(params.stop_ids).intersection(token_ids[:-1]):
        problem = "finish", "tokens after a stop token"
    elif not stopped and len(token_ids) < params.max_tokens:
        problem = "finish", f"only {len(token_ids)} of {params.max_tokens} tokens and no stop token"
    else:
        finish: Literal["stop", "length"] = "stop" if stopped else "length"
        return Completion(request.id, list(token_ids), values, finish, policy_version)
    raise BadAnswerError(problem[0], f"request {request.id}: the answer has {problem[1]}")
