"""What stops a run that trains badly: loss spikes and steps that had to be skipped."""

import math
from collections import deque
from collections.abc import Sequence

from infir2.config.schema import TrainSection
from infir2.data import Batch
from infir2.errors import CheckFailedError, NonFiniteError
from infir2.parallel.ranks import Ranks
from infir2.train.run_log import RunLog
from infir2.train.trainer import StepResult

WINDOW_STEPS, MIN_WINDOW_STEPS = 100, 10
SPIKE_FACTOR = 2.0
SPIKE_PATIENCE_STEPS = 4


class SpikeMonitor:
    """Finds losses far above the mean of the last ones (the rule of Composer's KillLossSpike).

    Example: after 20 losses near 2.0, four losses of 20.0 return 1, 2, 3, 4.
    """

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._consecutive = 0

    def add(self, loss: float) -> int:
        """Return how many consecutive steps, up to this one, are spikes; 0 if this one is none.

        A spike is not part of the mean.
        """
        if len(self._window) >= MIN_WINDOW_STEPS and loss > SPIKE_FACTOR * self.mean:
            self._consecutive += 1
        else:
            self._consecutive = 0
            self._window.append(loss)
        return self._consecutive

    @property
    def mean(self) -> float:
        return sum(self._window) / len(self._window)


class SpikeWatch:
    """Logs loss spikes, and ends the run after four in a row if `train.on_spike` is "stop".

    Example: `SpikeWatch("stop", log, previous_losses=[2.1, 2.0])`, then `check(step, loss, saved)`.
    """

    def __init__(self, on_spike: str, log: RunLog, previous_losses: Sequence[float]) -> None:
        self._on_spike, self._log = on_spike, log
        self._monitor = SpikeMonitor()
        for loss in previous_losses:
            self._monitor.add(loss)

    def check(self, step: int, loss: float, saved_step: int) -> None:
        """Raises CheckFailedError where the recipe asks for it."""
        if not math.isfinite(loss):
            return
        consecutive = self._monitor.add(loss)
        if consecutive in (1, SPIKE_PATIENCE_STEPS):
            mean = self._monitor.mean
            detail = f"loss {loss:.4g}, mean before {mean:.4g}, {consecutive} in a row"
            self._log.event(step, "loss_spike", detail)
        if consecutive >= SPIKE_PATIENCE_STEPS and self._on_spike == "stop":
            raise CheckFailedError(
                f"stopped at step {step}: the loss was over twice its mean {consecutive} steps in "
                f"a row. The newest checkpoint is step {saved_step}; resume from it or an older "
                "one with other data or a lower learning rate."
            )


class SkipWatch:
    """Logs skipped steps with their rows, and ends the run after too many non-finite ones."""

    def __init__(self, section: TrainSection, ranks: Ranks, log: RunLog) -> None:
        self._section, self._ranks, self._log = section, ranks, log
        self._consecutive = 0

    def check(
        self, step: int, result: StepResult, batches: Sequence[Batch], saved_step: int
    ) -> None:
        """Every rank calls this after each step. Raises NonFiniteError (exit code 17)."""
        if not result.skipped:
            self._consecutive = 0
            return
        if result.trained_tokens == 0:
            detail = "the step had no trained token; no parameter changed"
            self._log.event(step, "nothing_to_train", detail)
            return
        self._consecutive += 1
        # No rank knows which of them had the bad row: name the rows of all.
        own_rows = [origin for batch in batches for origin in batch.origins]
        rows = [origin for part in self._ranks.all_gather(own_rows) for origin in part]
        self._log.event(
            step,
            "non_finite",
            f"loss {result.loss}, gradient norm {result.gradient_norm}; no parameter changed; "
            f"rows {', '.join(dict.fromkeys(rows))}",
        )
        if self._consecutive >= self._section.max_nonfinite_steps:
            raise NonFiniteError(
                f"stopped at step {step}: the loss or the gradient was not finite "
                f"{self._consecutive} steps in a row. metrics.jsonl names their rows; the newest "
                f"checkpoint is step {saved_step}."
            ).on_all_ranks()
