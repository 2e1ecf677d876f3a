"""The page of runs that still train, written again and again."""

import time
from collections.abc import Sequence
from pathlib import Path

from infir2.checkpoint.lock import is_running
from infir2.errors import Interrupted
from infir2.report.page import write_page
from infir2.report.read import Run, read_runs
from infir2.terminal import begin_phase, log

_CHECK_SECONDS = 1.0  # how soon the end of a run is seen


def follow(run_dirs: list[Path], out: Path, axis: str, every_seconds: float) -> Path:
    """Write the page to `out` every `every_seconds` until none of the runs is running; return it.

    The page loads itself again as often, but for the last one. Ctrl-C, too, writes the last page
    and raises Interrupted. Raises what `write_report` raises.
    """
    try:
        if not _write(run_dirs, out, axis, every_seconds):
            log("none of these runs is running: the page is written once")
            return out
        log(f"{out} is written every {every_seconds:g} s until the runs end; Ctrl-C stops that")
        while _wait(run_dirs, every_seconds):
            _write(run_dirs, out, axis, every_seconds)
    except KeyboardInterrupt:
        write_page(read_runs(run_dirs), out, axis)
        raise Interrupted(
            f"Stopped following; {out} stays as it is now, and the runs go on."
        ) from None
    write_page(read_runs(run_dirs), out, axis)
    log("the runs have ended, and this was their last page")
    return out


def _write(run_dirs: list[Path], out: Path, axis: str, every_seconds: float) -> bool:
    """Write a page; returns whether a run is running, and only then lets it load itself again."""
    runs = read_runs(run_dirs)
    running = [run for run in runs if is_running(run.path)]
    write_page(runs, out, axis, every_seconds if running else 0)
    begin_phase(f"following {_progress(running)}")
    return bool(running)


def _progress(running: Sequence[Run]) -> str:
    steps = (f"{run.train.steps[-1]:.0f}" if run.train else "0" for run in running)
    return ", ".join(f"{run.name} at step {s}" for run, s in zip(running, steps, strict=True))


def _wait(run_dirs: list[Path], seconds: float) -> bool:
    """Wait; returns False as soon as no run is running."""
    end = time.monotonic() + seconds
    paths = [path for given in run_dirs for path in (given, *given.glob("*/"))]
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _CHECK_SECONDS))
        if not any(map(is_running, paths)):
            return False
    return True
