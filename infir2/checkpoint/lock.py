"""One job per run directory: `flock` on `.lock`, with host, pid and start time inside for the sentence that refuses.

The kernel drops a `flock` when its process dies, however it dies. Where a network file system does not carry `flock`
between hosts, the file's time is the second evidence: a living holder touches it every few seconds.
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

from infir2.errors import OutputExistsError
from infir2.files import disk_errors

LOCK = ".lock"
BEAT_SECONDS = 15.0
WATCH_SECONDS = 25.0  # more than a beat, and what a busy host may be late with one
STALE_SECONDS = 90.0  # so long without a beat, and nobody waits for another

_held: dict[
    tuple[Path, int], "RunLock"
] = {}  # a process may open its own run directory more than once
_held_guard = (
    threading.RLock()
)  # the garbage collector may let go of one store's lock while the same thread takes another's


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
        """Take the lock or raise OutputExistsError; CheckpointError where the disk refuses.

        At once, but for a job on another host that let go of nothing: whether it lives shows in `WATCH_SECONDS`.
        `warn` hears of that, and of a dead job's lock that was taken over.
        """
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
            with contextlib.suppress(
                OSError
            ):  # a beat that fails only makes this lock look older than it is
                os.utime(self._fd)


def _open_locked(path: Path, run_dir: Path, warn: Callable[[str], None]) -> int:
    with disk_errors(f"{run_dir}: its lock file cannot be written"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _take(fd, path, run_dir, warn)
        except BaseException:
            os.close(fd)
            raise
    return fd


def _take(fd: int, path: Path, run_dir: Path, warn: Callable[[str], None]) -> None:
    holder = _read_holder(fd)
    granted = _try_lock(fd, run_dir, holder, warn)
    if holder and holder.get("host") != socket.gethostname():
        granted = _await_silence(fd, granted, path, run_dir, holder, warn)
    if not granted:
        raise OutputExistsError(_refusal(path, run_dir, holder))
    if holder:
        warn(
            f"{run_dir}: took over the lock of a job that ended without letting go ({_describe(holder)})."
        )
    content = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(content).encode(), 0)
    os.utime(fd)


def _try_lock(
    fd: int, run_dir: Path, holder: dict[str, object], warn: Callable[[str], None]
) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        warn(
            f"{run_dir}: its file system has no locks; only the lock file's age tells whether another job works here."
        )
        return not _is_alive_here(holder)
    return True


def _read_holder(fd: int) -> dict[str, object]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, object]) -> str:
    return f"pid {holder.get('pid', '?')} on {holder.get('host', '?')}, started {holder.get('started', '?')}"


def _is_alive_here(holder: dict[str, object]) -> bool:
    return (
        holder.get("host") == socket.gethostname() and Path(f"/proc/{holder.get('pid')}").exists()
    )


def _refusal(path: Path, run_dir: Path, holder: dict[str, object]) -> str:
    if holder.get("host") == socket.gethostname() and not _is_alive_here(holder):
        return f"{run_dir}: its job ({_describe(holder)}) is dead but a child of it is not; end the process that `fuser {path}` names."
    return f"{run_dir}: another job works in this run directory ({_describe(holder)}); stop that job or choose another run.dir."


def _await_silence(
    fd: int,
    granted: bool,
    path: Path,
    run_dir: Path,
    holder: dict[str, object],
    warn: Callable[[str], None],
) -> bool:
    """Whether the lock is ours once a holder on another host has missed a beat; OutputExistsError at its next sign of life.

    It is asked for again until `STALE_SECONDS`: a file server keeps the lock of a host that died for a while.
    """
    last_beat = os.fstat(fd).st_mtime_ns
    os.utime(fd)  # the file server's clock, not ours, says what time it is now
    age = (os.fstat(fd).st_mtime_ns - last_beat) / 1e9
    os.utime(fd, ns=(last_beat, last_beat))
    if granted and age >= STALE_SECONDS:
        return True
    warn(
        f"{run_dir}: its last job was on another host ({_describe(holder)}); waiting for a sign of life from it, {WATCH_SECONDS:.0f} s."
    )
    began = time.monotonic()
    while (waited := time.monotonic() - began) < WATCH_SECONDS or (
        not granted and waited < STALE_SECONDS
    ):
        time.sleep(WATCH_SECONDS / 50)
        watched = os.open(
            path, os.O_RDONLY
        )  # only opening a file makes NFS ask its server for news
        beat = os.fstat(watched).st_mtime_ns
        os.close(watched)
        if beat != last_beat:
            raise OutputExistsError(_refusal(path, run_dir, holder))
        granted = granted or _try_lock(fd, run_dir, holder, warn)
    return granted
