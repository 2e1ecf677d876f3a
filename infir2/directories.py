"""Directories that appear complete, by one rename, or not at all.

A command writes into a hidden directory beside its output, which it keeps locked. What a killed
command left has no lock, and the next command with the same output removes it. Files and
directories get the permissions that the umask allows, like those of `open` and `mkdir`.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from infir2.errors import CheckpointError, OutputExistsError, disk_reason, first_line
from infir2.files import fsync_directory
from infir2.terminal import log


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; sync it and rename it to `target` at the end.

    After an error nothing is left of it. The directories of killed commands are removed first.
    Raises OutputExistsError if `target` exists, CheckpointError for an OSError.
    Example: `with new_directory(Path("out")) as work: (work / "file").write_text("x")`.
    """
    require_absent(target)
    remove_leftovers(target)
    work = target.with_name(f".{target.name}{_temporary_suffix()}{secrets.token_hex(6)}")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        try:
            work.mkdir(parents=True)
            with contextlib.suppress(OSError):  # where there are no locks, leftovers stay
                stack.callback(os.close, lock_directory(work))
            yield work
            _apply_umask(work)
            _fsync_tree(work)
            publish(work, target)
        except OSError as error:
            reason = disk_reason(error) if error.errno else first_line(error)
            raise CheckpointError(
                f"{target} cannot be written: {reason}; name another directory, or make room."
            ) from error


def remove_leftovers(target: Path) -> None:
    """Remove the temporary directories of `target` that no living process uses."""
    with contextlib.suppress(OSError):
        for path in list(target.parent.iterdir()):
            if path.name.startswith(f".{target.name}.") and _temporary_suffix() in path.name:
                remove_unlocked(path)


def remove_unlocked(path: Path) -> None:
    """Remove a directory that a killed process left; not one that a living process has locked."""
    with contextlib.suppress(OSError):
        lock = lock_directory(path)
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        log(f"removed {path}, left by an interrupted command.")


def _temporary_suffix() -> str:
    # Some file systems keep locks per host, so the directory of another host is left alone.
    return f".tmp-{socket.gethostname()}-"


def lock_directory(directory: Path) -> int:
    """A descriptor that locks a directory until it is closed or its process dies.

    Raises OSError if another process has locked it, or if the file system has no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def require_absent(target: Path) -> None:
    """Raise OutputExistsError if `target` exists."""
    if target.exists() or target.is_symlink():
        raise OutputExistsError(
            f"{target}: exists already; name a new directory. Nothing was written."
        )


def publish(work: Path, target: Path) -> None:
    """Rename the directory `work`, which is on disk, to `target`.

    Raises OutputExistsError if `target` exists by now, OSError for every other failure.
    """
    try:
        work.rename(target)
        fsync_directory(target.parent)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and target.exists():
            raise OutputExistsError(
                f"{target} was created meanwhile; remove it or choose another output"
            ) from error
        raise


def _apply_umask(directory: Path) -> None:
    """Give every file the permissions that `open` would have given it.

    Libraries that write through a temporary file (safetensors) leave mode 0600, which other users,
    such as that of an inference server, cannot read. `directory` itself was created by `mkdir`, so
    its mode shows the umask (reading the umask means setting it, for all threads of the process).
    """
    allowed = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_file() and allowed & ~mode:
            path.chmod(mode | allowed)


def _fsync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        if path.is_dir():
            fsync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
