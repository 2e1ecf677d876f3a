"""`answers.jsonl`: every answer of an engine, on the disk before anybody sees it.

A line has what was asked (`benchmark`, `prompt`: SHA-256 of the request, `sample`: 0 to k - 1),
how (`seed`, `engine`, `attempts`, `seconds`) and either `response`, the engine's answer as OpenAI's
API has it, or `refused`, why this prompt has no answer from any engine.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infir2.files import (
    disk_error,
    encode_json_line,
    open_own,
    read_json_lines,
    truncate_torn_line,
)

ANSWERS = "answers.jsonl"
Key = tuple[str, str, int]  # benchmark, prompt, sample
Row = dict[str, Any]


class Journal:
    """The answers of a directory. Threads may add answers; each is synced when `add` returns."""

    def __init__(self, directory: Path) -> None:
        """Read what is there; a last line that a crash cut short is removed.

        Raises CheckpointError if the disk refuses.
        """
        self.path = directory / ANSWERS
        self._writing, self._syncing = threading.Lock(), threading.Lock()
        self._written = self._synced = 0
        try:
            truncate_torn_line(self.path)
            self._rows = {_key(row): row for row in read_json_lines(self.path) if _is_answer(row)}
            self._file = open_own(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise disk_error(f"{self.path}: cannot be written", error) from error

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Key) -> Row | None:
        """The answer's row, if there is one."""
        return self._rows.get(key)

    def rows(self) -> Iterator[Row]:
        """All rows, in the order of their answers."""
        return iter(list(self._rows.values()))

    def add(self, row: Row) -> None:
        """Append a row and sync it; threads that wait share one sync. Raises CheckpointError."""
        data = encode_json_line(row)
        try:
            with self._writing:
                while data:
                    data = data[os.write(self._file, data) :]
                self._written += 1
                own = self._written
            with self._syncing:
                if self._synced < own:
                    number = self._written
                    os.fsync(self._file)
                    self._synced = number
        except OSError as error:
            raise disk_error(f"{self.path}: cannot be written", error) from error
        self._rows[_key(row)] = row

    def close(self) -> None:
        os.close(self._file)


def _key(row: Row) -> Key:
    return row["benchmark"], row["prompt"], row["sample"]


def _is_answer(row: Row) -> bool:
    return {"benchmark", "prompt", "sample"} <= row.keys() and bool(
        row.keys() & {"response", "refused"}
    )
