"""Rollout engines as Ray actors, in the placement group of `infir2 launch ray --engines N`.

Rank 0 talks to the actors. It keeps the queue and gives each engine a few more requests than it can
run at a time, so engines that are faster get more. An actor works on its requests in calls of a
fraction of a second: each call brings new requests and returns what has finished, and a call that
does not return for a long time shows that the engine is stuck.

Weights travel through Ray's object store as bytes (it does not accept FP8 tensors): rank 0 puts
them once, every actor fetches them. An engine gets requests only after the digest of its weights
was found equal to that of the first engine; `weight_sync` compares it with the trainer's.

Ray restarts an engine that died, as often as the launcher allows; until it has loaded the weights,
the other engines generate its unfinished requests. A stuck engine is killed; Ray then restarts it.
"""

import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infir2.config.schema import RolloutSection
from infir2.engines.native import NativeEngine
from infir2.engines.types import Completion, Request, check_request
from infir2.errors import CheckFailedError, RankError
from infir2.launch.ray import ENGINES_VARIABLE, connect, placement_group_of, start_actors
from infir2.parallel.ranks import Ranks
from infir2.terminal import log

ProcessId = tuple[str, int]  # of an engine's process: Ray's node id, pid on that node
StoredWeight = tuple[str, str, tuple[int, ...], Any]  # name, dtype, shape, object-store reference
POLL_SECONDS = 0.5
CALL_SECONDS = 0.2  # an engine works on its requests for so long before it returns completions
QUEUE_FACTOR = 1.25  # requests at an engine per request that it runs, so that no free slot waits


class NotServingError(Exception):
    """The engine was restarted and does not have its weights yet."""


class EngineActor:
    """A `NativeEngine` in its own process, on a GPU if its bundle has one."""

    def __init__(self, section: RolloutSection, compute_dtype: torch.dtype) -> None:
        self._section, self._compute_dtype = section, compute_dtype
        self._engine: NativeEngine | None = None

    def load(
        self, weights: Sequence[StoredWeight], policy_version: int
    ) -> tuple[dict[str, str], ProcessId]:
        """Drop all requests and load `weights`; without any, those of `rollout.model`.

        Returns the digest of the weights, and which process this is.
        """
        import ray

        if self._engine is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            directory = Path(self._section.model)
            self._engine = NativeEngine.from_hf(
                directory, self._section, self._compute_dtype, device
            )
        self._engine.cancel_all()
        if weights:
            self._engine.update_weights(_fetch_weights(weights), policy_version)
        return self._engine.weights_digest(), (ray.get_runtime_context().get_node_id(), os.getpid())

    def generate(self, requests: Sequence[Request], policy_version: int) -> list[Completion]:
        """Accept requests and work on all unfinished ones for CALL_SECONDS; returns what finished.

        Raises NotServingError in a restarted process.
        """
        engine = self._engine
        if engine is None or engine.policy_version != policy_version:
            raise NotServingError
        for request in requests:
            engine.submit(request)
        completions, end = list[Completion](), time.monotonic() + CALL_SECONDS
        while engine.num_unfinished:
            completions += engine.step()
            if time.monotonic() > end:
                break
        return completions

    def cancel(self, request_ids: Sequence[str]) -> None:
        """As `Engine.cancel`."""
        if self._engine is not None:
            self._engine.cancel(request_ids)


@dataclass(eq=False)
class _RemoteEngine:
    """What rank 0 knows of an actor. An actor has at most one `load` or `generate` call in flight.

    Attributes:
        requests: those that were given to the actor and have not finished, by id.
        new_ids: which of them the actor has not received yet.
        serving: whether it holds the current weights.
        call: reference to the result of the call in flight.
        called_at: when that call began, time.monotonic().
        process: its process, known after `load`.
    """

    actor: Any
    requests: dict[str, Request] = field(default_factory=dict)
    new_ids: list[str] = field(default_factory=list)
    serving: bool = False
    call: Any = None
    called_at: float = 0.0
    process: ProcessId | None = None

    def load(self, weights: Sequence[StoredWeight], policy_version: int) -> None:
        # A call in flight is forgotten: an actor does its calls in order, so this one comes after.
        self.serving = False
        self.requests, self.new_ids = {}, []
        self.call = self.actor.load.remote(weights, policy_version)
        self.called_at = time.monotonic()

    def add(self, request: Request) -> None:
        self.requests[request.id] = request
        self.new_ids.append(request.id)

    def generate(self, policy_version: int) -> None:
        new = [self.requests[request_id] for request_id in self.new_ids]
        self.new_ids = []
        self.call = self.actor.generate.remote(new, policy_version)
        self.called_at = time.monotonic()

    def cancel(self, request_ids: set[str]) -> None:
        received = request_ids & self.requests.keys() - set(self.new_ids)
        self.requests = {i: r for i, r in self.requests.items() if i not in request_ids}
        self.new_ids = [i for i in self.new_ids if i not in request_ids]
        if received:
            self.actor.cancel.remote(sorted(received))


