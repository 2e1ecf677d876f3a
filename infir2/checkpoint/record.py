"""Where a run's numbers go: metrics.jsonl (the record), TensorBoard (a view)."""

import contextlib
import io
import json
import math
import queue
import threading
from pathlib import Path
from typing import Any

from infir2.checkpoint.manifest import replace_file
from infir2.errors import disk_reason
from infir2.terminal import log

_CLOSE_SECONDS = 5.0


class MetricsWriter:
    """Appends one JSON object per line to metrics.jsonl and mirrors numbers to TensorBoard events.

    On resume, lines of steps after `resumed_step` are dropped: those steps run again, and the file stays one curve.
    Raises CheckpointError where the disk refuses that; later it only delays lines (`Lines`).
    """

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        self._lines, self._samples = (
            Lines(run_dir / "metrics.jsonl"),
            Lines(run_dir / "samples.jsonl"),
        )
        for lines in (self._lines, self._samples):
            _drop_lines_after(lines.path, resumed_step)
        self._lines.add()  # the record is there from the start
        self._view = TensorBoardView(run_dir, resumed_step)

    def values(self, kind: str, name: str) -> list[tuple[int, Any]]:
        """(step, value) of every line of a kind that has the name."""
        found = map(json.loads, self._lines.path.read_text(encoding="utf-8").splitlines())
        return [
            (line["step"], line[name])
            for line in found
            if line["kind"] == kind and line.get(name) is not None
        ]

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line; non-finite numbers become null, because JSON has none."""
        self._lines.add(
            json.dumps(
                {"kind": kind, "step": step}
                | {name: _plain(value) for name, value in values.items()}
            )
        )
        for name, value in values.items():
            if (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and math.isfinite(value)
            ):
                self._view.add(f"{kind}/{name}", value, step)

    def write_samples(self, rows: list[dict[str, Any]]) -> None:
        """Readable responses beside the numbers: samples.jsonl."""
        self._samples.add(*(json.dumps(row, ensure_ascii=False) for row in rows))

    def close(self) -> None:
        for lines in (self._lines, self._samples):
            lines.close()
        self._view.close()


class Lines:
    """A file that lines are appended to. What the disk refuses waits in memory for the next line, and is told of once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None
        self._waiting, self._told = b"", False

    def add(self, *lines: str) -> None:
        self._waiting += "".join(f"{line}\n" for line in lines).encode()
        try:
            self._file = self._file or io.FileIO(self.path, "a")
            while self._waiting:  # a full disk may take a part of a line
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._told:
                log(
                    f"{self.path} cannot be written ({disk_reason(error)}); its lines are kept until it can"
                )
            self._told = True

    def close(self) -> None:
        """Try once more to write what waits."""
        if self._waiting:
            self.add()
        if self._file:
            with contextlib.suppress(
                OSError
            ):  # a network file system may refuse here what it took before
                self._file.close()


class TensorBoardView:
    """TensorBoard events beside the record, written by a thread: whatever happens to them, a run neither stops nor waits."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        self._waiting: queue.SimpleQueue[tuple[str, float, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(run_dir, resumed_step), daemon=True)
        self._thread.start()

    def add(self, name: str, value: float, step: int) -> None:
        self._waiting.put((name, value, step))

    def close(self) -> None:
        """Write what is waiting, for a few seconds at most."""
        self._waiting.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _run(self, run_dir: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import (
                SummaryWriter,  # slow import, only runs need it
            )

            writer = SummaryWriter(
                str(run_dir), purge_step=resumed_step + 1 if resumed_step else None
            )
            for item in iter(self._waiting.get, None):
                writer.add_scalar(*item)
            writer.close()
        except Exception as error:  # of any library
            log(f"no TensorBoard events from here on ({error}); metrics.jsonl goes on")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep complete lines up to `step`; a line torn by a crash goes too. CheckpointError where the disk refuses."""
    found = path.read_bytes() if path.exists() else b""
    kept = []
    for line in found.splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
    if b"".join(kept) != found:
        replace_file(path, b"".join(kept))
