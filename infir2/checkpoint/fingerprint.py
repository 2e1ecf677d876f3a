"""A short name for the weights in a directory: it tells whether they are still the same ones."""

import hashlib
from pathlib import Path

from infir2.checkpoint.manifest import MANIFEST
from infir2.checkpoint.reader import CHECKPOINTS, open_checkpoint

_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def is_run(path: Path) -> bool:
    """True for a run directory or one of its checkpoints, False for a Hugging Face directory."""
    return (path / CHECKPOINTS).is_dir() or (path / MANIFEST).is_file()


def fingerprint(path: Path) -> str:
    """SHA-256 of a checkpoint's manifest, of the files of a Hugging Face directory, or of a file.

    A run directory stands for its newest good checkpoint. Of a large file only its size and 16
    evenly spaced pieces are read: training changes all weights, so it changes every piece of them.
    Raises CheckpointError for a run without a checkpoint.
    """
    if is_run(path):
        manifest = open_checkpoint(path, sizes_only=True).path / MANIFEST
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file() and not file.name.startswith("."):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            digest.update(_pieces(file))
    return digest.hexdigest()


def _pieces(file: Path) -> bytes:
    """The content of a small file, else `_SAMPLES` pieces with the first and the last byte."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            return stream.read()
        pieces = []
        for index in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            pieces.append(stream.read(_SAMPLE_BYTES))
        return b"".join(pieces)
