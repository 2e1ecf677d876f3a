"""F18: honest programs of many kinds score 1, cheats of as many kinds score 0.

The programs are in programs_honest.txt and programs_cheats.txt. A section is `=== NAME`, the
program, and a test: `--- run INPUT == OUTPUT`, `--- call ARGUMENTS == RESULT` of its function f, or
`--- test ENTRY_POINT` with assertions and perhaps `--- setup`. `@X` stands for `=== define X`.
"""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from infir2.verify import Limits, run_code


def sections(name: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Program and test of each section of a file."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    found, definitions = {}, {}
    for section in text.split("=== ")[1:]:
        title, _, body = section.partition("\n")
        if title.startswith("define "):
            definitions["@" + title.removeprefix("define ")] = body
            continue
        for mark, definition in definitions.items():
            body = body.replace(mark + "\n", definition)
        program, kind, rest = re.split(r"^--- (\w+) ?", body, maxsplit=1, flags=re.MULTILINE)
        assert title not in found, title
        found[title] = (program, as_test(kind, rest))
    return found


def as_test(kind: str, text: str) -> dict[str, Any]:
    if kind == "test":
        entry_point, _, code = text.partition("\n")
        code, _, setup = code.partition("--- setup\n")
        return {"code": code, "setup": setup, "entry_point": entry_point}
    given, expected = map(ast.literal_eval, text.strip().rsplit(" == ", 1))
    if kind == "run":
        return {"input": given, "output": expected}
    return {"fn_name": "f", "args": list(given), "expected": expected}


HONEST, CHEATS = sections("programs_honest.txt"), sections("programs_cheats.txt")


@pytest.mark.parametrize(("program", "test"), HONEST.values(), ids=HONEST)
def test_honest_programs_score_1(program: str, test: dict[str, Any]) -> None:
    verdict = run_code(program, [test], Limits(seconds=60.0, total_seconds=60.0))
    assert verdict.reason == "ok", verdict


@pytest.mark.parametrize(("program", "test"), CHEATS.values(), ids=CHEATS)
def test_cheats_score_0(program: str, test: dict[str, Any]) -> None:
    verdict = run_code(program, [test], Limits(seconds=5.0, memory_bytes=1 << 28))
    assert not verdict.correct
    assert verdict.reason != "jail_error", verdict


def test_the_table_has_many_kinds() -> None:
    assert len(HONEST) >= 60
    assert len(CHEATS) >= 60
