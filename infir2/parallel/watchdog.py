"""A watchdog that ends a hanging rank, so that the others do not wait forever."""

import faulthandler
import os
import sys
import threading
import time

from infir2.errors import RankError
from infir2.terminal import log

# The ranks that wait for a hanging one in a collective time out first, and report where.
GRACE_SECONDS = 3.0


class Watchdog:
    """Exits with code 71 when there is no `heartbeat` for `timeout_seconds` + GRACE_SECONDS.

    Before, it prints a message and the stacks of all threads to stderr. Example: after
    `watchdog.heartbeat("step 7")`, "rank 3 sent no heartbeat for 600 s in step 7; ...".
    """

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self.rank, self.timeout_seconds = rank, timeout_seconds
        self.phase = "start"
        self._last = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="infir2-watchdog", daemon=True).start()

    def heartbeat(self, phase: str) -> None:
        """Report progress; `phase` names what begins now, for the message."""
        self.phase, self._last = phase, time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(min(1.0, self.timeout_seconds / 4)):
            if time.monotonic() - self._last > self.timeout_seconds + GRACE_SECONDS:
                log(
                    f"rank {self.rank} sent no heartbeat for {self.timeout_seconds:g} s in "
                    f"{self.phase}; the stacks of its threads follow. If such a pause is normal, "
                    "raise parallel.timeout_seconds."
                )
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(RankError.exit_code)
