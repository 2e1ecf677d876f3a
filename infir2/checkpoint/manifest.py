"""The manifest: size and SHA-256 of every file of a checkpoint, written last, itself guarded by a checksum.

    {"files": {"state.json": {"sha256": "9f86...", "size": 512}, ...}, "format": 1, "manifest_sha256": "c0ff...", "step": 20}

The file must be byte for byte the canonical JSON of its content, so a flipped byte anywhere in it is found.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from infir2.errors import CheckpointCorruptError, CheckpointError

MANIFEST = "manifest.json"
METADATA = ".metadata"  # where each tensor lies, see dcp.py
FORMAT = 1
_LARGE_BYTES = 2**20


class FileEntry(NamedTuple):
    """What the manifest promises about one file: its length in bytes and its SHA-256 as hex."""

    size: int
    sha256: str


class HashedFile:
    """A new file, hashed as it is written and synced at the end of its `with`, which then gives its `entry`.

    An error of the disk's comes out of the `with`, whatever the writer between has made of it.
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
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
            if (
                len(data) >= _LARGE_BYTES
            ):  # Linux begins to write out what it is told to forget; left alone, it would at the sync
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self._failure = error
            raise
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is kept back."""

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


def write_file(path: Path, data: bytes) -> FileEntry:
    """Write a small file as a whole, synced."""
    with HashedFile(path) as file:
        file.write(data)
    return file.entry


def removed(path: Path) -> str:
    """The sentence for a checkpoint that is not there any more."""
    return (
        f"{path}: was removed by its run, which keeps only its newest checkpoints; open the newest."
    )


def _canonical(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"


def encode_manifest(step: int, files: Mapping[str, FileEntry]) -> bytes:
    """The bytes of manifest.json for these files."""
    content: dict[str, object] = {
        "format": FORMAT,
        "step": step,
        "files": {name: entry._asdict() for name, entry in files.items()},
    }
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    return _canonical({**content, "manifest_sha256": digest})


def read_manifest(directory: Path) -> tuple[int, dict[str, FileEntry]]:
    """(step, files) of a checkpoint directory; CheckpointCorruptError unless the manifest is whole and agrees with itself."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointCorruptError(
            f"{path}: cannot be read ({error.strerror}); the checkpoint is not complete."
        ) from error
    try:
        content = json.loads(data)
        digest = content.pop("manifest_sha256")
        if (
            content["format"] == FORMAT
            and hashlib.sha256(_canonical(content)).hexdigest() == digest
        ):
            files = {
                name: FileEntry(entry["size"], entry["sha256"])
                for name, entry in content["files"].items()
            }
            whole = encode_manifest(content["step"], files) == data
        elif isinstance(content["format"], int) and content["format"] > FORMAT:
            raise CheckpointError(
                f"{path}: has format {content['format']} of a newer infir2; use that version to read it."
            )
        else:
            whole = False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(
            f"{path}: is not a manifest ({type(error).__name__}); the file is damaged."
        ) from error
    if not whole:
        raise CheckpointCorruptError(
            f"{path}: its content does not match its own checksum; the file is damaged."
        )
    for name in files:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointCorruptError(
                f"{path}: names '{name}', which is not a file inside the checkpoint."
            )
    return content["step"], files


def _verify_file(path: Path, entry: FileEntry, whole: bool) -> None:
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise CheckpointCorruptError(
                f"{path}: has {size} bytes instead of {entry.size}; the file was cut or changed."
            )
        if not whole:
            return
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointCorruptError(
            f"{path}: cannot be read ({error.strerror}); the checkpoint is not complete."
        ) from error
    if digest != entry.sha256:
        raise CheckpointCorruptError(
            f"{path}: its SHA-256 differs from its manifest; its bytes have changed since it was written."
        )


def verify_directory(
    directory: Path, read: Collection[str] | None = None
) -> tuple[int, dict[str, FileEntry]]:
    """Read every byte of a checkpoint and compare; (step, files), or CheckpointCorruptError that names the file.

    `read`: names of the only files to read, in seconds however large a run is; of the others the sizes are compared.
    Hashing releases the interpreter's lock, so files are read by several threads.
    """
    step, files = read_manifest(directory)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(
            lambda item: _verify_file(
                directory / item[0], item[1], read is None or item[0] in read
            ),
            files.items(),
        ):
            pass
    return step, files
