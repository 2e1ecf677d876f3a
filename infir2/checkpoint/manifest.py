"""The manifest of a checkpoint: size and SHA-256 of every file. It is written last.

    {"files": {"state.json": {"sha256": "9f86...", "size": 512}, ...}, "format": 1,
     "manifest_sha256": "c0ff...", "step": 20}

`manifest_sha256` is the checksum of the manifest without that key. The file must be, byte for byte,
the canonical JSON of its content, so that any flipped byte in it is detected.
"""

import errno
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from infir2.errors import CheckpointCorruptError, CheckpointError, disk_reason
from infir2.files import open_own, read_own

MANIFEST = "manifest.json"
METADATA = ".metadata"  # DCP's index of tensors, see dcp.py
FORMAT = 1
MAX_BYTES = 2**26  # of a manifest, and of the state
_LARGE_BYTES = 2**20
# The file is missing, something else, or lies on damaged sectors.
_DAMAGED = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.EFBIG, errno.EIO)


class FileEntry(NamedTuple):
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


class HashedFile:
    """A new file that is hashed while it is written; its `with` block syncs it and sets `entry`.

    If a write fails, the `with` block raises that OSError, even if the code inside has wrapped it
    in another exception.
    """

    entry: FileEntry

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._failure: OSError | None = None
        self.size = 0

    def __enter__(self) -> "HashedFile":
        self._file = self._path.open("xb", buffering=0)
        return self

    def write(self, data: bytes | memoryview) -> int:
        remaining = memoryview(data)
        try:
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
            if len(data) >= _LARGE_BYTES:
                # Linux starts to write back pages that it is advised to drop, instead of all at
                # once in fsync.
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self._failure = error
            raise
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """No-op, because the file is unbuffered; torch.save calls it."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if self._failure:
                raise self._failure
            if kind is None:
                os.fsync(self._file.fileno())
        self.entry = FileEntry(self.size, self._hash.hexdigest())


def write_hashed(path: Path, data: bytes) -> FileEntry:
    """Write and sync a new file."""
    with HashedFile(path) as file:
        file.write(data)
    return file.entry


def removed_message(path: Path) -> str:
    """The sentence for a checkpoint that disappeared while it was read."""
    return (
        f"{path}: was removed by its run, which keeps only its newest checkpoints; open the newest."
    )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """CheckpointCorruptError for what another reading would not better, else CheckpointError.

    A checkpoint that cannot be read now (no permission, no free descriptor, a file server that was
    restarted) is not given up for an older one.
    """
    if error.errno in _DAMAGED:
        return CheckpointCorruptError(
            f"{path}: cannot be read ({error.strerror}); the checkpoint is incomplete."
        )
    return CheckpointError(
        f"{path}: cannot be read ({disk_reason(error)}); "
        "make it readable, then run the same command again."
    )


def _canonical(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"


def encode_manifest(step: int, files: Mapping[str, FileEntry]) -> bytes:
    """The content of manifest.json."""
    content: dict[str, object] = {
        "format": FORMAT,
        "step": step,
        "files": {name: entry._asdict() for name, entry in files.items()},
    }
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    return _canonical({**content, "manifest_sha256": digest})


def read_manifest(directory: Path) -> tuple[int, dict[str, FileEntry]]:
    """(step, entry of each file) of a checkpoint.

    Raises CheckpointCorruptError for a damaged manifest, and CheckpointError for one of a newer
    format.
    """
    path = directory / MANIFEST
    try:
        data = read_own(path, MAX_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        step, files = _decode_manifest(path, data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"{path}: is not a manifest ({type(error).__name__}); the file is damaged."
        ) from error
    for name in files:
        if name != os.path.basename(name) or name in ("", ".", "..") or not name.isprintable():
            raise CheckpointCorruptError(
                f"{path}: lists {name!r}, which is not a file inside the checkpoint."
            )
    return step, files


def _decode_manifest(path: Path, data: bytes) -> tuple[int, dict[str, FileEntry]]:
    content: dict[str, Any] = json.loads(data)
    digest = content.pop("manifest_sha256")
    if content["format"] == FORMAT and hashlib.sha256(_canonical(content)).hexdigest() == digest:
        files = {
            name: FileEntry(entry["size"], entry["sha256"])
            for name, entry in content["files"].items()
        }
        if encode_manifest(content["step"], files) == data:
            return content["step"], files
    elif isinstance(content["format"], int) and content["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: has format {content['format']} of a newer infir2; "
            "use that version to read it."
        )
    raise CheckpointCorruptError(
        f"{path}: its content does not match its checksum; the file is damaged."
    )


def _verify_file(path: Path, entry: FileEntry, with_hash: bool) -> None:
    try:
        with open(path, "rb", opener=open_own) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.size:
                raise CheckpointCorruptError(
                    f"{path}: has {size} bytes instead of {entry.size}; "
                    "the file was truncated or changed."
                )
            if not with_hash:
                return
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
    if digest != entry.sha256:
        raise CheckpointCorruptError(
            f"{path}: its SHA-256 differs from the manifest; its bytes have changed since it was "
            "written."
        )


def verify_directory(
    directory: Path, hashed: Collection[str] | None = None
) -> tuple[int, dict[str, FileEntry]]:
    """Compare every file of a checkpoint with its manifest; returns `read_manifest(directory)`.

    `hashed`: names of the files to hash (None: all); of the others only sizes are compared, which
    takes seconds for a checkpoint of any size. Raises CheckpointCorruptError that names the file.
    """
    step, files = read_manifest(directory)

    def verify(name: str) -> None:
        _verify_file(directory / name, files[name], hashed is None or name in hashed)

    # Hashing releases the interpreter's lock, so threads run in parallel.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(verify, files):
            pass
    return step, files
