"""Where a run's numbers go: metrics.jsonl (the record), TensorBoard (a view)."""

import math
import queue
import threading
from pathlib import Path
from typing import Any

from infir2.files import JsonLinesWriter, disk_errors, keep_json_lines, read_json_lines
from infir2.terminal import log

_CLOSE_SECONDS = 5.0


class MetricsWriter:
    """Appends one JSON object per line to metrics.jsonl and mirrors numbers to TensorBoard events.

    On resume, lines of steps after `resumed_step` are dropped: those steps run again, and the file
    stays one curve. Raises CheckpointError if the disk refuses that; a later refusal only delays
    lines (`JsonLinesWriter`).
    """

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        self._lines, self._samples = (
            JsonLinesWriter(run_dir / "metrics.jsonl"),
            JsonLinesWriter(run_dir / "samples.jsonl"),
        )
        for lines in (self._lines, self._samples):
            with disk_errors(f"{lines.path}: cannot be written"):
                keep_json_lines(lines.path, lambda row: _step_of(row) <= resumed_step)
        self._lines.append()  # the record is there from the start
        self._view = TensorBoardView(run_dir, resumed_step)

    def values(self, kind: str, name: str) -> list[tuple[int, Any]]:
        """(step, value) of every line of a kind that has the name."""
        return [
            (line["step"], line[name])
            for line in read_json_lines(self._lines.path)
            if line["kind"] == kind and line.get(name) is not None
        ]

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line; non-finite numbers become null, because JSON has none."""
        self._lines.append(
            {"kind": kind, "step": step} | {name: _plain(value) for name, value in values.items()}
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
        self._samples.append(*rows)

    def close(self) -> None:
        for lines in (self._lines, self._samples):
            lines.close()
        self._view.close()


class TensorBoardView:
    """TensorBoard events, written by a thread: whatever happens to them, a run does not wait."""

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


def _step_of(row: dict[str, Any]) -> float:
    """The line's step; infinity where it has none, so that a resumed run drops the line."""
    step = row.get("step")
    return step if isinstance(step, int | float) else math.inf
