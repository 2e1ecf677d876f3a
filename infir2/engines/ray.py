"""Rollout engines apart from the trainer: actors in the placement group that `infir2 launch ray --engines N` made.

The first rank talks to them. Weights go through Ray's object store as bytes (it does not take FP8 tensors), put once and
fetched by every engine. An engine serves a version of the weights only after its digest of them was found to be the first
one's, and `open_engine` compares that with the trainer's. Ray starts a dead engine again, as often as the launcher said; until
it has the weights, the others do its work. One that makes no progress is ended, which makes it a dead one.
"""

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infir2.config.schema import RolloutSection
from infir2.engines.native import NativeEngine
from infir2.engines.types import Ended, Request, SamplingParams
from infir2.errors import CheckFailedError, RankError
from infir2.launch.ray import ENGINES, actors_in, connect
from infir2.parallel.ranks import Ranks
from infir2.terminal import log

ProcessId = tuple[str, int]  # of an engine's process: Ray's node, pid there
Piece = tuple[
    str, str, tuple[int, ...], Any
]  # of a weight: name, dtype, shape, reference to its bytes
POLL_SECONDS = 0.5
BEAT_SECONDS = 1.0  # between signs of life of an engine whose responses are long


class NotServing(Exception):
    """An engine was started again and has not got its weights yet."""


class EngineActor:
    """A `NativeEngine` in a process of its own, on a GPU if its bundle has one."""

    def __init__(self, section: RolloutSection, compute_dtype: torch.dtype) -> None:
        self._section, self._compute_dtype = section, compute_dtype
        self._engine: NativeEngine | None = None

    def load(
        self, pieces: Sequence[Piece], policy_version: int
    ) -> tuple[dict[str, str], ProcessId]:
        """Take over these weights, without any those of `rollout.model`. Returns their digest, and where this process is."""
        import ray

        if self._engine is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            directory = Path(self._section.model)
            self._engine = NativeEngine.from_hf(
                directory, self._section.max_running_requests, self._compute_dtype, device
            )
        if pieces:
            self._engine.update_weights(_fetched(pieces), policy_version)
        return self._engine.weights_digest(), (ray.get_runtime_context().get_node_id(), os.getpid())

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, policy_version: int
    ) -> Iterator[list[Ended]]:
        """What has ended, as it ends; nothing, every BEAT_SECONDS in which tokens were made."""
        engine = self._engine
        if engine is None or engine.policy_version != policy_version:
            raise NotServing
        told = time.monotonic()
        for ended in engine.stream(requests, params):
            if ended or time.monotonic() - told > BEAT_SECONDS:
                told = time.monotonic()
                yield ended


