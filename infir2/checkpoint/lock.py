"""One job per run directory: `flock` on `.lock`, with host, pid and start time inside for the sentence that refuses.

The kernel drops a `flock` when its process dies, however it dies. Where a network file system does not carry `flock`
between hosts, the file's age is the second evidence: a living holder touches it every few seconds.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from infir2.errors import CheckpointError, OutputExistsError

LOCK = ".lock"
BEAT_SECONDS = 15.0
STALE_SECONDS = 90.0

_held: dict[tuple[Path, int], "RunLock"] = {}  # a process may open its own run directory more than once
_held_guard = threading.Lock()


class RunLock:
    """The lock of one run directory, held by this process. Make it with `RunLock.acquire`, let go with `release`."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd
        self._pid = os.getpid()
        self._users = 1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="infir2-run-lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, run_dir: Path, warn: Callable[[str], None]) -> "RunLock":
        """Take the lock or raise OutputExistsError at once; `warn` hears of a dead job's lock that was taken over."""
        path = run_dir.resolve() / LOCK
        with _held_guard:
            lock = _held.get((path, os.getpid()))
            if lock is None:
                lock = _held[path, os.getpid()] = cls(path, _open_locked(path, run_dir, warn))
            else:
                lock._users += 1
        return lock

    def release(self) -> None:
        """Let go; the last user of this process clears the file's content, so that no one takes it for a crash."""
        if os.getpid() != self._pid:  # a forked child must not let go of its parent's lock
            return
        with _held_guard:
            self._users -= 1
            if self._users > 0:
                return
            _held.pop((self._path, os.getpid()), None)
        self._stop.set()
        self._thread.join(timeout=1)
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
        os.close(self._fd)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a beat that fails only makes this lock look older than it is
                os.utime(self._fd)


def _open_locked(path: Path, run_dir: Path, warn: Callable[[str], None]) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        reason = f"{error.strerror}, errno {error.errno}"
        raise CheckpointError(f"{run_dir}: the lock file cannot be opened ({reason}); make the directory writable.") from error
    try:
        holder = _read_holder(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExistsError(_refusal(path, run_dir, holder)) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            warn(f"{run_dir}: its file system has no locks; only the lock file's age tells whether another job works here.")
            if _is_alive_here(holder):
                raise OutputExistsError(_refusal(path, run_dir, holder)) from error
        if holder:
            _check_stale(fd, path, run_dir, holder, warn)
        os.ftruncate(fd, 0)
        content = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(fd, json.dumps(content).encode(), 0)
        os.utime(fd)
        return fd
    except BaseException:
        os.close(fd)
        raise


def _read_holder(fd: int) -> dict[str, object]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, object]) -> str:
    return f"pid {holder.get('pid', '?')} on {holder.get('host', '?')}, started {holder.get('started', '?')}"


def _is_alive_here(holder: dict[str, object]) -> bool:
    return holder.get("host") == socket.gethostname() and Path(f"/proc/{holder.get('pid')}").exists()


def _refusal(path: Path, run_dir: Path, holder: dict[str, object]) -> str:
    if holder.get("host") == socket.gethostname() and not _is_alive_here(holder):
        return f"{run_dir}: its job ({_describe(holder)}) is dead but a child of it is not; end the process that `fuser {path}` names."
    return f"{run_dir}: another job works in this run directory ({_describe(holder)}); stop that job or choose another run.dir."


def _check_stale(fd: int, path: Path, run_dir: Path, holder: dict[str, object], warn: Callable[[str], None]) -> None:
    """The kernel gave us the lock but its content was never cleared: the holder died, or sits on a host that shares no locks."""
    if holder.get("host") != socket.gethostname():
        last_beat = os.fstat(fd).st_mtime
        os.utime(fd)  # the file server's clock, not ours, says what time it is now
        age = os.fstat(fd).st_mtime - last_beat
        os.utime(fd, (last_beat, last_beat))
        if age < STALE_SECONDS:
            raise OutputExistsError(
                f"{run_dir}: a job on another host ({_describe(holder)}) showed life {age:.0f} s ago; "
                f"stop it, or if it is dead try again in {STALE_SECONDS - age:.0f} s, or remove {path}."
            )
    warn(f"{run_dir}: took over the lock of a job that ended without letting go ({_describe(holder)}).")
