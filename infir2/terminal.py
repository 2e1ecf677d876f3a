"""All output of the package: messages and progress on stderr, results on stdout.

Every other module prints through these functions (a test enforces it). Each line is flushed at
once, so lines of several ranks and of a process that is about to die are not lost.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

_PLAIN_INTERVAL_SECONDS = 5.0  # nothing is silent for longer
_MIN_BAR_BYTES = 2**28


def print_result(text: str) -> None:
    """Print the result of a command to stdout."""
    print(text, flush=True)


def print_heading(title: str, detail: str = "") -> None:
    """Print a rule across stdout with a title and a dim detail."""
    from rich.console import Console
    from rich.markup import escape

    dim = f"   [dim]{escape(detail)}[/dim]" if detail else ""
    Console().rule(escape(title) + dim, align="left")


def print_renderable(renderable: "RenderableType") -> None:
    """Print a table of rich to stdout, as wide as the terminal."""
    from rich.console import Console

    Console().print(renderable)


def log(text: str, source: str = "infir2") -> None:
    """Print `source: text` to stderr. `source` is the part of the program: infir2, sft, rl."""
    log_text(f"{source}: {text}")


def log_error(text: str, source: str = "infir2") -> None:
    """Print `source: error: text` to stderr."""
    log(f"error: {text}", source)


def log_text(text: str) -> None:
    """Print text without a prefix to stderr, such as a table."""
    print(text, file=sys.stderr, flush=True)


def log_in_signal_handler(text: str, source: str = "infir2") -> None:
    """`log` for a Python signal handler.

    The handler may interrupt a `print` of the main thread, whose stream then raises RuntimeError
    on a second write. This function writes to the file descriptor instead.
    """
    os.write(2, f"{source}: {text}\n".encode())


class StepProgress:
    """Progress of a run: a bar on a terminal, otherwise one plain line every 5 seconds.

    Both show the step, a text (loss, tokens/s) and the time left. `unit` is what is counted.

    Example: sft step 20/100 loss 2.31 4,210 tokens/s left 95 s
    """

    def __init__(self, name: str, total_steps: int, resumed_step: int, unit: str = "step") -> None:
        self._name, self._total, self._resumed_step = name, total_steps, resumed_step
        self._unit = unit
        self._start = self._last_printed = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = _step_bar()
            self._task = self._bar.add_task(
                name, total=total_steps, completed=resumed_step, text=""
            )
            self._bar.start()

    def update(self, step: int, text: str) -> None:
        """Show that `step` is done; `text` describes it. May be called again for the same step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last_printed >= _PLAIN_INTERVAL_SECONDS or step == self._total:
            line = f"{self._name} {self._unit} {step}/{self._total} {text}"
            if done := step - self._resumed_step:
                seconds_per_step = (now - self._start) / done
                line += f" left {_duration(seconds_per_step * (self._total - step))}"
            log_text(line)
            self._last_printed = now

    def log(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self._bar is None:
            log(text, self._name)
        else:
            line = f"{self._name}: {text}"
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def byte_progress(description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(num_bytes)` for a progress bar of a conversion or a save.

    The bar appears on a terminal only, and only for 256 MiB or more: shorter work is done before
    anyone could read it.
    """
    if not sys.stderr.isatty() or total_bytes < _MIN_BAR_BYTES:
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _step_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
