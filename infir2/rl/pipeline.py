"""When a step's rollouts are sampled: as the step begins, or ahead, while earlier steps train.

With K = `rl.max_off_policy_steps` = 0, step n trains on responses of policy version n - 1, the
newest. Otherwise the engine receives new weights every K steps: as step n = K, 2K, ... begins, it
gets version n - 1, and samples the steps n + 1 to n + K while they and step n train. Their
responses are 1 to K versions older than the newest. Which version samples a step does not depend on
who is faster, and nobody waits for the other as long as both take equally long over K steps.
"""

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from infir2.checkpoint import Checkpoint
from infir2.config.schema import RlRecipe
from infir2.engines.types import CanSleep, OffersMetrics, RolloutEngine
from infir2.engines.weight_sync import publish
from infir2.errors import Interrupted
from infir2.rl.dynamic_sampling import (
    Check,
    GroupGenerator,
    Rollouts,
    RunningGroup,
    RunOnRanks,
    Sampled,
    collect_rollouts,
)
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
            verify_seconds, which a run that samples ahead spends while it trains; publish_seconds;
            wait_seconds, the rest of `next_rollouts`.
    """

    def __init__(
        self,
        recipe: RlRecipe,
        prompts: PromptStream,
        generator: GroupGenerator,
        journal: Journal,
        engine: RolloutEngine,
        weights_digest: str,
        supervisor: Supervisor,
        fixed_state: dict[str, Any] | None = None,
    ) -> None:
        """`weights_digest` is that of the weights that `engine` holds. If nothing is trained, so
        that all steps are sampled with these, `fixed_state` is that of the last sampled step."""
        self.state: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._publish_seconds = 0.0
        self._recipe, self._rl, self._prompts = recipe, recipe.rl, prompts
        self._generator, self._journal = generator, journal
        self._engine, self._digest = engine, weights_digest
        self._supervisor, self._is_fixed = supervisor, fixed_state is not None
        self._last_step = last_step_of(supervisor.recipe, supervisor.recipe.schedule)
        self._carried: list[RunningGroup] = []
        self._resume(supervisor.checkpoint, fixed_state)
        # Sampling ahead: in a thread of rank 0, which exchanges nothing with other ranks.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="infir2-rollouts")
        self._canceled = threading.Event()
        self._ahead_digests: list[str] = []  # of the weights that sample ahead
        self._num_ahead = 0  # steps that are sampled ahead and not collected
        self._futures: deque[Future[Rollouts]] = deque()  # theirs, on rank 0 only
        self._collected: deque[Rollouts] = deque()  # on every rank

    def _resume(self, checkpoint: Checkpoint | None, fixed_state: dict[str, Any] | None) -> None:
        """Learn which weights had sampled the next steps, and which groups they continue."""
        self._earlier_digests, self._carried_names = [
            checkpoint.value(name, list) if checkpoint and name in checkpoint.state else []
            for name in ("ahead", "carried")
        ]
        if fixed_state is not None:
            self._earlier_digests, self._carried_names = [], fixed_state.get("carried", [])
        self._earlier_until = self._end_of_block(checkpoint.step if checkpoint else 0)

    def _end_of_block(self, step: int) -> int:
        """The last step that the weights which the engine has after `step` began sample."""
        size = max(1, self._rl.max_off_policy_steps)
        return min(self._last_step, (step // size + 1) * size)

    def next_rollouts(self, step: int) -> Rollouts:
        """The rollouts of a step; afterwards the next ones may begin. Every rank calls this."""
        start = time.monotonic()
        self._publish_seconds = 0.0  # what an evaluation published is not part of a step
        if self._num_ahead and not self._collected:
            self._collect_ahead()
        was_ahead = bool(self._collected)
        rollouts = self._collected.popleft() if was_ahead else self._sample(step)
        is_ahead = self._num_ahead > 0 or bool(self._collected)
        samples_ahead = self._rl.max_off_policy_steps and not self._is_fixed
        if samples_ahead and step < self._last_step and not is_ahead:
            self.sync_weights(step - 1)
            self._start_ahead(step + 1)
            is_ahead = True
        self.state = rollouts.state | ({"ahead": self._ahead_digests} if is_ahead else {})
        self._split(time.monotonic() - start, was_ahead)
        if isinstance(self._engine, CanSleep) and not self._is_fixed:
            self._engine.sleep()
        return rollouts

    def sync_weights(self, policy_version: int) -> None:
        """Publish the trainer's weights to the engine if its own are older.

        Waits for what the engine samples ahead. Every rank calls this.
        """
        while self._num_ahead:
            self._collect_ahead()
        if self._engine.policy_version != policy_version and not self._is_fixed:
            start = time.monotonic()
            parallel_model = self._supervisor.trainer.parallel_model
            self._digest = publish(parallel_model, self._engine, policy_version, self._recipe)
            self._publish_seconds += time.monotonic() - start

    def engine_metrics(self) -> dict[str, float]:
        """What the engine counted since the last step; {} for one that counts nothing."""
        return self._engine.metrics() if isinstance(self._engine, OffersMetrics) else {}

    def __enter__(self) -> "RolloutPipeline":
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what is being sampled; finished groups are in the journal."""
        self._canceled.set()
        self._thread.shutdown(cancel_futures=True)

    def _split(self, seconds: float, was_ahead: bool) -> None:
        sampled = self._generator.take_seconds()
        self.seconds = sampled | {"publish_seconds": self._publish_seconds}
        here = self._publish_seconds + (0.0 if was_ahead else sum(sampled.values()))
        self.seconds["wait_seconds"] = max(0.0, seconds - here)

    def _sample(self, step: int) -> Rollouts:
        self.sync_weights(step - 1)
        saved_step = step - 1 if self._is_fixed else self._supervisor.saved_step
        self._journal.open(step, step, saved_step)
        self._find_carried()
        return self._collect(step, self._digests(step), self._supervisor.all_gather_results)

    def _digests(self, step: int) -> list[str]:
        """Of the weights whose responses a step may use; the last is the engine's."""
        earlier = self._earlier_digests if step <= self._earlier_until else []
        return [*earlier, self._digest]

    def _find_carried(self) -> None:
        """The groups that a resumed run continues in its first step."""
        drawn = [self._prompts.named(name) for name in self._carried_names]
        self._carried += [self._generator.carried(each) for each in drawn if each]
        self._carried_names = []

    def _collect(self, step: int, digests: list[str], run_on_ranks: RunOnRanks) -> Rollouts:
        self._journal.begin(step)
        rollouts, self._carried = collect_rollouts(
            self._prompts, self._generator, self._rl, self._carried, digests, run_on_ranks
        )
        if self._carried:
            self._generator.carry(step + 1, self._carried)
        return rollouts

    def _start_ahead(self, first: int) -> None:
        """Sample the steps from `first` on that the engine's weights sample."""
        last = self._end_of_block(first - 1)
        self._journal.open(first, last, self._supervisor.saved_step)
        self._num_ahead, self._ahead_digests = last - first + 1, self._digests(first)
        if self._supervisor.ranks.is_rank0:
            for step in range(first, last + 1):
                words = (step, self._ahead_digests, self._run_here)
                self._futures.append(self._thread.submit(self._collect, *words))

    def _collect_ahead(self) -> None:
        """Wait for the next step that is sampled ahead. Every rank calls this."""
        rollouts = self._supervisor.all_gather_results(self._wait_for_ahead)[0]
        assert rollouts is not None, "rank 0 samples ahead"
        self._collected.append(rollouts)
        self._num_ahead -= 1

    def _run_here(self, work: Any) -> list[Sampled]:
        """`RunOnRanks` for the thread: run `work` on this rank only, until the run ends."""

        def check() -> None:
            if self._canceled.is_set():
                raise Interrupted("the run ended")

        return [work(check)]

    def _wait_for_ahead(self, check: Check) -> Rollouts | None:
        if not self._supervisor.ranks.is_rank0:
            return None
        future = self._futures.popleft()
        while not wait([future], timeout=_POLL_SECONDS).done:
            check()
        return future.result()
