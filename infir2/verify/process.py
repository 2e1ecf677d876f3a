"""Messages to another process with deadlines, and killing it with all of its descendants."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from typing import Any

MAX_MESSAGE_BYTES = 4 << 20
_PR_SET_CHILD_SUBREAPER = 36


class Channel:
    """JSON objects over a socket, one per line, from an untrusted peer."""

    def __init__(self, end: socket.socket) -> None:
        self.socket, self.max_bytes = end, MAX_MESSAGE_BYTES
        self._received = bytearray()

    def send(self, message: dict[str, Any], seconds: float) -> None:
        """Send one message. Errors are ignored: `receive` reports a peer that ended or hangs."""
        self.socket.settimeout(seconds)
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """The next message; {} after the deadline, None if the peer ended or sent no JSON object.

        `deadline` is in seconds of the monotonic clock.
        """
        complete = b"\n" in self._received
        while not complete:
            left = deadline - time.monotonic()
            self.socket.settimeout(max(left, 1e-6))
            try:
                chunk = self.socket.recv(1 << 16)
            except TimeoutError:
                return {}
            except OSError:
                return None
            self._received += chunk
            if not chunk or len(self._received) > self.max_bytes:
                return None
            complete = b"\n" in chunk
            if left < 0 and not complete:  # a slow stream of bytes must not extend the deadline
                return {}
        line, _, self._received = self._received.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) and message else None


def adopt_orphans() -> None:
    """Adopt orphaned descendants of this process, so that `kill_tree` finds daemons too."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL `process` and all its descendants, also in other sessions, and reap it.

    The parent is stopped first and, if it called `adopt_orphans`, keeps orphans as children, so
    that nothing escapes between the listing and the kill.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        for _ in range(100):  # a fork bomb grows while it is killed; every round shrinks it
            descendants = living_descendants(process.pid)
            if not descendants:
                break
            for pid in descendants:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.kill()
    process.wait()


def living_descendants(ancestor: int) -> list[int]:
    """Ids of the descendants of `ancestor`, without zombies."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError, IndexError), open(f"/proc/{entry}/stat", "rb") as stat:
            state, parent = stat.read().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                children.setdefault(int(parent), []).append(int(entry))
    family = [ancestor]
    for process in family:  # the list grows during the loop
        family += children.get(process, [])
    return family[1:]
