"""A user's mistake on the command line: one sentence, an exit code, and nothing left behind."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from infir2.cli import main


def each(mistakes: Sequence[tuple[str, int, str]]) -> pytest.MarkDecorator:
    """Test each mistake: its words, its exit code and a part of its sentence."""
    ids = [words for words, _, _ in mistakes]
    return pytest.mark.parametrize(("words", "code", "sentence"), mistakes, ids=ids)


def sentence_of(
    capsys: pytest.CaptureFixture[str], place: Path, arguments: Sequence[str], code: int
) -> str:
    """The one line on stderr of a command in `place` that ends with `code`; stdout has nothing,
    or with --json the error."""
    before = sorted(place.rglob("*"))
    assert main(list(arguments)) == code
    output = capsys.readouterr()
    (line,) = [line for line in output.err.splitlines() if " so far" not in line]
    assert line.startswith("infir2: error: ")
    if output.out:  # of a verb that has --json
        assert "--json" in arguments
        assert json.loads(output.out)["exit_code"] == code
    assert sorted(place.rglob("*")) == before
    return line
