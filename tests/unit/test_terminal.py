"""terminal: what is printed where."""

import subprocess
import sys

import pytest

from infir2.terminal import StepProgress, log, log_error, log_text, print_result


def test_results_go_to_stdout_and_messages_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_result("12 tensors")
    log("a worker died", "infir2 launch")
    log_error("no such file.")
    log_text("avg@4 0.5")
    captured = capsys.readouterr()
    assert captured.out == "12 tensors\n"
    lines = ["infir2 launch: a worker died", "infir2: error: no such file.", "avg@4 0.5"]
    assert captured.err.splitlines() == lines


def test_without_a_terminal_progress_prints_the_last_step_and_what_is_logged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = StepProgress("sft", total_steps=3, resumed_step=1)
    progress.log("resumed from [step-1]")
    progress.update(2, "loss 2.00")
    progress.update(3, "loss 1.50")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["sft: resumed from [step-1]", "sft step 3/3 loss 1.50 left 0 s"]


def test_the_time_left_does_not_count_the_first_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step compiles kernels: 613 minutes were announced for a run of two."""
    now = [0.0]
    monkeypatch.setattr("infir2.terminal.time.monotonic", lambda: now[0])
    progress = StepProgress("cpt", total_steps=100, resumed_step=0)
    for step, time in ((1, 60.0), (2, 61.0), (6, 65.0)):
        now[0] = time
        progress.update(step, "loss 2.00")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["cpt step 1/100 loss 2.00", "cpt step 6/100 loss 2.00 left 2 min"]


def test_a_signal_handler_may_log_while_the_main_thread_prints() -> None:
    """A handler that used `print` would raise RuntimeError: reentrant call."""
    code = """
import io, signal, sys
from infir2.terminal import log_in_signal_handler
class RawStderr(io.FileIO):
    def write(self, data):
        signal.raise_signal(signal.SIGUSR1)
        return super().write(data)
signal.signal(signal.SIGUSR1, lambda *_: log_in_signal_handler("stopped"))
raw = RawStderr(2, "w", closefd=False)
sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=True)
print("hello", file=sys.stderr, flush=True)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert sorted(result.stderr.splitlines()) == ["hello", "infir2: stopped"]


def test_an_error_that_quotes_a_hostile_file_is_printable_and_short(capsys) -> None:
    log_error("a\nb: \x1b[31mred\0\ud800 \u00e9")
    assert capsys.readouterr().err == ("infir2: error: a\nb: \\x1b[31mred\\x00\\ud800 \u00e9\n")
    log_error("begin " + "x" * 10**6 + " end")
    error = capsys.readouterr().err
    assert len(error) < 2100
    assert error.startswith("infir2: error: begin x")
    assert error.endswith("x end\n")
