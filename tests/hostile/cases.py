"""One command on one hostile input, within bounds of time and memory."""

import contextlib
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from infir2.cli import main

CASE_SECONDS = 20
CASE_BYTES = 2**29
CODES = {0, 1, 2, 3, 4}  # done, or one sentence


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after `seconds`."""

    def end(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def check_command(command: list[str], capsys: object, name: str) -> int:
    """Run a command; it must end in a result or in one sentence, within the bounds."""
    capsys.readouterr()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with alarm(CASE_SECONDS):
        code = main(command)
    lines = capsys.readouterr().err.splitlines()
    error = "\n".join(line for line in lines if not line.endswith(" so far"))  # a slow machine
    assert code in CODES, f"{name}: exit code {code}, {error[-2000:]}"
    if code:
        assert error.startswith("infir2: error: "), f"{name}: {error[-2000:]}"
        assert error.isprintable(), f"{name}: {error[-2000:]}"  # which includes one line
        assert len(error) < 3000, name
    assert time.perf_counter() - started < CASE_SECONDS, name
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert grown < CASE_BYTES, f"{name}: {grown} bytes"
    return code


def files_below(root: Path) -> set[Path]:
    return set(root.rglob("*"))
