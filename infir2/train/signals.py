"""SIGTERM and Ctrl-C end a run at the next step boundary, after a save."""

import signal
from types import FrameType

from infir2.errors import Interrupted, Preempted, UserError


class StopSignals:
    """While entered, SIGTERM and SIGINT only set a flag; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def error(self, what_was_saved: str) -> UserError:
        """The error that ends the command: exit code 75 after SIGTERM, 130 after Ctrl-C."""
        kind = Preempted if self.received == signal.SIGTERM else Interrupted
        return kind(f"stopped; {what_was_saved}; the same command goes on from there").of_all_ranks()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
