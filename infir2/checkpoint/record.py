"""Writes a run's numbers to metrics.jsonl (the record) and TensorBoard events (a view of it)."""

import math
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infir2.files import (
    HeldDirectory,
    JsonLinesWriter,
    disk_errors,
    keep_json_lines,
    read_json_lines,
)
from infir2.terminal import log

_CLOSE_SECONDS = 5.0
Show = Callable[[dict[str, float], int], object]


class MetricsWriter:
    """Appends one JSON object per line to metrics.jsonl and mirrors numbers to views.

    These are TensorBoard events and `view`.

    On resume, lines of steps after `resumed_step` are dropped: those steps run again, and the file
    stays one curve. Raises CheckpointError if the disk refuses that; a later refusal only delays
    lines (`JsonLinesWriter`).
    """

    def __init__(self, run_dir: Path, resumed_step: int, view: "View | None" = None) -> None:
        self._lines = JsonLinesWriter(run_dir / "metrics.jsonl")
        self._samples = JsonLinesWriter(run_dir / "samples.jsonl")
        self._operands = JsonLinesWriter(run_dir / "operands.jsonl")
        for lines in (self._lines, self._samples, self._operands):
            with disk_errors(f"{lines.path}: cannot be written"):
                keep_json_lines(lines.path, lambda row: _step_of(row) <= resumed_step)
        self._lines.append()  # creates the file, so that readers find it before step 1
        with disk_errors(f"{run_dir}: cannot be read"):
            self._views: list[View] = [TensorBoardView(run_dir, resumed_step)]
        self._views += [view] if view else []

    def values(self, kind: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of every line of `kind` that has a number for `name`."""
        return [
            (line["step"], line[name])
            for line in read_json_lines(self._lines.path)
            if line.get("kind") == kind and _is_finite(line.get(name))
        ]

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line. Non-finite numbers become null, because JSON has none."""
        self._lines.append(
            {"kind": kind, "step": step} | {name: _plain(value) for name, value in values.items()}
        )
        numbers = {f"{kind}/{name}": value for name, value in values.items() if _is_finite(value)}
        for view in self._views:
            view.show(numbers, step)

    def write_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append readable responses to samples.jsonl."""
        self._samples.append(*rows)

    def write_operands(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append what was observed of FP8 operands to operands.jsonl, one line per layer."""
        lines = ({name: _plain(value) for name, value in row.items()} for row in rows)
        self._operands.append(*({"step": step} | line for line in lines))

    def close(self) -> None:
        for lines in (self._lines, self._samples, self._operands):
            lines.close()
        for view in self._views:
            view.close()


class View(ABC):
    """Shows numbers elsewhere by a thread: a run neither waits for it nor fails with it.

    The thread, and with it what it opens, begins with the first number.
    """

    name = "the view"

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def show(self, values: dict[str, float], step: int) -> None:
        """Show the numbers of a line."""
        if not values:
            return
        if self._thread.ident is None:
            self._thread.start()
        self._waiting.put((values, step))

    def close(self) -> None:
        """Write the queued numbers, for at most `_CLOSE_SECONDS`."""
        if self._thread.ident is not None:
            self._waiting.put(None)
            self._thread.join(_CLOSE_SECONDS)

    @abstractmethod
    def open(self) -> tuple[Show, Callable[[], object]]:
        """What shows a line's numbers, and what ends it. A slow import that only runs need."""

    def _run(self) -> None:
        try:
            show, end = self.open()
            for item in iter(self._waiting.get, None):
                show(*item)
            end()
        except Exception as error:  # of any of the libraries behind it
            log(f"{self.name} stopped ({error}); metrics.jsonl is still written")


class TensorBoardView(View):
    """TensorBoard events in the run directory."""

    name = "TensorBoard events"

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        super().__init__()
        self._resumed_step = resumed_step
        # The writer opens its file by path, again and again: by this one it finds the directory
        # wherever that is moved.
        self._held = HeldDirectory(run_dir)
        by_descriptor = f"/proc/self/fd/{self._held.fd}"
        self._directory = by_descriptor if os.path.exists(by_descriptor) else str(run_dir)

    def open(self) -> tuple[Show, Callable[[], object]]:
        from torch.utils.tensorboard.writer import SummaryWriter

        purge_step = self._resumed_step + 1 if self._resumed_step else None
        writer = SummaryWriter(self._directory, purge_step=purge_step)

        def show(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return show, writer.close


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < math.inf


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(row: dict[str, Any]) -> float:
    """The line's step; infinity for a damaged line, so that a resumed run drops it."""
    step, kind = row.get("step"), row.get("kind", "")
    return step if isinstance(step, int | float) and isinstance(kind, str) else math.inf
