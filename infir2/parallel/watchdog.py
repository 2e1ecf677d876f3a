"""A rank that hangs ends itself and says where: no process waits for ever for one that sleeps."""

import faulthandler
import os
import sys
import threading
import time

from infir2.errors import RankError
from infir2.terminal import log

GRACE_SECONDS = (
    3.0  # a rank that waits for a hanging one in a collective fails there first, and says so
)


class Watchdog:
    """Ends this process with code 71 when `beat` has not been called for `timeout_seconds` (and a little more), after printing every
    thread's stack.

    Example: `watch.beat("step 7")`; later on stderr: "infir2: rank 3 gave no sign of life for 600 s in step 7; ..."
    """

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self.rank, self.timeout_seconds = rank, timeout_seconds
        self.phase = "start"
        self._last = time.monotonic()
        self._done = threading.Event()
        threading.Thread(target=self._run, name="infir2-watch", daemon=True).start()

    def beat(self, phase: str) -> None:
        """A sign of life; `phase` says what begins."""
        self.phase, self._last = phase, time.monotonic()

    def close(self) -> None:
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(min(1.0, self.timeout_seconds / 4)):
            if time.monotonic() - self._last > self.timeout_seconds + GRACE_SECONDS:
                log(
                    f"rank {self.rank} gave no sign of life for {self.timeout_seconds:g} s in {self.phase}; the stacks of its "
                    "threads follow. A longer pause that is no fault needs parallel.timeout_seconds."
                )
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(RankError.exit_code)
