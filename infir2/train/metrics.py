"""Where a run's numbers go: metrics.jsonl (the record), TensorBoard (a view), the terminal (progress)."""

import json
import math
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL_SECONDS = 15.0
_CLOSE_SECONDS = 5.0


class MetricsWriter:
    """Appends one JSON object per line to metrics.jsonl and mirrors numbers to TensorBoard events.

    On resume, lines of steps after `resumed_step` are dropped: those steps run again, and the file stays one curve.
    """

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._samples = run_dir / "samples.jsonl"
        for path in (self.path, self._samples):
            _drop_lines_after(path, resumed_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._view = TensorBoardView(run_dir, resumed_step)

    def values(self, kind: str, name: str) -> list[tuple[int, Any]]:
        """(step, value) of every line of a kind that has the name."""
        found = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return [(line["step"], line[name]) for line in found if line["kind"] == kind and line.get(name) is not None]

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line; non-finite numbers become null, because JSON has none."""
        line = {"kind": kind, "step": step} | {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                self._view.add(f"{kind}/{name}", value, step)

    def write_samples(self, rows: list[dict[str, Any]]) -> None:
        """Readable responses beside the numbers: samples.jsonl."""
        with self._samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        self._file.close()
        self._view.close()


class _Silent:
    """Stands for a MetricsWriter and a StepProgress on every rank but the first: hears everything, says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments, **_values: None


SILENT: Any = _Silent()


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
            from torch.utils.tensorboard.writer import SummaryWriter  # slow import, only runs need it

            writer = SummaryWriter(str(run_dir), purge_step=resumed_step + 1 if resumed_step else None)
            for item in iter(self._waiting.get, None):
                writer.add_scalar(*item)
            writer.close()
        except Exception as error:  # of any library
            print(f"infir2: no TensorBoard events from here on ({error}); metrics.jsonl is complete", file=sys.stderr)


class StepProgress:
    """A progress bar on a terminal; elsewhere one plain line every 15 seconds. Both show step, loss, tokens/s, time left."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._first = name, total, done
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            name_column, text_column = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
            columns = (name_column, BarColumn(), MofNCompleteColumn(), text_column, TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total, completed=done, text="")
            self._bar.start()

    def update(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last >= _PLAIN_INTERVAL_SECONDS or step == self._total:
            left = (now - self._start) / max(1, step - self._first) * (self._total - step)
            print(f"{self._name} step {step}/{self._total} {text} left {_duration(left)}", file=sys.stderr, flush=True)
            self._last = now

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        console = self._bar.console if self._bar is not None else Console(stderr=True)
        console.print(f"{self._name}: {text}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep complete lines up to `step`; a line torn by a crash goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
