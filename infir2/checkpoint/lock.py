"""One job per run directory: `flock` on `.lock`, which holds host, pid and start time as JSON.

The kernel releases a `flock` when its process ends, however it ends. Some network file systems do
not share `flock` between hosts, or keep the lock of a dead host for a while. For these, a holder
updates the file's modification time every HEARTBEAT_SECONDS: a lock of another host is taken over
only if no heartbeat arrives for WATCH_SECONDS. A file system without `flock` is claim.py's.

Acquiring the lock creates the run directory. A start that fails must leave nothing behind, so
releasing it removes what this process created if nothing has been written meanwhile.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from infir2.checkpoint.claim import Claim, process_start
from infir2.errors import ConfigError, OutputExistsError, disk_reason
from infir2.files import disk_errors, open_own

LOCK = ".lock"
HEARTBEAT_SECONDS = 15.0
WATCH_SECONDS = 25.0  # one heartbeat, and the delay of a busy host
STALE_SECONDS = 90.0  # a lock without a heartbeat for so long is taken over without waiting

Warn = Callable[[str], None]

# A process may open its own run directory more than once.
_held: dict[tuple[Path, int], "RunLock"] = {}
# Reentrant: while a thread acquires a lock, the garbage collector may release another one in it.
_held_guard = threading.RLock()


class RunLock:
    """The lock of one run directory, held by this process: `RunLock.acquire(...)`, `release()`."""

    def __init__(self, path: Path, warn: Warn, run_dir: Path) -> None:
        self._path = path
        with disk_errors(f"{run_dir}: cannot be created or listed"):
            self._created = _create_directories(path.parent)
            self._found = set(path.parent.iterdir())  # what earlier jobs or the user left
        try:
            attempt = _open_locked(path, run_dir, warn)
        except BaseException:
            _remove_empty(self._created)
            raise
        self._fd, self._claim = attempt.fd, attempt.claim
        self._pid = os.getpid()
        self._users = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._send_heartbeats, name="infir2-run-lock", daemon=True
        )

    @classmethod
    def acquire(cls, run_dir: Path, warn: Warn) -> "RunLock":
        """Acquire the lock, or raise OutputExistsError if another job holds it.

        Returns or raises immediately, unless the last holder was on another host and did not
        release the lock: then it watches for a heartbeat. `warn` receives a sentence about that,
        and about the lock of a dead job that was taken over. Raises CheckpointError if the
        directory cannot be created or the file cannot be written.
        """
        path = run_dir.resolve() / LOCK
        with _held_guard:
            lock = _held.get((path, os.getpid()))
            if lock is None:
                lock = _held[path, os.getpid()] = cls(path, warn, run_dir)
            lock._users += 1
            is_new = lock._users == 1
        # Without the guard: a starting thread may collect garbage, which releases other locks.
        if is_new:
            lock._thread.start()
        return lock

    def release(self) -> None:
        """Release the lock when the last user of this process calls this.

        The file is emptied, so that the next holder does not report a crash; after a start that
        wrote nothing it is removed.
        """
        if os.getpid() != self._pid:  # a forked child must not release the lock of its parent
            return
        with _held_guard:
            self._users -= 1
            if self._users > 0:
                return
            _held.pop((self._path, os.getpid()), None)
        self._stop.set()
        if threading.current_thread() is not self._thread:  # which may collect garbage too
            self._thread.join(timeout=1)
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            if self._path not in self._found and _is_file(self._fd, self._path):
                self._remove_traces()
        self._release_claim()
        os.close(self._fd)

    def _remove_traces(self) -> None:
        """Remove what this process created if it wrote nothing into it; the lock goes last."""
        own = {self._path} | ({self._claim.path} if self._claim else set())
        created = set(self._path.parent.iterdir()) - self._found - own
        if not all(map(_is_empty, created)):
            return
        for entry in created:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._path.unlink()
        self._release_claim()
        _remove_empty(self._created)

    def _release_claim(self) -> None:
        if self._claim:
            self._claim.release()
            self._claim = None

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a missed heartbeat only makes the lock look older
                os.utime(self._fd)
                if self._claim:
                    self._claim.send_heartbeat()


def _create_directories(directory: Path) -> list[Path]:
    """Create `directory`; returns those that did not exist, the innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    if (directory / "config.json").is_file() and not (directory / "recipe.toml").exists():
        raise ConfigError(
            f"run.dir: {directory} holds a model (config.json), and a run would write into it; "
            "name a new directory."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise ConfigError(
            f"run.dir: {directory} cannot be created ({disk_reason(error)}); name a directory that "
            "can be."
        ) from error
    return missing


def _remove_empty(directories: list[Path]) -> None:
    with contextlib.suppress(OSError):  # one of them is in use
        for directory in directories:
            directory.rmdir()


def _is_empty(entry: Path) -> bool:
    """Whether this is an empty file, or a directory with nothing but such files."""
    return all(path.is_dir() or not path.stat().st_size for path in (entry, *entry.rglob("*")))


def _open_locked(path: Path, run_dir: Path, warn: Warn) -> "_Attempt":
    with disk_errors(f"{run_dir}: its lock file cannot be written"):
        while True:
            attempt = _Attempt(path, run_dir, warn)
            try:
                attempt.acquire()
                if _is_file(attempt.fd, path):
                    return attempt
            except BaseException:
                attempt.abandon()
                raise
            attempt.abandon()


def _is_file(fd: int, path: Path) -> bool:
    """False if the file was removed, or its directory moved, after it was opened here."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


class _Attempt:
    """One attempt to acquire a lock.

    Attributes:
        fd: of the lock file.
        claim: what holds the directory where the file system has no `flock`.
    """

    def __init__(self, path: Path, run_dir: Path, warn: Warn) -> None:
        self._path, self._run_dir, self._warn = path, run_dir, warn
        self.fd = open_own(path, os.O_RDWR | os.O_CREAT)
        self.claim: Claim | None = None

    def abandon(self) -> None:
        if self.claim:
            self.claim.release()
        os.close(self.fd)

    def acquire(self) -> None:
        """Raises OutputExistsError if another job holds the lock."""
        holder = _read_holder(self.fd)
        acquired = self._flock(holder)
        if holder and holder.get("host") != socket.gethostname():
            acquired = self._watch_other_host(acquired, holder)
        if not acquired:
            raise OutputExistsError(self._refusal(holder))
        if holder:
            self._warn(
                f"{self._run_dir}: took over the lock of a job that ended without releasing it "
                f"({_describe(holder)})."
            )
        pid = os.getpid()
        content = {
            "host": socket.gethostname(),
            "pid": pid,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "process_start": process_start(pid),
        }
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, json.dumps(content).encode(), 0)
        os.utime(self.fd)

    def _flock(self, holder: dict[str, object]) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            self._warn(
                f"{self._run_dir}: its file system has no locks; "
                f"a file {self._path.name}-... of each job shows who uses this run directory."
            )
            self.claim = Claim.acquire(self._path.parent, WATCH_SECONDS)
            if self.claim is None:
                raise OutputExistsError(self._refusal(_read_holder(self.fd))) from None
            return not _runs_on_this_host(holder)
        return True

    def _refusal(self, holder: dict[str, object]) -> str:
        if holder.get("host") == socket.gethostname() and not _runs_on_this_host(holder):
            return (
                f"{self._run_dir}: its job ({_describe(holder)}) is dead but one of its child "
                f"processes is not; end the process that `fuser {self._path}` names."
            )
        return (
            f"{self._run_dir}: another job uses this run directory ({_describe(holder)}); "
            "stop that job or choose another run.dir."
        )

    def _watch_other_host(self, acquired: bool, holder: dict[str, object]) -> bool:
        """Wait for a heartbeat of a holder on another host. Returns whether the lock is ours.

        Raises OutputExistsError at the next heartbeat. A file server may keep the lock of a dead
        host, so a lock that was not `acquired` is requested again until STALE_SECONDS.
        """
        last_heartbeat = os.fstat(self.fd).st_mtime_ns
        os.utime(self.fd)  # the age must be measured by the file server's clock, not ours
        age_seconds = (os.fstat(self.fd).st_mtime_ns - last_heartbeat) / 1e9
        os.utime(self.fd, ns=(last_heartbeat, last_heartbeat))
        if acquired and age_seconds >= STALE_SECONDS:
            return True
        self._warn(
            f"{self._run_dir}: its last job was on another host ({_describe(holder)}); "
            f"waiting {WATCH_SECONDS:.0f} s for a heartbeat."
        )
        began = time.monotonic()
        while (waited := time.monotonic() - began) < WATCH_SECONDS or (
            not acquired and waited < STALE_SECONDS
        ):
            time.sleep(WATCH_SECONDS / 50)
            if self.claim:
                self.claim.send_heartbeat()
            if self._heartbeat() != last_heartbeat:
                raise OutputExistsError(self._refusal(holder))
            acquired = acquired or self._flock(holder)
        return acquired

    def _heartbeat(self) -> int:
        fresh_fd = open_own(self._path, os.O_RDONLY)  # NFS fetches new attributes only on open
        try:
            return os.fstat(fresh_fd).st_mtime_ns
        finally:
            os.close(fresh_fd)


def _read_holder(fd: int) -> dict[str, object]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    is_whole = isinstance(holder, dict) and isinstance(holder.get("pid"), int)
    return holder if is_whole else {}


def is_running(run_dir: Path) -> bool:
    """Whether a job uses this run directory, without acquiring its lock.

    A job of another host is believed for STALE_SECONDS after its last heartbeat.
    """
    try:
        fd = open_own(run_dir / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        holder, age = _read_holder(fd), time.time() - os.fstat(fd).st_mtime
    finally:
        os.close(fd)
    if holder.get("host") == socket.gethostname():
        return _runs_on_this_host(holder)
    return bool(holder) and age < STALE_SECONDS


def _describe(holder: dict[str, object]) -> str:
    if not holder:
        return "which is only starting"
    pid, host, started = (holder.get(key, "?") for key in ("pid", "host", "started"))
    return f"pid {pid} on {host}, started {started}"


def _runs_on_this_host(holder: dict[str, object]) -> bool:
    pid = holder.get("pid")
    start = process_start(pid) if isinstance(pid, int) else None
    # The number of a dead process is used again: it has another start.
    is_same = start is not None and holder.get("process_start", start) == start
    return holder.get("host") == socket.gethostname() and is_same
