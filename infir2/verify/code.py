"""Does a program pass its tests? Programs run in jails; the verdict is made outside of them."""

import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from math import isclose
from typing import Any

from infir2.verify.plain import decode, encode
from infir2.verify.sandbox import Cell, JailBrokenError, JailError, Limits
from infir2.verify.verdict import Reason, Verdict

# What the usual judges import in front of a solution.
PRELUDE = """\
from typing import *
from collections import *
from itertools import *
from functools import *
from heapq import *
from bisect import *
from math import *
from builtins import *
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
"""

outcomes: Counter[Reason] = Counter()
_outcomes_lock = threading.Lock()
_places = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))


def run_code(
    program: str, tests: Sequence[dict[str, Any]], limits: Limits | None = None
) -> Verdict:
    """Run a Python program (standard library only) against its tests; "ok" when all pass, else the first failure.

    A test is one of
    - {"input": str, "output": str}: a run with that standard input; output compared line by line, numbers by value;
    - {"fn_name": str, "args": list, "expected": value}: a call of a function, or of a method of class `Solution`;
    - {"code": str, "entry_point": str, "setup": str} (the last two optional): asserts; with `entry_point`, `check(it)` is
      called after `code` (HumanEval). Names that `setup` defines are the test's own and cannot be replaced by the program.
    Arguments and results cross by value, as plain Python values. Expected outputs and asserts never enter the program's jail.

    `limits.seconds` is for each test, `limits.total_seconds` for all of them. A broken jail is tried again once, then gets
    the reason "jail_error"; JailError is raised when jails cannot be made here, or break in more than 1 % of the runs.
    Counts are in `outcomes`.
    """
    if not tests:
        raise ValueError("run_code needs at least one test: a program without tests has no verdict")
    for place, test in enumerate(tests):
        if not any(
            kind <= test.keys()
            for kind in ({"input", "output"}, {"fn_name", "args", "expected"}, {"code"})
        ):
            raise ValueError(
                f"test {place} needs input and output, or fn_name, args and expected, or code; it has {sorted(test)}"
            )
    limits = limits or Limits()
    began = time.monotonic()
    with _places:
        reason, detail = _Run(program, tests, limits).attempt()
        if reason == "jail_error":
            reason, detail = _Run(program, tests, limits).attempt()
    with _outcomes_lock:
        outcomes[reason] += 1
        failures, total = outcomes["jail_error"], outcomes.total()
    if failures > max(3, total // 100):
        raise JailError(
            f"{failures} of {total} jails broke down (last: {detail}); look at this machine's memory and processes"
        )
    return Verdict(reason, detail=detail, seconds=time.monotonic() - began)


class _Run:
    """One program against its tests. Methods return (reason, detail)."""

    def __init__(self, program: str, tests: Sequence[dict[str, Any]], limits: Limits) -> None:
        self.program, self.tests, self.limits = program, tests, limits
        self.last = time.monotonic() + limits.total_seconds

    def attempt(self) -> tuple[Reason, str]:
        """The first failure, or ("ok", "")."""
        calls = [test for test in self.tests if "fn_name" in test]
        try:
            for place, test in enumerate(self.tests):
                if "fn_name" not in test:
                    reason, detail = self._input(test) if "input" in test else self._asserts(test)
                    if reason != "ok":
                        return reason, f"test {place}: {detail}"
            return self._calls(calls) if calls else ("ok", "")
        except JailBrokenError as error:
            return "jail_error", str(error)

    def _deadline(self) -> float:
        return min(time.monotonic() + self.limits.seconds, self.last)

    def _input(self, test: dict[str, Any]) -> tuple[Reason, str]:
        expected = str(test["output"])
        with Cell(self.limits, stdin=str(test["input"]).encode(errors="replace")) as cell:
            deadline = self._deadline()
            cell.send({"mode": "script", "program": self.program})
            output, code, stopped = cell.output(
                deadline, max(self.limits.output_bytes, 2 * len(expected.encode()))
            )
            if stopped == "timeout":
                return "timeout", "the time was over"
            if stopped:
                return "wrong", "more output than allowed"
            if code != 0:
                return _ended(cell, code)
        return (
            ("ok", "")
            if same_output(output.decode(errors="replace"), expected)
            else ("wrong", "the output differs")
        )

    def _load(self, cell: Cell, prelude: str, deadline: float) -> tuple[Reason, str, list[str]]:
        cell.send({"mode": "serve", "program": self.program, "prelude": prelude})
        said = cell.channel.receive(deadline)
        if said == {}:
            return "timeout", "the time was over while the program was loading", []
        if said is None:
            return "error", "the program ended before it could be called", []
        names = said.get("names")
        return ("ok", "", names) if isinstance(names, list) else (*_complaint(said), [])

    def _calls(self, tests: Sequence[dict[str, Any]]) -> tuple[Reason, str]:
        with Cell(self.limits) as cell:
            reason, detail, _ = self._load(cell, PRELUDE, self._deadline())
            for place, test in enumerate(tests):
                if reason != "ok":
                    break
                reason, detail = _call(cell, test, self._deadline())
                detail = f"call {place}: {detail}"
        return reason, detail if reason != "ok" else ""

    def _asserts(self, test: dict[str, Any]) -> tuple[Reason, str]:
        with Cell(self.limits) as solution:
            deadline = self._deadline()
            reason, detail, names = self._load(solution, "", deadline)
            if reason != "ok":
                return reason, detail
            with Cell(self.limits, peer=solution.channel.socket) as examiner:
                key = secrets.token_hex(8)
                request = {
                    "entry_point": test.get("entry_point", ""),
                    "setup": test.get("setup", ""),
                    "code": test["code"],
                }
                examiner.send({"mode": "examine", "names": names, "key": key} | request)
                said = examiner.channel.receive(deadline)
        if said == {}:
            return "timeout", "the time was over"
        if said is None or said.get("key") != key:
            return "error", "the test ended without a verdict"
        return said["outcome"], said["detail"]


def _ended(cell: Cell, code: int | None) -> tuple[Reason, str]:
    """Why a program ended early, from its own last words (they choose among reasons that all score 0)."""
    if code is not None and code < 0:
        return "killed", f"ended by signal {-code}"
    return _complaint(
        cell.channel.receive(time.monotonic() + 0.1) or {"error": f"exit code {code}"}
    )


def _complaint(said: dict[str, Any]) -> tuple[Reason, str]:
    return (
        "oom" if said.get("error") == "MemoryError" else "error"
    ), f"{said.get('error')}: {said.get('detail', '')}"


def _call(cell: Cell, test: dict[str, Any], deadline: float) -> tuple[Reason, str]:
    key = secrets.token_hex(8)
    request = {
        "id": key,
        "target": ["name", test["fn_name"]],
        "arguments": encode(list(test["args"])),
        "options": encode({}),
    }
    cell.send(request)
    said = cell.channel.receive(deadline)
    if said == {}:
        return "timeout", "the time was over"
    if said is None or said.get("id") != key:
        return "error", "the program ended, or answered out of turn"
    if "value" not in said:
        return _complaint(said)
    try:
        value = decode(said["value"])
    except ValueError as error:
        return "wrong", str(error)
    return ("ok", "") if same_value(value, test["expected"]) else ("wrong", "the result differs")


def same_value(value: Any, expected: Any) -> bool:
    """Equality of plain values: tuples count as lists (expected values come from JSON), floats agree to 1e-9."""
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(
            same_value(value[key], expected[key]) for key in expected
        )
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, float) and isinstance(expected, float):
        return value == expected or isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    return bool(value == expected)


def same_output(output: str, expected: str) -> bool:
    """Equality of printed text: trailing space and blank last lines do not count, numbers in a line compare as decimals."""
    lines, wanted = (
        [line.split() for line in text.rstrip().splitlines()] for text in (output, expected)
    )
    return len(lines) == len(wanted) and all(
        len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(lines, wanted, strict=True)
    )


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if len(word) > 400 or len(expected) > 400:
        return False
    try:
        return Decimal(word) == Decimal(expected)
    except InvalidOperation:
        return False
