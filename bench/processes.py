"""Commands as processes, some at once, until a time limit: for studies of many runs."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from infir2.errors import Preempted

Run = TypeVar("Run")
Process = subprocess.Popen[bytes]
POLL_SECONDS = 0.1


def run_processes(
    waiting: list[Run],
    take: Callable[[Sequence[Run]], Run | None],
    start: Callable[[Run], Process],
    finish: Callable[[Run, int], object],
    *,
    jobs: int,
    seconds: float,
    grace_seconds: float,
    may_wait: Callable[[], bool] = lambda: False,
) -> None:
    """Start what `take` chooses of `waiting`, at most `jobs` at once, and `finish` it with its exit
    code. What has not begun stays in `waiting`.

    Ends if nothing runs and nothing can be taken, unless it `may_wait`. After `seconds` what runs
    gets SIGTERM, and is killed after `grace_seconds`.
    """
    end, active = time.monotonic() + seconds, dict[Process, Run]()
    try:
        while (waiting or active) and time.monotonic() < end:
            while len(active) < jobs and (run := take(waiting)) is not None:
                waiting.remove(run)
                active[start(run)] = run
            if not active and not may_wait():
                break
            time.sleep(POLL_SECONDS)
            for process in [process for process in active if process.poll() is not None]:
                finish(active.pop(process), process.returncode)
    finally:
        _stop(list(active), grace_seconds)
        for process, run in active.items():
            finish(run, process.returncode)


def _stop(active: Sequence[Process], grace_seconds: float) -> None:
    """Let the runs save and end; whatever happens, none is left."""
    for process in active:
        process.send_signal(signal.SIGTERM)
    end = time.monotonic() + grace_seconds
    try:
        while any(process.poll() is None for process in active) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
    finally:
        for process in active:
            process.kill()
            process.wait()


def start_logged(command: Sequence[str], run_dir: Path, **variables: str) -> Process:
    """Start a run whose output is added to `run_dir`.log."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | variables
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def tell(run_dir: Path, code: int, words: str = "") -> None:
    """Print how a run has ended, with its last lines if it has failed."""
    print(f"{time.strftime('%H:%M:%S')} {run_dir.name}: exit code {code}{words}", flush=True)
    if code not in (0, Preempted.exit_code):
        print(run_dir.with_suffix(".log").read_text(errors="replace")[-2000:], flush=True)
