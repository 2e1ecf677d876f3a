"""Which of several jobs may use a run directory where the file system has no `flock`.

Every job creates a file of its own in the directory and then lists those of the others:

    .lock-TOKEN-PID-START-HOST      empty while its job is deciding, not empty once it has won

A job that finds no other live claim wins. Of two jobs at least one finds the other's file, because
each creates its own before it lists. It gives up if the other one has won or has a smaller token;
otherwise it waits until the other one gives up or wins. So at most one wins, and of jobs that start
at once exactly one does.

A claim is never taken over: that of a dead job is ignored, and the winner removes it. So no
takeover can hit a live job. A job of this host is alive if its process is (PID, started at START);
one of another host sends heartbeats, by the modification time of its file.
"""

import contextlib
import functools
import hashlib
import os
import re
import secrets
import socket
import time
from pathlib import Path
from typing import NamedTuple

from infir2.files import open_own

POLL_SECONDS = 0.05
_NAME = re.compile(r"\.lock-[0-9a-f]{16}-(?P<pid>\d+)-(?P<start>\d+)-(?P<host>[0-9a-f]+)")


class _Rival(NamedTuple):
    """What was seen of another job's claim, and when that changed last (time.monotonic)."""

    mtime_ns: int
    size: int
    changed: float
    alive: bool | None  # None: on another host, and no heartbeat has been seen yet


class Claim:
    """This job's claim: `acquire`, `send_heartbeat`, `release`."""

    def __init__(self, directory: Path) -> None:
        """Create the file. Raises OSError."""
        pid = os.getpid()
        name = f".lock-{secrets.token_hex(8)}-{pid}-{process_start(pid) or 0}-{_host()}"
        self.path = directory / name
        self._fd = open_own(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    @classmethod
    def acquire(cls, directory: Path, silent_seconds: float) -> "Claim | None":
        """Claim the directory; None if another job has won it or is about to.

        A job of another host that sends no heartbeat for `silent_seconds` counts as dead. Raises
        OSError.
        """
        claim = cls(directory)
        try:
            if claim._wins(silent_seconds):
                return claim
        except BaseException:
            claim.release()
            raise
        claim.release()
        return None

    def _wins(self, silent_seconds: float) -> bool:
        rivals: dict[str, _Rival] = {}
        while True:
            self.send_heartbeat()
            names = [name for name in os.listdir(self.path.parent) if _NAME.fullmatch(name)]
            rivals = {
                name: seen
                for name in names
                if name != self.path.name
                and (seen := self._observe(name, rivals.get(name), silent_seconds)) is not None
            }
            if all(rival.alive is False for rival in rivals.values()):
                return self._win(list(rivals))
            if any(
                rival.alive and (rival.size or name < self.path.name)
                for name, rival in rivals.items()
            ):
                return False
            time.sleep(POLL_SECONDS)

    def _win(self, dead: list[str]) -> bool:
        os.write(self._fd, b"1")
        try:
            if not os.path.samestat(os.fstat(self._fd), self.path.lstat()):
                return False
        except FileNotFoundError:  # this process stood still for so long that it counted as dead
            return False
        for name in dead:
            with contextlib.suppress(OSError):
                (self.path.parent / name).unlink()
        return True

    def _observe(self, name: str, before: _Rival | None, silent_seconds: float) -> _Rival | None:
        """Look at another claim again; None if it is gone."""
        try:
            found = (self.path.parent / name).lstat()
        except FileNotFoundError:
            return None
        now = time.monotonic()
        changed = before.changed if before and before.mtime_ns == found.st_mtime_ns else now
        match = _NAME.fullmatch(name)
        assert match is not None
        alive: bool | None = None
        if match["host"] == _host():
            alive = process_start(int(match["pid"])) == int(match["start"])
        elif now - changed >= silent_seconds:
            alive = False
        elif before and (before.alive or before.mtime_ns != found.st_mtime_ns):
            alive = True
        return _Rival(found.st_mtime_ns, found.st_size, changed, alive)

    def send_heartbeat(self) -> None:
        os.utime(self._fd)

    def release(self) -> None:
        """Give the directory, or the attempt, up."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._fd)


@functools.cache
def _host() -> str:
    """Identifies this boot of this machine and its process numbers, which a container may have."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def process_start(pid: int) -> int | None:
    """When a process of this host was started, in clock ticks since boot; None if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])
