"""SIGTERM and Ctrl-C before, inside and after a run; one object owns both handlers."""

import os
import signal

import pytest

from infir2.processes import ProcessSignals, stop_error


def test_before_a_run_sigterm_ends_the_command_with_75(capfd: pytest.CaptureFixture[str]) -> None:
    signals = ProcessSignals()
    with pytest.raises(SystemExit) as stop, signals.command("stopped early."):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 75
    assert "stopped early." in capfd.readouterr().err


def test_inside_a_run_sigterm_requests_a_stop_and_a_closing_rank_keeps_its_code() -> None:
    signals = ProcessSignals()
    with signals.command("stopped early."):
        with signals.run():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.stop_signal == signal.SIGTERM
        assert signals.keep_exit_code
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher ends all ranks: this one is closing
        assert signals.wait_for_termination(0.0)


def test_a_run_without_a_command_works_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signals = ProcessSignals()
    with signals.run():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.stop_signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_signal_chooses_the_exit_code() -> None:
    assert stop_error(signal.SIGTERM, "saved").exit_code == 75
    assert stop_error(signal.SIGINT, "saved").exit_code == 130
