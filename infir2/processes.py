"""SIGTERM and Ctrl-C. Outside of a run they end the command; inside, they request a stop at the
next step boundary, after a save.

`process_signals` is the one owner of both handlers in a process. The command line enters
`process_signals.command(...)`, a training run enters `process_signals.run()` inside it.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from infir2.errors import Interrupted, Preempted
from infir2.terminal import log_in_signal_handler


class ProcessSignals:
    """What SIGTERM and SIGINT do in this process.

    Attributes:
        stop_signal: the signal that asked the current run to stop; None if there was none.
        keep_exit_code: SIGTERM no longer ends the command. Set when a run begins or an error is
            reported: a rank that is closing keeps its own exit code when the launcher sends SIGTERM
            to all ranks.
    """

    def __init__(self) -> None:
        self.stop_signal: int | None = None
        self.keep_exit_code = False
        self._terminated = False
        self._early_message = ""

    @contextmanager
    def command(self, early_message: str) -> Iterator["ProcessSignals"]:
        """Until a run begins, SIGTERM prints `early_message` and exits with code 75.

        With an empty message the handlers are left alone.
        """
        self.keep_exit_code = self._terminated = False
        self._early_message = early_message
        previous = signal.signal(signal.SIGTERM, self._end_command) if early_message else None
        try:
            yield self
        finally:
            if early_message:
                signal.signal(signal.SIGTERM, previous)

    @contextmanager
    def run(self) -> Iterator["ProcessSignals"]:
        """SIGTERM and SIGINT only set `stop_signal`; a second Ctrl-C raises KeyboardInterrupt."""
        self.stop_signal = None
        self.keep_exit_code = True
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, self._request_stop) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def wait_for_termination(self, seconds: float) -> bool:
        """Wait up to `seconds` for SIGTERM. Returns whether it arrived."""
        deadline = time.monotonic() + seconds
        while not self._terminated and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._terminated

    def _end_command(self, _number: int, _frame: FrameType | None) -> None:
        self._terminated = True
        if not self.keep_exit_code:
            log_in_signal_handler(self._early_message)
            sys.exit(Preempted.exit_code)

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_signal = number


process_signals = ProcessSignals()


def stop_error(number: int | None, outcome: str) -> Preempted | Interrupted:
    """The error that ends a stopped run: exit code 75 after SIGTERM, 130 after Ctrl-C."""
    kind = Preempted if number == signal.SIGTERM else Interrupted
    return kind(outcome).on_all_ranks()