class RayEngines:
    """All engines of the run as one `RolloutEngine`. Every rank has this object; rank 0's works."""

    def __init__(
        self,
        section: RolloutSection,
        compute_dtype: torch.dtype,
        ranks: Ranks,
        timeout_seconds: float,
    ) -> None:
        """Start the engines with the weights of `rollout.model`, version 0.

        An engine whose call does not return within `timeout_seconds` is killed. Raises as
        `NativeEngine.from_hf`.
        """
        self.policy_version, self.shared_by_ranks = 0, True
        self._ranks, self._timeout_seconds = ranks, timeout_seconds
        self._max_queued = max(1, round(QUEUE_FACTOR * section.max_running_requests))
        self._weights: list[StoredWeight] = []
        self._digest: dict[str, str] = {}
        self._unfinished_ids: set[str] = set()
        self._waiting: deque[Request] = deque()
        self._engines: list[_RemoteEngine] = []  # those that Ray still restarts
        if ranks.is_rank0:
            actors = _start_actors(section, compute_dtype)
            self._engines = [_RemoteEngine(actor) for actor in actors]
        self._digest = ranks.broadcast_from_rank0(self._load_all)

    @property
    def num_unfinished(self) -> int:
        """As `Engine`."""
        return len(self._unfinished_ids)

    def submit(self, request: Request) -> None:
        """As `Engine`."""
        check_request(request, self._unfinished_ids)
        self._unfinished_ids.add(request.id)
        self._waiting.append(request)

    def step(self) -> list[Completion]:
        """As `Engine`. Raises RankError when every engine has died and Ray restarts none."""
        self._require_an_engine()
        serving = [engine for engine in self._engines if engine.serving]
        while self._waiting and serving:
            engine = min(serving, key=lambda engine: len(engine.requests))
            if len(engine.requests) >= self._max_queued:
                break
            engine.add(self._waiting.popleft())
        for engine in serving:
            if engine.requests and engine.call is None:
                engine.generate(self.policy_version)
        return self._collect(POLL_SECONDS)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """As `Engine`."""
        canceled = self._unfinished_ids.intersection(request_ids)
        self._unfinished_ids -= canceled
        self._waiting = deque(r for r in self._waiting if r.id not in canceled)
        for engine in self._engines:
            engine.cancel(canceled)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """As `WeightSink`; the other ranks only take part in gathering each weight."""
        assert not self.num_unfinished, "finish or cancel all requests before new weights"
        self._weights = []  # frees the old version's memory in the object store
        for name, tensor in weights:
            if self._ranks.is_rank0:
                self._weights.append(_store_weight(name, tensor))
        self.policy_version = policy_version
        self._digest = self._ranks.broadcast_from_rank0(self._load_all)

    def weights_digest(self) -> dict[str, str]:
        """As `OffersDigest`: the digest that all serving engines have."""
        return self._digest

    def _load_all(self) -> dict[str, str]:
        """Load the current weights into every engine. Returns their digest."""
        self._digest = {}
        for engine in self._engines:
            engine.load(self._weights, self.policy_version)
        while any(engine.call is not None for engine in self._engines):
            self._collect(POLL_SECONDS)
        self._require_an_engine()
        return self._digest

    def _require_an_engine(self) -> None:
        if not self._engines:
            raise RankError(
                "every rollout engine has died, more often than --max-restarts allows; "
                "the messages above say why"
            )

    def _collect(self, wait_seconds: float) -> list[Completion]:
        """Wait for a call to return and handle all that have."""
        import ray

        self._kill_stuck_engines()
        engine_of = {engine.call: engine for engine in self._engines if engine.call is not None}
        if not engine_of:
            return []
        completions = list[Completion]()
        calls = list(engine_of)
        if not ray.wait(calls, timeout=wait_seconds)[0]:
            return []
        for call in ray.wait(calls, num_returns=len(calls), timeout=0)[0]:
            engine = engine_of[call]
            engine.call = None
            if engine.serving:
                completions += self._finish_generate(engine, call)
            else:
                self._finish_load(engine, call)
        return completions

    def _finish_generate(self, engine: _RemoteEngine, call: Any) -> list[Completion]:
        import ray

        try:
            finished: list[Completion] = ray.get(call)
        except (ray.exceptions.RayActorError, NotServingError) as error:
            others = "; the others do its work" if len(self._engines) > 1 else ""
            log(f"a rollout engine died ({type(error).__name__}){others}", "rl")
            self._waiting.extendleft(reversed(engine.requests.values()))
            engine.process = None
            engine.load(self._weights, self.policy_version)
            return []
        # A canceled request may have finished before the engine knew.
        wanted = [each for each in finished if each.id in engine.requests]
        for completion in wanted:
            del engine.requests[completion.id]
            self._unfinished_ids.remove(completion.id)
        return wanted

    def _finish_load(self, engine: _RemoteEngine, call: Any) -> None:
        """The engine serves if its weights have the digest of the others."""
        import ray

        try:
            digest, engine.process = ray.get(call)
        except ray.exceptions.ActorUnavailableError:  # Ray is restarting it
            engine.process = None
            time.sleep(POLL_SECONDS)
            engine.load(self._weights, self.policy_version)
            return
        except ray.exceptions.RayActorError as error:
            log(f"a rollout engine is gone: {error}", "rl")
            self._engines.remove(engine)
            return
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        self._digest = self._digest or digest
        if digest != self._digest:
            raise CheckFailedError(
                "two rollout engines hold different weights: rollout.model must be the same on "
                "every node"
            )
        engine.serving = True

    def _kill_stuck_engines(self) -> None:
        """Kill engines whose call is overdue; the call then fails, and Ray restarts the engine.

        The kill is a signal where the process is known: `ray.kill` sends the process a message
        first and gives up (Ray 2.60) when a stopped process does not accept it.
        """
        import ray

        now = time.monotonic()
        for engine in self._engines:
            overdue = engine.call is not None and now - engine.called_at > self._timeout_seconds
            if not overdue or ray.wait([engine.call], timeout=0)[0]:
                continue
            limit = f"{self._timeout_seconds:g} s"
            log(f"a rollout engine made no progress in {limit}; killing it", "rl")
            if engine.process:
                _kill_process(*engine.process)
                engine.process = None
            else:
                ray.kill(engine.actor, no_restart=False)
            engine.called_at = now


