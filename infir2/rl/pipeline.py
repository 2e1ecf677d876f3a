"""Where a step's responses come from: sampled when the step begins or, with `rl.asynchronous`, while the step before it trains."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from infir2.engines.types import RolloutEngine
from infir2.engines.weight_sync import publish
from infir2.errors import Interrupted
from infir2.parallel.parallel_model import ParallelModel
from infir2.rl.dynamic_sampling import Check, Collected, GroupSampler, Work
from infir2.rl.journal import Journal
from infir2.train.supervisor import Session

_BEAT_SECONDS = 0.1


class Rollouts:
    """The groups of one step after another.

    Synchronous: step n trains on responses of version n - 1, the newest. Asynchronous: the engine samples step n + 1 from
    version n - 1 while step n trains, so responses are one version older than the newest, never more, and the engine gets
    version n when it has finished. A checkpoint of step n holds where step n + 1 begins (`state`): a resumed run takes
    the groups that were finished from the journal and samples the others from the weights it has.
    """

    def __init__(
        self,
        sampler: GroupSampler,
        journal: Journal,
        engine: RolloutEngine,
        weights: str,
        parallel_model: ParallelModel,
        session: Session,
        last_step: int,
    ) -> None:
        """`weights`: digest of those that `engine` holds."""
        self._sampler, self._journal, self._engine, self._weights = (
            sampler,
            journal,
            engine,
            weights,
        )
        self._parallel_model, self._session, self._last_step = parallel_model, session, last_step
        self._begun: Future[Collected] | None = None  # the next step's groups, on the first rank
        self._ahead: Collected | None = None  # the same, on every rank, once they are there
        self._cancelled = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="infir2-rollouts")
        self._earlier = session.checkpoint.state.get("ahead", "") if session.checkpoint else ""
        self._in_flight = False
        self.state: dict[str, Any] = {}

    def take(self, step: int) -> Collected:
        """The groups of a step, after which the next step's may begin. Every rank calls this, from step to step."""
        self.update(step - 1)
        collected, self._ahead = self._ahead or self._collect(step), None
        self.state = {"cursor": self._sampler.cursor}
        if self._sampler.rl.asynchronous and step < self._last_step:
            self.state["ahead"] = self._weights
            self._begin(step + 1)
        return collected

    def update(self, policy_version: int) -> None:
        """Give the engine the trainer's weights if its own are older, once it has finished what it samples. Every rank calls this."""
        if self._in_flight:
            self._ahead, self._in_flight = self._session.divided(self._finished)[0], False
        if self._engine.policy_version != policy_version:
            self._weights = publish(self._parallel_model, self._engine, policy_version)

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *_: object) -> None:
        """End what is being sampled; finished groups are in the journal."""
        self._cancelled.set()
        self._thread.shutdown()

    def _collect(self, step: int) -> Collected:
        self._journal.open(step, self._session.saved_step)
        earlier, self._earlier = self._earlier, ""
        return self._sampler.collect(self._engine, self._weights, self._session.divided, earlier)

    def _begin(self, step: int) -> None:
        """Sample a step's groups in a thread of the first rank, which talks to no other rank meanwhile."""
        self._journal.open(step, self._session.saved_step)
        self._in_flight = True
        if self._session.ranks.is_rank0:
            self._begun = self._thread.submit(
                self._sampler.collect, self._engine, self._weights, self._alone
            )

    def _alone(self, work: Work) -> list[dict[int, Any]]:
        def check() -> None:
            if self._cancelled.is_set():
                raise Interrupted("the run ended")

        return [work(check)]

    def _finished(self, check: Check) -> Collected | None:
        if self._begun is None:
            return None
        while not wait([self._begun], timeout=_BEAT_SECONDS).done:
            check()
        return self._begun.result()
