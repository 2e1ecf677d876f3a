"""All output of the package: messages and progress on stderr, results on stdout.

Every other module prints through these functions (a test enforces it). Each line is flushed at
once, so lines of several ranks and of a process that is about to die are not lost.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

_PLAIN_INTERVAL_SECONDS = 3.0  # with steps of two seconds, before a `pulse`
_PULSE_SECONDS = 5.0
_MIN_BAR_BYTES = 2**28
_MAX_ERROR_CHARACTERS = 2000


@dataclass
class _Amount:
    """How much of the current work is done, in bytes, since when."""

    total: int
    start: float
    done: int = 0

    def __str__(self) -> str:
        """Example: ": 34 % of 12.0 GB, 80 s left"."""
        if not 0 < self.done <= self.total:
            return ""
        seconds = (time.monotonic() - self.start) * (self.total - self.done) / self.done
        size = f"{self.total / 1e9:.1f} GB" if self.total >= 1e9 else f"{self.total / 1e6:.0f} MB"
        return f": {100 * self.done // self.total} % of {size}, {_duration(seconds)} left"


class _Output:
    """What this process prints: `quiet` leaves results and errors only.

    `owes_json`: the command was asked for JSON and has printed none yet. `newest` is the time of
    the last line, `phase` what the command does meanwhile, `phase_start` since when; a bar on a
    terminal moves by itself.
    """

    def __init__(self) -> None:
        self.quiet, self.owes_json, self.num_bars = False, False, 0
        self.phase, self.newest = "", time.monotonic()
        self.amount: _Amount | None = None
        self.phase_start = self.newest


_output = _Output()


def begin_output(quiet: bool, as_json: bool) -> None:
    """Begin a command. `quiet`: print results and errors only (`--quiet`).

    `as_json`: its stdout is to be one JSON document (`--json`), of an error too.
    """
    _output.quiet, _output.owes_json = quiet, as_json


def begin_phase(phase: str) -> None:
    """Name what the command does now, for the lines of `pulse`; "" to be silent.

    Example: "loading the model".
    """
    _output.amount = None
    if phase != _output.phase:
        _output.phase, _output.phase_start = phase, time.monotonic()


@contextmanager
def pulse(phase: str) -> Iterator[None]:
    """In the block, print what the command is doing whenever nothing was printed for 5 seconds.

    Example: "infir2: loading the model, 15 s so far"
    """
    begin_phase(phase)
    _output.newest = time.monotonic()
    stop = threading.Event()
    thread = threading.Thread(target=_pulse, args=(stop,), name="infir2-pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _pulse(stop: threading.Event) -> None:
    wait = _PULSE_SECONDS
    while not stop.wait(wait):
        now = time.monotonic()
        wait = _output.newest + _PULSE_SECONDS - now
        if wait <= 0:
            wait = _PULSE_SECONDS
            if _output.phase and not _output.quiet and not _output.num_bars:
                seconds = now - _output.phase_start
                # The main thread may hold the lock of sys.stderr, or fork at this moment.
                amount = _output.amount or ""
                log_in_signal_handler(f"{_output.phase}{amount}, {seconds:.0f} s so far")
            _output.newest = now


def _print(text: str, stream: Any) -> None:
    _output.newest = time.monotonic()
    encoding = stream.encoding or "utf-8"  # which lacks some characters, as of a file's name
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=stream, flush=True)


def print_result(text: str) -> None:
    """Print the result of a command to stdout."""
    _print(text, sys.stdout)


def print_part(text: str, dim: bool = False) -> None:
    """Print a part of a line to stdout, without a newline.

    A `dim` part, such as a thought, goes to stderr unless stdout is a terminal. The text may be a
    model's: on a terminal, control characters are escaped.
    """
    is_terminal = sys.stdout.isatty()
    stream = sys.stderr if dim and not is_terminal else sys.stdout
    if stream.isatty():
        text = _without_controls(text)
    stream.write(f"\033[2m{text}\033[0m" if dim and is_terminal else text)
    stream.flush()


def print_marked(runs: Iterable[tuple[str, bool]]) -> None:
    """Print runs of text to stdout, the marked ones green on a terminal, else between ⟦ and ⟧.

    The text may be of a data set: on a terminal, control characters are escaped.
    """
    is_terminal = sys.stdout.isatty()
    begin, end = ("\033[32m", "\033[0m") if is_terminal else ("⟦", "⟧")
    parts = []
    for text, marked in runs:
        clean = _without_controls(text) if is_terminal else text
        parts.append(f"{begin}{clean}{end}" if marked else clean)
    print_result("".join(parts))


def read_line(prompt: str) -> str | None:
    """The next line of stdin; on a terminal after a prompt, with editing. None at the end.

    Ctrl-C, too, is the end.
    """
    try:
        if not sys.stdin.isatty():
            return sys.stdin.readline() or None
        with suppress(ImportError):
            import readline  # noqa: F401 - `input` then edits and remembers lines
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print_part("\n")
        return None


def print_json(value: Any) -> None:
    """Print the result of a command to stdout as one JSON document."""
    _output.owes_json = False
    print_result(json.dumps(value, indent=1, ensure_ascii=False))


def print_json_error(sentence: str, exit_code: int) -> None:
    """Print an error as JSON too, if the command was asked for JSON and has printed none."""
    if _output.owes_json:
        print_json({"error": sentence, "exit_code": exit_code})


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
    """Print the note `source: text` to stderr; `source` is a part of the program: infir2, sft."""
    if not _output.quiet:
        log_text(f"{source}: {text}")


def log_error(text: str, source: str = "infir2") -> None:
    """Print `source: error: text` to stderr.

    The text may quote a hostile file: control characters are escaped and a long text is cut.
    """
    log_text(f"{source}: error: {_printable(text)}")


def _printable(text: str) -> str:
    if len(text) > _MAX_ERROR_CHARACTERS:
        text = f"{text[: _MAX_ERROR_CHARACTERS // 2]} ... {text[-_MAX_ERROR_CHARACTERS // 2 :]}"
    return _without_controls(text)


def _without_controls(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def log_text(text: str) -> None:
    """Print text without a prefix to stderr, such as scores."""
    _print(text, sys.stderr)


def log_in_signal_handler(text: str, source: str = "infir2") -> None:
    """`log` for a Python signal handler.

    The handler may interrupt a `print` of the main thread, whose stream then raises RuntimeError
    on a second write. This function writes to the file descriptor instead.
    """
    os.write(2, f"{source}: {text}\n".encode())


class StepProgress:
    """Progress of a run: a bar on a terminal, otherwise one plain line every 3 seconds.

    Both show the step, a text (loss, tokens/s) and the time left. `unit` is what is counted.

    Example: sft step 20/100 loss 2.31 4,210 tokens/s left 95 s
    """

    def __init__(self, name: str, total_steps: int, resumed_step: int, unit: str = "step") -> None:
        self._name, self._total, self._unit = name, total_steps, unit
        self._last_printed = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not _output.quiet:
            self._bar = _step_bar()
            _output.num_bars += 1
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
        self._first = self._first or (step, now)
        is_due = now - self._last_printed >= _PLAIN_INTERVAL_SECONDS or step == self._total
        if is_due and not _output.quiet:
            line = f"{self._name} {self._unit} {step}/{self._total} {text}"
            line += self._time_left(step, now)
            log_text(line)
            self._last_printed = now

    def _time_left(self, step: int, now: float) -> str:
        """From the steps after the first one, which compiles kernels and fills caches."""
        assert self._first is not None
        first_step, first_time = self._first
        if step == first_step:
            return ""
        seconds_per_step = (now - first_time) / (step - first_step)
        return f" left {_duration(seconds_per_step * (self._total - step))}"

    def log(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self._bar is None:
            log(text, self._name)
        elif not _output.quiet:
            line = f"{self._name}: {text}"
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            _output.num_bars -= 1


@contextmanager
def byte_progress(description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(num_bytes)` for a progress bar of a conversion or a save.

    The bar appears on a terminal only, and only for 256 MiB or more: shorter work is done before
    anyone could read it. Without a bar the lines of `pulse` say how much is done.
    """
    begin_phase(description)
    if not sys.stderr.isatty() or total_bytes < _MIN_BAR_BYTES or _output.quiet:
        with _pulsed_amount(total_bytes) as advance:
            yield advance
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
    _output.num_bars += 1
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(description, total=total_bytes)
            yield lambda num_bytes: progress.advance(task, num_bytes)
    finally:
        _output.num_bars -= 1


@contextmanager
def _pulsed_amount(total_bytes: int) -> Iterator[Callable[[int], None]]:
    amount = _output.amount = _Amount(total_bytes, time.monotonic())

    def advance(num_bytes: int) -> None:
        amount.done += num_bytes

    try:
        yield advance
    finally:
        if _output.amount is amount:  # a save in the background ends in another phase
            _output.amount = None


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
