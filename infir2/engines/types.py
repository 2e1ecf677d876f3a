"""What goes into an engine and what comes out. Tokens in, tokens out: sampled text is never rendered again."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
from torch import Tensor

from infir2.parallel.ranks import Ranks

Item = TypeVar("Item")


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Example: `SamplingParams(temperature=1.0, top_p=1.0, max_tokens=96, stop_ids=(2,))`."""

    temperature: float  # 0: greedy
    max_tokens: int
    stop_ids: tuple[int, ...]
    top_p: float = 1.0


@dataclass(frozen=True)
class Request:
    """One response to generate. `key` seeds its randomness, whatever else runs beside it.

    Example: `Request("p17/3", [5, 9, 2], key=sampling_key(1236, "p17", 3, policy_version=4))`.
    """

    id: str
    token_ids: Sequence[int]  # the prompt
    key: int


@dataclass(frozen=True)
class Completion:
    """One generated response.

    `rollout_logprobs[i]` is the log-probability of `token_ids[i]` at the sampling temperature, before top-p truncation.
    """

    id: str
    token_ids: list[int]
    rollout_logprobs: np.ndarray  # float32 [len(token_ids)]
    finish: Literal["stop", "length"]
    policy_version: int


Ended = tuple[int, Completion]  # with the place of its request


class Engine(Protocol):
    """Generates with one version of the weights at a time. Of a run of several ranks, each has an `Engine`.

    `shared`: they are the same engines, which the first rank asks for everything.
    """

    policy_version: int
    shared: bool

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[list[Ended]]:
        """One completion per request. Yields all the time what has ended, often nothing: a caller that goes away ends the work."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Take over new weights, given under their exported names; anything cached from the old ones is dropped."""
        ...

    def weights_digest(self) -> dict[str, str]:
        """sha256 of each weight's bytes by exported name."""
        ...


def part_of(engine: Engine, ranks: Ranks, items: Sequence[Item]) -> Sequence[Item]:
    """What this rank has `engine` generate of work that all ranks know."""
    if engine.shared:
        return items if ranks.is_rank0 else items[:0]
    return items[ranks.rank :: ranks.size]


def respond(
    engine: Engine,
    prompts: Sequence[tuple[str, list[int]]],
    samples: int,
    seed: int,
    params: SamplingParams,
    check: Callable[[], None],
) -> Iterator[tuple[int, list[Completion]]]:
    """The responses to each prompt (its id, token_ids), with its place, as the last of them ends; what `check` raises ends the work."""
    requests = [
        Request(f"{name}/{i}", ids, sampling_key(seed, name, i, engine.policy_version))
        for name, ids in prompts
        for i in range(samples)
    ]
    found: dict[int, Completion] = {}
    for ended in engine.stream(requests, params):
        found.update(ended)
        for prompt in {place // samples for place, _ in ended}:
            places = range(prompt * samples, (prompt + 1) * samples)
            if found.keys() >= set(places):
                yield prompt, [found[place] for place in places]
        check()


def sampling_key(seed: int, prompt_id: str, sample: int, policy_version: int) -> int:
    """64-bit key: randomness is a function of (seed, prompt, sample, policy_version) alone, so that a redone rollout repeats."""
    text = f"{seed}/{prompt_id}/{sample}/{policy_version}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
