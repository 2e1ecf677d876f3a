"""Files: reading regular ones only, and writing so that a crash leaves the old or the new content.

A FIFO or a device in the place of a user's file would block for ever or never end, so it is refused
before it is opened. The files of a run are opened by `open_own`, which follows no link: whoever can
write into a run directory must not make the run write or publish another file.

Everything is written under a temporary name, synced and then renamed: `rename` is atomic within a
directory (POSIX rename(2)). Files get the permissions that the process's umask allows, like those
of `open`.
"""

import contextlib
import errno
import io
import json
import operator
import os
import re
import secrets
import stat
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from infir2.errors import (
    CheckpointError,
    RunMovedError,
    disk_reason,
    first_line,
)
from infir2.terminal import log

MAX_JSON_BYTES = 64 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_FILE_TYPES = {
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(path: Path, max_bytes: int | None = None) -> int:
    """The size of a regular file, which a library may then open by its path.

    Raises OSError for anything else and for a larger file; its `strerror` follows a colon in a
    sentence: "recipe.toml: it is a FIFO, not a regular file".
    """
    try:
        found = path.stat()
    except ValueError:  # a NUL byte or a lone surrogate in the path
        raise OSError(errno.EINVAL, "its name contains a character no file can have") from None
    if not stat.S_ISREG(found.st_mode):
        raise _unexpected_type(found.st_mode, path, "a regular file")
    if max_bytes is not None and found.st_size > max_bytes:
        raise OSError(errno.EFBIG, _too_large(max_bytes), str(path))
    return found.st_size


def open_regular(path: Path, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, as `require_regular` does."""
    require_regular(path, max_bytes)
    # Without O_NONBLOCK a FIFO that replaced the file meanwhile would block here.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises OSError.

    Example: `read_regular(Path("config.json"), 64 << 20)`.
    """
    with open_regular(path, max_bytes) as file:
        data = file.read(max_bytes + 1)  # a file of /proc has size 0, and others may grow
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, _too_large(max_bytes), str(path))
    return data


def read_json_object(path: Path, error_of: Callable[[str], Exception]) -> dict[str, Any]:
    """A JSON object of at most MAX_JSON_BYTES.

    Raises what `error_of` makes of a problem such as "config.json is missing".
    """
    try:
        data = read_regular(path, MAX_JSON_BYTES)
        text = data.decode(json.detect_encoding(data))  # strict, which json.loads is not
        content = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()  # a ValueError for half of a pair
    except FileNotFoundError as error:
        raise error_of(f"{path} is missing") from error
    except OSError as error:
        raise error_of(f"{path} cannot be read ({disk_reason(error)})") from error
    except (ValueError, RecursionError) as error:
        raise error_of(f"{path} is not JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise error_of(f"{path} must hold a JSON object")
    return content


def _too_large(max_bytes: int) -> str:
    return f"it is larger than the {max_bytes:,} bytes that such a file may have"


def open_own(path: str | Path, flags: int, dir_fd: int | None = None) -> int:
    """Open a file of a run; an `opener` for `open`. Raises OSError for a link or no regular file.

    Example: `open(run_dir / "recipe.toml", "rb", opener=open_own)`.
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a FIFO, a directory
            mode = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode
            raise _unexpected_type(mode, path, "a regular file") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _unexpected_type(mode, path, "a regular file")
    return descriptor


def read_own(path: Path, max_bytes: int = 2**31) -> bytes:
    """The content of a file of a run. Raises OSError, as `open_own` does."""
    with open(path, "rb", opener=open_own) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise OSError(errno.EFBIG, _too_large(max_bytes), str(path))
        return file.read()


def make_own_directory(path: Path) -> None:
    """Create a directory inside a run if it is missing; raises as `require_own_directory`."""
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    require_own_directory(path)


def require_own_directory(path: Path) -> None:
    """Raises OSError if a directory inside a run is missing, a link or anything else."""
    mode = path.lstat().st_mode
    if not stat.S_ISDIR(mode):
        raise _unexpected_type(mode, path, "a directory")


class UnexpectedTypeError(OSError):
    """A link, a directory or a FIFO in the place of a file, or the like."""


def _unexpected_type(mode: int, path: str | Path, wanted: str) -> UnexpectedTypeError:
    kind = _FILE_TYPES.get(stat.S_IFMT(mode), "something else")
    return UnexpectedTypeError(errno.EINVAL, f"it is {kind}, not {wanted}", str(path))


class HeldDirectory:
    """A directory that was opened, and whether its path still leads to it.

    A directory that is moved away keeps its open files, but its path may lead to another run's.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self.fd)

    def check(self) -> None:
        """Raises RunMovedError after the directory was moved, removed or replaced."""
        try:
            in_place = os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        except (FileNotFoundError, NotADirectoryError):
            in_place = False
        except OSError as error:
            raise disk_error(f"{self.path}: cannot be found", error) from error
        if not in_place:
            raise RunMovedError(
                f"{self.path}: this path does not lead to the directory of this run anymore, which "
                "was moved, removed or replaced; nothing was written to what is there now. Move "
                "it back, or name its new place as run.dir, and run the same command again."
            )


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` or replace its content. After an error or a crash it has its old content.

    A link is replaced itself. Raises OSError, also for a device, a FIFO or a directory.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):  # root can replace /dev/null
            raise _unexpected_type(mode, path, "a regular file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def fsync_directory(path: Path) -> None:
    """Sync the entries of a directory: the names of files that were created or renamed in it.

    Some network file systems refuse this with EINVAL; they sync directories themselves. Raises
    OSError for everything else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(subject: str) -> Iterator[None]:
    """Raise an OSError as a CheckpointError: "`subject` (the system's reason); what to do"."""
    try:
        yield
    except OSError as error:
        raise disk_error(subject, error) from error


def disk_error(subject: str, error: OSError) -> CheckpointError:
    """The CheckpointError for a disk that refuses data.

    Example: "runs/a/recipe.toml: cannot be written (No space left on device, errno 28 ENOSPC); free
    space ..."
    """
    if isinstance(error, UnexpectedTypeError):
        return CheckpointError(
            f"{error.filename}: {error.strerror}; move it away, then run the same command again."
        )
    return CheckpointError(
        f"{subject} ({disk_reason(error)}); "
        "free space or make it writable, then run the same command again."
    )


class JsonLinesWriter:
    """Appends JSON objects to a file, one per line; a failing disk delays lines but stops nobody.

    Lines that cannot be written wait in memory for the next `append`; the first failure is printed.
    Numpy arrays and tensors are written as lists. The file is one of the directory that `path`
    named at first, wherever that is moved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._directory: HeldDirectory | None = None
        with contextlib.suppress(OSError):  # it may come to exist later
            self._directory = HeldDirectory(path.parent)
        self._file: io.FileIO | None = None
        self._pending = b""
        self._reported = False

    def append(self, *rows: dict[str, Any]) -> None:
        """Write the lines that wait, then `rows`. With no rows the file is at least created."""
        self._pending += b"".join(map(encode_json_line, rows))
        try:
            if self._file is None:
                self._file = io.FileIO(self.path.name, "a", opener=self._open)
            while self._pending:  # a disk that is almost full accepts a part of a line
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._reported:
                log(
                    f"{self.path} cannot be written ({disk_reason(error)}); "
                    "its lines are kept until it can"
                )
            self._reported = True

    def _open(self, name: str, flags: int) -> int:
        if self._directory is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._directory = HeldDirectory(self.path.parent)
        return open_own(name, flags, self._directory.fd)

    def close(self) -> None:
        """Try once more to write the lines that wait, and close the file."""
        if self._pending:
            self.append()
        if self._file:
            with contextlib.suppress(OSError):  # network file systems may fail a write this late
                self._file.close()


def encode_json_line(row: dict[str, Any]) -> bytes:
    """One line of UTF-8 with its newline; arrays and tensors become lists."""
    # a lone surrogate has no UTF-8; backslashreplace writes it as JSON's own escape
    text = json.dumps(row, ensure_ascii=False, default=operator.methodcaller("tolist"))
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file's complete, undamaged lines; [] for a missing file. Raises OSError."""
    return [row for _, row in _parsed_lines(_read_lines(path))]


def truncate_torn_line(path: Path) -> None:
    """Cut off a last line without its newline (a write that a crash interrupted).

    Otherwise the next line would be appended to its end. Needs no free space; a missing file stays
    missing.
    """
    data = _read_lines(path)
    if not data.endswith(b"\n") and data:
        with open(path, "r+b", opener=open_own) as file:
            file.truncate(data.rfind(b"\n") + 1)


def keep_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Remove damaged lines and those that `keep` rejects; replaces the file atomically.

    A last object without its newline is kept and gets one. Raises OSError.
    """
    data = _read_lines(path)
    kept = b"".join(
        line.rstrip(b"\n") + b"\n"
        for line, row in _parsed_lines(data, allow_torn=True)
        if keep(row)
    )
    if kept != data:
        write_atomically(path, kept)


def _read_lines(path: Path) -> bytes:
    try:
        return read_own(path)
    except FileNotFoundError:
        return b""


def _parsed_lines(data: bytes, allow_torn: bool = False) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (line, object) of each JSON object; with `allow_torn`, the last needs no newline."""
    for line in io.BytesIO(data):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and (allow_torn or line.endswith(b"\n")):
                yield line, row
