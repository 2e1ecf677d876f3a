"""The log of a run: metrics.jsonl, TensorBoard and the terminal, written by rank 0 alone."""

import resource
import sys
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint.record import MetricsWriter, View
from infir2.terminal import StepProgress, log


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that torch has allocated on a GPU; without one, that this process had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RunLog:
    """Writes on rank 0 and does nothing on the other ranks, so that callers need not ask.

    Example: `log.write("train", 7, loss=2.1)`, `log.event(7, "loss_spike", "loss 20, ...")`.
    """

    def __init__(self, kind: str, is_rank0: bool) -> None:
        self._kind, self._is_rank0 = kind, is_rank0
        self._metrics: MetricsWriter | None = None  # set by open_files
        self._progress: StepProgress | None = None  # set by start_progress

    def open_files(self, run_dir: Path, saved_step: int, view: View | None = None) -> None:
        """Open metrics.jsonl and drop its lines after `saved_step`. Rank 0 only.

        `view` shows the numbers too, beside TensorBoard.
        """
        self._metrics = MetricsWriter(run_dir, saved_step, view)

    def start_progress(self, total_steps: int, resumed_step: int) -> None:
        """Show the progress bar (or plain lines) from now on."""
        if self._is_rank0:
            self._progress = StepProgress(self._kind, total_steps, resumed_step)

    def values(self, kind: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of the lines of a kind. Rank 0 only."""
        assert self._metrics is not None
        return self._metrics.values(kind, name)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(kind, step, **values)

    def write_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append readable responses to samples.jsonl."""
        if self._metrics is not None:
            self._metrics.write_samples(rows)

    def write_operands(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append what was observed of FP8 operands to operands.jsonl."""
        if self._metrics is not None:
            self._metrics.write_operands(step, rows)

    def event(self, step: int, name: str, detail: str) -> None:
        """Record something that happened, and print it."""
        self.write("event", step, event=name, detail=detail)
        self.message(f"step {step}: {name}: {detail}")

    def update(self, step: int, text: str) -> None:
        """Advance the progress bar."""
        if self._progress is not None:
            self._progress.update(step, text)

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._progress is not None:
            self._progress.log(text)

    def warn(self, text: str) -> None:
        """Print a line that may come before the progress bar exists."""
        if self._is_rank0:
            log(text, self._kind)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
