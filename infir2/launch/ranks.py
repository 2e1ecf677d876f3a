"""How the launcher learns the exit code of every rank, and how it signals them.

torchrun returns 1 for every failure of its workers, and kills them 30 seconds after SIGTERM. So
each rank writes its pid and its exit code to files in the launcher's directory, and the launcher
signals the ranks itself:

    RANKS_DIR/HOST-PID/attempt-0/{rank-0.pid, rank-0.code, ...}    RANKS_DIR/HOST-PID/stop

HOST-PID names a launcher, one on each node; torchrun's restarts count the attempts.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

from infir2.files import write_atomically

RANKS_DIR_VARIABLE = "INFIR2_RANKS_DIR"
STOP_FILE = "stop"
INTERNAL_ERROR = 70
DIED = 71  # also stands for a rank without a code: it was killed
PREEMPTED, INTERRUPTED = 75, 130
# In order of severity. Every other code names a cause and outranks these: when one rank fails, the
# collectives of the others break, and they exit with 70 or 71.
_SEVERITY = (0, PREEMPTED, INTERRUPTED, DIED, INTERNAL_ERROR)
RESTARTABLE = (INTERNAL_ERROR, DIED)
CODE_OF_SIGNAL: dict[int, int] = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED}
_PR_SET_PDEATHSIG = 1


def worst_code(codes: Iterable[int]) -> int:
    """The code that best names the cause. Example: [75, 71, 2] -> 2; 71 if there is no code."""

    def severity(code: int) -> tuple[int, int]:
        return (_SEVERITY.index(code) if code in _SEVERITY else len(_SEVERITY), code)

    return max(codes, key=severity, default=DIED)


@contextlib.contextmanager
def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` for SIGTERM and SIGINT inside the block."""
    previous = {number: signal.signal(number, handler) for number in CODE_OF_SIGNAL}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent exits (Linux only).

    Otherwise ranks could outlive their launcher and hold the lock of the run.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def attempt_dirs(launcher_dir: Path) -> list[Path]:
    """The attempts of one launcher, oldest first."""
    return sorted(launcher_dir.glob("attempt-*"), key=lambda path: _number_in(path.name))


def exit_codes(attempt_dir: Path) -> dict[int, int]:
    """{rank: exit code} of the ranks that started; 71 for a rank without a code."""
    started = sorted(_number_in(path.stem) for path in attempt_dir.glob("rank-*.pid"))
    files = {rank: attempt_dir / f"rank-{rank}.code" for rank in started}
    return {rank: int(path.read_text()) if path.exists() else DIED for rank, path in files.items()}


def latest_exit_codes(launcher_dir: Path) -> dict[int, int]:
    """`exit_codes` of the newest attempt of one launcher."""
    return exit_codes(_latest_attempt(launcher_dir))


def worst_code_in(ranks_dir: Path) -> int:
    """The worst code of the newest attempts of all launchers that share a directory."""
    return worst_code(
        code
        for launcher_dir in ranks_dir.glob("*")
        for code in latest_exit_codes(launcher_dir).values()
    )


def signal_ranks(launcher_dir: Path, number: int) -> None:
    """Send a signal to every running rank of the newest attempt, and let no further rank start."""
    (launcher_dir / STOP_FILE).touch()
    for path in _latest_attempt(launcher_dir).glob("rank-*.pid"):
        if not path.with_suffix(".code").exists():
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), number)


def code_for_torchrun(code: int) -> int:
    """The exit code of a rank's process: `code`, or 0 where torchrun should not react to it.

    torchrun answers every failure with a traceback and a restart. Under `infir2 launch` a rank
    therefore exits with 0 if a restart cannot fix the cause: an orderly stop, bad data, a wrong
    recipe. With several nodes it exits with such an error's code, because torchrun has to stop the
    other nodes.
    """
    if not _is_launched():
        return code
    is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    is_stop = code in (PREEMPTED, INTERRUPTED)
    return 0 if is_stop or (is_one_node and code not in RESTARTABLE) else code


def run_rank(main: Callable[[], int]) -> int:
    """Run `main` and return the exit code of this process.

    Under `infir2 launch` the code of `main` is also written for the launcher. After a restart: if
    the previous attempt ended for a cause that a restart cannot fix, exit with the same code.
    """
    if not _is_launched():
        return main()
    die_with_parent()
    rank, restart = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    launcher_dir = Path(os.environ[RANKS_DIR_VARIABLE])
    attempt_dir = launcher_dir / f"attempt-{restart}"
    attempt_dir.mkdir(exist_ok=True)

    def leave(code: int) -> int:
        # torchrun may still send SIGTERM to all its workers; it must not change this code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        write_atomically(attempt_dir / f"rank-{rank}.code", str(code).encode())
        return code_for_torchrun(code)

    # Until main installs its own handlers there is nothing to save.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(leave(PREEMPTED)))
    write_atomically(attempt_dir / f"rank-{rank}.pid", str(os.getpid()).encode())
    if restart:
        previous = exit_codes(launcher_dir / f"attempt-{restart - 1}")
        if (code := worst_code(previous.values())) not in RESTARTABLE:
            return leave(code)
    try:
        return leave(PREEMPTED if (launcher_dir / STOP_FILE).exists() else main())
    except SystemExit as stop:  # SIGTERM before the run installed its handlers
        return leave(stop.code if isinstance(stop.code, int) else DIED)


def one_node_attempt_dir() -> Path | None:
    """Where the ranks of this attempt, all on this node, exchange files; else None."""
    is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if not _is_launched() or not is_one_node:
        return None
    restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
    return Path(os.environ[RANKS_DIR_VARIABLE]) / f"attempt-{restart}"


def _is_launched() -> bool:
    """Whether torchrun started this process under `infir2 launch`."""
    return bool(os.environ.get(RANKS_DIR_VARIABLE)) and "TORCHELASTIC_RESTART_COUNT" in os.environ


def _latest_attempt(launcher_dir: Path) -> Path:
    return (attempt_dirs(launcher_dir) or [launcher_dir])[-1]


def _number_in(name: str) -> int:
    """Example: "rank-12" -> 12"""
    return int(name.partition("-")[2])


if __name__ == "__main__":  # the last command of a batch script: python -m infir2.launch.ranks DIR
    sys.exit(worst_code_in(Path(sys.argv[1])))
