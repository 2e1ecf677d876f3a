"""SIGTERM and Ctrl-C end a run at the next step boundary, after a save; before and after the run they have other effects."""

import signal
import sys
import time
from types import FrameType

from infir2.errors import Interrupted, Preempted, UserError
from infir2.terminal import log_in_signal_handler


class CommandSignals:
    """While entered, SIGTERM ends the command at once with exit code 75 and a sentence; an empty `sentence` leaves signals alone.

    Once `has_own_end` is set, as a run does that begins, it only cuts `wait` short: a rank that is closing its run, done or
    failed, keeps its own exit code when the launcher sends SIGTERM to all.
    """

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence
        self._received = self.has_own_end = False

    def __enter__(self) -> "CommandSignals":
        if self._sentence:
            self._previous = signal.signal(signal.SIGTERM, self.stop)
        return self

    def __exit__(self, *_: object) -> None:
        if self._sentence:
            signal.signal(signal.SIGTERM, self._previous)

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True
        if not self.has_own_end:
            log_in_signal_handler(self._sentence)
            sys.exit(Preempted.exit_code)

    def wait(self, seconds: float) -> bool:
        """So long, or until SIGTERM; whether that came."""
        until = time.monotonic() + seconds
        while not self._received and time.monotonic() < until:
            time.sleep(0.05)
        return self._received


class StopSignals:
    """While entered, SIGTERM and SIGINT only set a flag; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        command = getattr(self._previous[signal.SIGTERM], "__self__", None)
        if isinstance(command, CommandSignals):
            command.has_own_end = True
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def error(self, what_was_saved: str) -> UserError:
        """The error that ends the command: exit code 75 after SIGTERM, 130 after Ctrl-C."""
        kind = Preempted if self.received == signal.SIGTERM else Interrupted
        return kind(
            f"stopped; {what_was_saved}; the same command goes on from there"
        ).on_all_ranks()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