class RayEngines:
    """All engines of the run as one `Engine`; every rank has one, and the first rank's does the work."""

    def __init__(
        self,
        section: RolloutSection,
        compute_dtype: torch.dtype,
        ranks: Ranks,
        timeout_seconds: float,
    ) -> None:
        """Start the engines with the weights of `rollout.model`, version 0. Errors: those of `NativeEngine.from_hf`.

        An engine that makes no token, or loads weights, for longer than `timeout_seconds` is ended.
        """
        self.policy_version, self.shared = 0, True
        self._ranks, self._timeout_seconds = ranks, timeout_seconds
        self._pieces: list[Piece] = []
        self._actors: list[Any] = []  # those that are not dead for good
        self._serving: list[Any] = []
        self._loading: dict[Any, Any] = {}  # reference to the digest that is to come -> actor
        self._places: dict[
            Any, ProcessId
        ] = {}  # of actors that have loaded weights in this life of theirs
        self._heard: dict[
            Any, float
        ] = {}  # when a call to an actor began or gave something, time.monotonic()
        if ranks.is_rank0:
            self._actors = _start(section, compute_dtype)
        self._digest = ranks.broadcast_from_rank0(self._load_all)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """As `Engine`; on other ranks than the first, only go through the weights."""
        self._pieces = []  # the object store need not hold two versions
        for name, tensor in weights:
            if self._ranks.is_rank0:
                self._pieces.append(_put(name, tensor))
        self.policy_version = policy_version
        self._digest = self._ranks.broadcast_from_rank0(self._load_all)

    def weights_digest(self) -> dict[str, str]:
        """That of every engine that serves."""
        return self._digest

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[list[Ended]]:
        """As `Engine`. What an engine had not finished when it died is divided again. Raises RankError when all are dead for good."""
        done: set[int] = set()
        while waiting := [i for i in range(len(requests)) if i not in done]:
            yield from self._await_one()
            streams = {}
            for number, actor in enumerate(self._serving):
                share = waiting[number :: len(self._serving)]
                if share:
                    stream = actor.generate.options(num_returns="streaming").remote(
                        [requests[i] for i in share], params, self.policy_version
                    )
                    streams[stream] = (actor, share)
            for ended in self._collect(streams):
                done.update(index for index, _ in ended)
                yield ended

    def _collect(self, streams: dict[Any, tuple[Any, list[int]]]) -> Iterator[list[Ended]]:
        import ray

        self._heard |= dict.fromkeys(streams, time.monotonic())
        while streams:
            yield []
            for stream in ray.wait(list(streams), timeout=POLL_SECONDS)[0]:
                actor, share = streams[stream]
                self._heard[stream] = time.monotonic()
                try:
                    yield [
                        (share[place], completion) for place, completion in ray.get(next(stream))
                    ]
                except StopIteration:
                    del streams[stream]
                except (ray.exceptions.RayActorError, NotServing) as error:
                    del streams[stream]
                    log(
                        f"a rollout engine died ({type(error).__name__}); the others do its work",
                        "rl",
                    )
                    self._serving.remove(actor)
                    self._places.pop(actor, None)
                    self._load(actor)
            self._end_wedged({stream: actor for stream, (actor, _) in streams.items()})

    def _end_wedged(self, calls: Mapping[Any, Any]) -> None:
        """End the engines whose call has long given nothing (call -> actor); Ray lets the call fail then, and starts them again.

        By a signal where the process is known: `ray.kill` asks it first, and gives up (Ray 2.60) if the question cannot be sent.
        """
        import ray

        now = time.monotonic()
        for call, actor in calls.items():
            if (
                now - self._heard[call] > self._timeout_seconds
                and not ray.wait([call], timeout=0)[0]
            ):
                log(
                    f"a rollout engine made no progress in {self._timeout_seconds:g} s; ending it",
                    "rl",
                )
                if place := self._places.pop(actor, None):
                    _kill(*place)
                else:
                    ray.kill(actor, no_restart=False)
                self._heard[call] = now

    def _load(self, actor: Any) -> None:
        loaded = actor.load.remote(self._pieces, self.policy_version)
        self._loading[loaded], self._heard[loaded] = actor, time.monotonic()

    def _load_all(self) -> dict[str, str]:
        """Give every engine the version at hand; their digest."""
        # A load in flight is of the version before; an actor does its calls in order, so the new one comes after it.
        self._serving, self._loading, self._heard, self._digest = [], {}, {}, {}
        for actor in self._actors:
            self._load(actor)
        while self._loading:
            self._admit(POLL_SECONDS)
        for _ in self._await_one():
            pass
        return self._digest

    def _await_one(self) -> Iterator[list[Ended]]:
        """Until an engine serves, which may be at once; those that have got ready serve too."""
        self._admit(0)
        while not self._serving:
            if not self._loading:
                raise RankError(
                    "every rollout engine has died, more often than --max-restarts allows; see above"
                )
            yield []
            self._admit(POLL_SECONDS)

    def _admit(self, wait_seconds: float) -> None:
        """Let engines serve whose weights have the right digest."""
        import ray

        self._end_wedged(self._loading)
        for loaded in (
            ray.wait(list(self._loading), timeout=wait_seconds)[0] if self._loading else ()
        ):
            actor = self._loading.pop(loaded)
            try:
                digest, self._places[actor] = ray.get(loaded)
            except ray.exceptions.ActorUnavailableError:  # being started again
                self._places.pop(actor, None)
                time.sleep(POLL_SECONDS)
                self._load(actor)
                continue
            except ray.exceptions.RayActorError as error:
                log(f"a rollout engine is gone: {error}", "rl")
                self._actors.remove(actor)
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            self._digest = self._digest or digest
            if digest != self._digest:
                raise CheckFailedError(
                    "two rollout engines hold different weights: rollout.model must be the same on every node"
                )
            self._serving.append(actor)


def _start(section: RolloutSection, compute_dtype: torch.dtype) -> list[Any]:
    import ray
    from ray.util.placement_group import PlacementGroup

    connect(os.environ["RAY_ADDRESS"])
    number, _, max_restarts = os.environ[ENGINES].partition(":")
    group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(number)))
    return actors_in(group, EngineActor, section, compute_dtype, max_restarts=int(max_restarts))


def _kill(node: str, pid: int) -> None:
    """SIGKILL to a process on a node of the cluster. Nobody waits for it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    kill = ray.remote(lambda: os.kill(pid, signal.SIGKILL))
    kill.options(num_cpus=0, scheduling_strategy=On(node, soft=False), max_retries=0).remote()


def _put(name: str, tensor: Tensor) -> Piece:
    import ray

    content = tensor.detach().to("cpu").contiguous()
    raw: Any = content.reshape(-1).view(torch.uint8).numpy()
    return name, str(content.dtype).removeprefix("torch."), tuple(content.shape), ray.put(raw)


def _fetched(pieces: Sequence[Piece]) -> Iterator[tuple[str, Tensor]]:
    import ray

    for name, dtype, shape, reference in pieces:
        raw = np.array(ray.get(reference))  # a copy: the store's memory is read-only
        yield name, torch.from_numpy(raw).view(getattr(torch, dtype)).view(shape)
