"""When a step's rollouts are sampled: as the step begins, or ahead, while the previous step trains.

Synchronous: step n trains on responses of policy version n - 1, the newest. Asynchronous
(`rl.asynchronous`): the engine samples step n + 1 from version n - 1 while step n trains, so that
responses are exactly one version older than the newest; it receives version n when it has finished.
"""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from infir2.config.schema import RlSection
from infir2.engines.types import CanSleep, OffersMetrics, RolloutEngine
from infir2.engines.weight_sync import publish
from infir2.errors import Interrupted
from infir2.rl.dynamic_sampling import (
    Check,
    GroupGenerator,
    Rollouts,
    RunOnRanks,
    collect_rollouts,
)
from infir2.rl.groups import Group
from infir2.rl.journal import Journal
from infir2.rl.prompts import PromptStream
from infir2.train.plan import last_step_of
from infir2.train.supervisor import Supervisor

_POLL_SECONDS = 0.1


class RolloutPipeline:
    """Rollouts of one step after another, and the engine's weights.

    A checkpoint of step n stores where step n + 1 begins (`state`). A resumed run reads the
    finished groups of that step from the journal and samples the others with the weights it has.

    Attributes:
        state: what a checkpoint of the current step stores.
        seconds: what the current step's rollouts took, by metric: generate_seconds and
            verify_seconds, which an asynchronous run spends while it trains; publish_seconds;
            wait_seconds, the rest of `next_rollouts`.
    """

    def __init__(
        self,
        rl: RlSection,
        prompts: PromptStream,
        generator: GroupGenerator,
        journal: Journal,
        engine: RolloutEngine,
        weights_digest: str,
        supervisor: Supervisor,
    ) -> None:
        """`weights_digest` is that of the weights that `engine` holds."""
        self.state: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._publish_seconds = 0.0
        self._rl, self._prompts, self._generator, self._journal = rl, prompts, generator, journal
        self._engine, self._digest = engine, weights_digest
        self._supervisor = supervisor
        self._last_step = last_step_of(supervisor.recipe, supervisor.recipe.schedule)
        # Weights with which the run that this one resumes had begun the next step.
        checkpoint = supervisor.checkpoint
        self._earlier_digest = checkpoint.state.get("ahead", "") if checkpoint else ""
        # Sampling ahead: in a thread of rank 0, which exchanges nothing with other ranks.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="infir2-rollouts")
        self._canceled = threading.Event()
        self._is_sampling_ahead = False
        self._ahead_future: Future[Rollouts] | None = None  # rank 0 only
        self._ahead: Rollouts | None = None  # on every rank, once it is finished

    def next_rollouts(self, step: int) -> Rollouts:
        """The rollouts of a step; afterwards the next step's may begin. Every rank calls this."""
        start = time.monotonic()
        self._publish_seconds = 0.0  # what an evaluation published is not part of a step
        self.sync_weights(step - 1)
        was_ahead = self._ahead is not None
        rollouts, self._ahead = self._ahead or self._sample(step), None
        self._split(time.monotonic() - start, was_ahead)
        self.state = {"cursor": self._prompts.cursor}
        if self._rl.asynchronous and step < self._last_step:
            self.state["ahead"] = self._digest
            self._start_ahead(step + 1)
        if isinstance(self._engine, CanSleep):
            self._engine.sleep()
        return rollouts

    def sync_weights(self, policy_version: int) -> None:
        """Publish the trainer's weights to the engine if its own are older.

        Waits for what the engine samples ahead. Every rank calls this.
        """
        if self._is_sampling_ahead:
            self._ahead = self._supervisor.all_gather_results(self._wait_for_ahead)[0]
            self._is_sampling_ahead = False
        if self._engine.policy_version != policy_version:
            start = time.monotonic()
            parallel_model = self._supervisor.trainer.parallel_model
            self._digest = publish(parallel_model, self._engine, policy_version)
            self._publish_seconds += time.monotonic() - start

    def engine_metrics(self) -> dict[str, float]:
        """What the engine counted since the last step; {} for one that counts nothing."""
        return self._engine.metrics() if isinstance(self._engine, OffersMetrics) else {}

    def __enter__(self) -> "RolloutPipeline":
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what is being sampled; finished groups are in the journal."""
        self._canceled.set()
        self._thread.shutdown()

    def _split(self, seconds: float, was_ahead: bool) -> None:
        sampled = self._generator.take_seconds()
        self.seconds = sampled | {"publish_seconds": self._publish_seconds}
        here = self._publish_seconds + (0.0 if was_ahead else sum(sampled.values()))
        self.seconds["wait_seconds"] = max(0.0, seconds - here)

    def _sample(self, step: int) -> Rollouts:
        self._journal.open(step, self._supervisor.saved_step)
        earlier, self._earlier_digest = self._earlier_digest, ""
        return self._collect(earlier, self._supervisor.all_gather_results)

    def _collect(self, earlier_digest: str, run_on_ranks: RunOnRanks) -> Rollouts:
        return collect_rollouts(
            self._prompts, self._generator, self._rl, self._digest, earlier_digest, run_on_ranks
        )

    def _start_ahead(self, step: int) -> None:
        self._journal.open(step, self._supervisor.saved_step)
        self._is_sampling_ahead = True
        if self._supervisor.ranks.is_rank0:
            self._ahead_future = self._thread.submit(self._collect, "", self._run_here)

    def _run_here(self, work: Any) -> list[list[Group]]:
        """`RunOnRanks` for the thread: run `work` on this rank only, until the run ends."""

        def check() -> None:
            if self._canceled.is_set():
                raise Interrupted("the run ended")

        return [work(check)]

    def _wait_for_ahead(self, check: Check) -> Rollouts | None:
        if self._ahead_future is None:
            return None
        while not wait([self._ahead_future], timeout=_POLL_SECONDS).done:
            check()
        return self._ahead_future.result()
