"""Whether a signal asks the run to stop, as all ranks see it."""

from infir2.parallel.ranks import Ranks
from infir2.processes import ProcessSignals


class StopFlag:
    """A stop signal that all ranks agree on.

    A signal reaches one rank first. Ranks act on it only after an exchange (a step's reduction, or
    `agree`), so that all of them stop at the same point.
    """

    def __init__(self, signals: ProcessSignals, ranks: Ranks) -> None:
        self._signals, self._ranks = signals, ranks
        self._agreed: int | None = None

    @property
    def received(self) -> int | None:
        """The signal that this process has received."""
        return self._signals.stop_signal

    @property
    def requested(self) -> int | None:
        """The signal on which all ranks have to stop now."""
        return self.received if self._ranks.size == 1 else self._agreed

    def set(self, number: int | None) -> None:
        """All ranks have learned of this signal, or of none, by an exchange of their own."""
        self._agreed = number

    def agree(self) -> None:
        """Exchange what the ranks have received. Every rank calls this at the same point."""
        self.set(next(filter(None, self._ranks.all_gather(self.received)), None))
