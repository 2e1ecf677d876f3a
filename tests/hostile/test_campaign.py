"""The campaign of `make test-hostile`: a few cases of every reader, and that it sees failures."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bounded
import pytest
from bounded import Case, Reader, nothing_else_below, run_command
from readers import READERS

from infir2.errors import DataError

CASES = {"chat template (Jinja)": 4, "answers": 6, "programs that cheat": 4}


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_few_cases_of_every_reader(reader: Reader, tmp_path: Path) -> None:
    number = CASES.get(reader.name, 8)
    tally = bounded.run(reader, number, tmp_path / "cases")
    assert not tally.failures
    assert (tally.cases, tally.refused + tally.read) == (number, number)


def refuse() -> None:
    raise DataError("no")


def fill_memory() -> None:
    bytearray(400 << 20)  # also if a collection frees what an earlier test has left


def bad_sentence() -> None:
    raise DataError("Traceback (most recent call last)")


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "exception": (lambda: 1 / 0, "ZeroDivisionError"),
    "signal": (lambda: os.kill(os.getpid(), signal.SIGTERM), "ended with -15"),
    "hang": (lambda: time.sleep(100), "took longer than"),
    "slow": (lambda: time.sleep(1.2), "took "),
    "memory": (fill_memory, " MiB"),
    "sentence": (bad_sentence, "no sentence"),
    "exit": (lambda: exit(0), "SystemExit"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_case_that_fails_is_counted_and_the_next_ones_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "CASE_BYTES", 100 << 20)
    if kind in ("hang", "slow"):
        monkeypatch.setattr(bounded, "CASE_SECONDS", 1.0)
        monkeypatch.setattr(bounded, "GRACE_SECONDS", 2.0)
    case, text = BAD[kind]

    def cases(_: Path) -> Iterator[Case]:
        yield from (("read", int), ("refused", refuse), ("bad", case))
        yield from itertools.repeat(("read", int))

    tally = bounded.run(Reader("reader", cases), 5, tmp_path / "c")
    assert (tally.refused, tally.read) == (1, 3)
    assert [failure.startswith("bad: ") for failure in tally.failures] == [True]
    assert text in tally.failures[0]


def test_a_reader_without_cases_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)case 0 cannot be made: .*ZeroDivisionError"):
        bounded.run(Reader("reader", lambda _: iter([("", 1 / 0)])), 1, tmp_path / "cases")


def test_a_command_ends_well_or_in_its_sentence() -> None:
    run_command(["--help"])
    with pytest.raises(DataError.__base__, match=r"^infir2: error: .*no-such-verb"):
        run_command(["no-such-verb"])


def test_other_files_are_seen(tmp_path: Path) -> None:
    with nothing_else_below(tmp_path, tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out.failed-1").mkdir()
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(AssertionError, match="other"),
        nothing_else_below(tmp_path, tmp_path / "out"),
    ):
        (tmp_path / "other").mkdir()
