"""Loss spikes: steps whose loss is far above the mean of the steps before (the rule of Composer's KillLossSpike)."""

from collections import deque

WINDOW_STEPS, FEWEST_STEPS = 100, 10
FACTOR = 2.0
PATIENCE = 4


class SpikeMonitor:
    """Hears the loss of every step. Example: after 20 losses near 2.0, four of 20.0 give 1, 2, 3, 4."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._in_a_row = 0

    def add(self, loss: float) -> int:
        """How many steps in a row, this one included, are spikes; a spike does not move the mean."""
        if len(self._window) >= FEWEST_STEPS and loss > FACTOR * self.mean:
            self._in_a_row += 1
        else:
            self._in_a_row = 0
            self._window.append(loss)
        return self._in_a_row

    @property
    def mean(self) -> float:
        return sum(self._window) / len(self._window)