def _start_actors(section: RolloutSection, compute_dtype: torch.dtype) -> list[Any]:
    connect(os.environ["RAY_ADDRESS"])
    group_id, _, max_restarts = os.environ[ENGINES_VARIABLE].partition(":")
    group = placement_group_of(group_id)
    return start_actors(group, EngineActor, section, compute_dtype, max_restarts=int(max_restarts))


def _kill_process(node_id: str, pid: int) -> None:
    """Send SIGKILL to a process on a node of the cluster, without waiting for it to end."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    kill = ray.remote(lambda: os.kill(pid, signal.SIGKILL))
    on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
    kill.options(num_cpus=0, scheduling_strategy=on_node, max_retries=0).remote()


def _store_weight(name: str, tensor: Tensor) -> StoredWeight:
    import ray

    content = tensor.detach().to("cpu").contiguous()
    raw: Any = content.reshape(-1).view(torch.uint8).numpy()
    return name, str(content.dtype).removeprefix("torch."), tuple(content.shape), ray.put(raw)


def _fetch_weights(weights: Sequence[StoredWeight]) -> Iterator[tuple[str, Tensor]]:
    import ray

    for name, dtype, shape, reference in weights:
        raw = np.array(ray.get(reference))  # a copy: the store's memory is read-only
        yield name, torch.from_numpy(raw).view(getattr(torch, dtype)).view(shape)
