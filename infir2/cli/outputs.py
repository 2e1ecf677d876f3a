"""Directories that a command writes once: what was written, and that it is there already."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infir2.errors import OutputExistsError
from infir2.files import disk_errors, write_atomically
from infir2.terminal import print_result

RECORD = "infir2.json"


def write_once(
    target: Path, made_by: dict[str, Any], write: Callable[[], object], origin: str = ""
) -> None:
    """Call `write`, which creates `target`, and print what it wrote, and from which `origin`.

    `made_by` names the command and fingerprints its inputs; it is stored in the directory. If
    `target` has the same record, nothing is written and its content is printed. Raises
    OutputExistsError for any other `target` that exists.
    """
    if target.exists() and _read(target / RECORD) == made_by:
        print_result(f"{target} is there already, written by this command: {contents(target)}.")
        return
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if os.path.lexists(target) and not is_empty:
        raise OutputExistsError(
            f"{target}: exists already, and another command or another input made it; name a new "
            "directory with --to. Nothing was written."
        )
    write()
    if not target.is_dir():
        return
    with disk_errors(f"{target / RECORD}: cannot be written"):
        write_atomically(target / RECORD, json.dumps(made_by).encode() + b"\n")
    converted = f"converted from {origin}, " if origin else ""
    print_result(f"{target}: {converted}{contents(target)}.")


def contents(directory: Path) -> str:
    """What is in a directory, in words.

    Example: "12 files, 3.09 GB; 338 tensors in 3 safetensors files"
    """
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != RECORD]
    text = f"{len(files)} files, {_size(sum(path.stat().st_size for path in files))}"
    weights = [path for path in files if path.suffix == ".safetensors"]
    if weights:
        num_tensors = sum(map(_num_tensors, weights))
        plural = "s" if len(weights) > 1 else ""
        text += f"; {num_tensors} tensors in {len(weights)} safetensors file{plural}"
    rows = {path.name: path.read_bytes().count(b"\n") for path in files if path.suffix == ".jsonl"}
    if rows:
        text += "; rows: " + ", ".join(f"{name} {rows[name]:,}" for name in sorted(rows))
    return text


def _num_tensors(file: Path) -> int:
    """From the header of a safetensors file: 8 bytes with its length, then JSON."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return len(header.keys() - {"__metadata__"})


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
