"""Runs a server and ends all its processes when the trainer ends, however that happens.

    python -I -S process_guard.py COMMAND ARGUMENT...

A script of its own process that imports nothing of infir2. The trainer holds the other end of its
standard input: when that closes, or on SIGTERM, every descendant is killed. Processes that a server
starts and abandons become children of this one, so none is left. Its exit code is the server's.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from types import FrameType

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_SECONDS, KILL_SECONDS = 0.2, 20.0


def main(command: list[str]) -> int:
    """Returns the exit code of the command; 137 if it was killed because the trainer ended."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    is_over = False

    def end(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_over
        is_over = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
    trainer = os.getppid()
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        )
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    while server.poll() is None and not is_over and os.getppid() == trainer:
        if select.select([0], [], [], POLL_SECONDS)[0] and not os.read(0, 4096):
            break
    code = server.poll()
    kill_descendants()
    return 128 + signal.SIGKILL if code is None else code if code >= 0 else 128 - code


def kill_descendants() -> None:
    """Kill every descendant until none is left, or KILL_SECONDS are over."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            parents.setdefault(parent, []).append(int(name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
