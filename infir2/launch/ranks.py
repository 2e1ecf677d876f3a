"""How the code of every rank reaches the one who launched it, and a signal every rank.

torchrun returns 1 whatever its workers ended with, and gives them 30 seconds after SIGTERM. So each rank leaves a file with
its pid and one with its exit code in the launcher's directory, and the launcher signals the ranks themselves:

    LAUNCH_DIR/HOST-PID/attempt-0/{rank-0.pid, rank-0.code, ...}    LAUNCH_DIR/HOST-PID/stop
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

VARIABLE = "INFIR2_RANKS_DIR"
STOP = "stop"
DIED = 71  # a rank that left no code was killed
PREEMPTED, INTERRUPTED = 75, 130
# From mild to bad. Any other code names a cause, and outranks its echo on other ranks (70, 71 of a broken collective).
_MILD_TO_BAD = (0, PREEMPTED, INTERRUPTED, DIED, 70)
RESTARTED = (70, DIED)
STOPPED_BY: dict[int, int] = {
    signal.SIGTERM: PREEMPTED,
    signal.SIGINT: INTERRUPTED,
}  # signal -> code of what it ended
_PR_SET_PDEATHSIG = 1


def worst_code(codes: Iterable[int]) -> int:
    """The code that says most about what went wrong. Example: [75, 71, 2] -> 2; no codes at all -> 71."""
    return max(
        codes,
        key=lambda code: (
            _MILD_TO_BAD.index(code) if code in _MILD_TO_BAD else len(_MILD_TO_BAD),
            code,
        ),
        default=DIED,
    )


@contextlib.contextmanager
def stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Meanwhile SIGTERM and Ctrl-C go to `handler`."""
    previous = {number: signal.signal(number, handler) for number in STOPPED_BY}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def die_with_parent() -> None:
    """SIGKILL this process when its parent ends, so that no rank outlives its launcher and keeps the run's lock (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def attempt_dirs(place: Path) -> list[Path]:
    """Attempts of one launcher, oldest first."""
    return sorted(place.glob("attempt-*"), key=lambda path: int(path.name.partition("-")[2]))


def codes_of(attempt: Path) -> dict[int, int]:
    """{rank: code} of the ranks that started; 71 for one without a code."""
    started = [int(path.stem.partition("-")[2]) for path in attempt.glob("rank-*.pid")]
    files = {rank: attempt / f"rank-{rank}.code" for rank in sorted(started)}
    return {rank: int(path.read_text()) if path.exists() else DIED for rank, path in files.items()}


def last_codes(place: Path) -> dict[int, int]:
    """Those of one launcher's newest attempt."""
    return codes_of((attempt_dirs(place) or [place])[-1])


def gathered_code(directory: Path) -> int:
    """The worst code of the last attempt of every launcher that wrote into a shared directory."""
    return worst_code(code for place in directory.glob("*") for code in last_codes(place).values())


def signal_ranks(place: Path, number: int) -> None:
    """Ask every rank of the newest attempt to stop; those that have not started yet will not."""
    (place / STOP).touch()
    for path in (attempt_dirs(place) or [place])[-1].glob("rank-*.pid"):
        if not path.with_suffix(".code").exists():
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), number)


def code_for_torchrun(code: int) -> int:
    """What the process of a rank ends with: `code`, after which torchrun ends the others, or 0, after which they go on.

    0 under `infir2 launch` for what a restart cannot better (an orderly stop, bad data, a wrong recipe): torchrun would restart
    and add a traceback. Only between nodes an error is needed to tell the others.
    """
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return (
        0
        if _launched()
        and (code in (PREEMPTED, INTERRUPTED) or (one_node and code not in RESTARTED))
        else code
    )


def _launched() -> bool:
    """Whether this process is one of torchrun's under `infir2 launch`."""
    return bool(os.environ.get(VARIABLE)) and "TORCHELASTIC_RESTART_COUNT" in os.environ


def run_rank(main: Callable[[], int]) -> int:
    """`main()`; under `infir2 launch`, its code is left for the launcher, and a rank restarted after one that no restart betters
    ends with that at once."""
    if not _launched():
        return main()
    die_with_parent()
    rank, restart = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    place = Path(os.environ[VARIABLE])
    attempt = place / f"attempt-{restart}"
    attempt.mkdir(exist_ok=True)

    def leave(code: int) -> int:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # this code stands, whatever torchrun sends to all
        _write(attempt / f"rank-{rank}.code", str(code))
        return code_for_torchrun(code)

    # until main has its own handlers there is nothing to save
    signal.signal(signal.SIGTERM, lambda *_: os._exit(leave(PREEMPTED)))
    _write(attempt / f"rank-{rank}.pid", str(os.getpid()))
    before = worst_code(codes_of(place / f"attempt-{restart - 1}").values()) if restart else DIED
    if before not in RESTARTED:
        return leave(before)
    try:
        return leave(PREEMPTED if (place / STOP).exists() else main())
    except SystemExit as stop:  # SIGTERM before the run had its own handler
        return leave(stop.code if isinstance(stop.code, int) else DIED)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":  # what a batch script ends with: python -m infir2.launch.ranks DIR
    sys.exit(gathered_code(Path(sys.argv[1])))
