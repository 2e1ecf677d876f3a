"""Kill a process together with everything it started, and leave no zombie."""

import ctypes
import os
import signal
import subprocess
from contextlib import suppress

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans, so that `kill_tree` on it finds daemons too."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL `process` and all its descendants, those in other sessions too, and reap it.

    The parent is stopped first and, when it called `adopt_orphans`, keeps orphans as children, so that nothing escapes
    between the look and the kill.
    """
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)
        for _ in range(100):  # a fork bomb grows while it is killed; every round leaves less of it
            descendants = _living_descendants(process.pid)
            if not descendants:
                break
            for pid in descendants:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _living_descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with suppress(OSError, IndexError), open(f"/proc/{entry}/stat", "rb") as stat:
            state, parent = stat.read().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                children.setdefault(int(parent), []).append(int(entry))
    found, todo = [], [ancestor]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found
