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
from infir2.verify.verdict import Reason, Verdict, verdict

# What the usual judges import in front of a solution.
PRELUDE = """\
from typing import *
from collections import *
from itertools import *
from functools import *
from heapq import *
from bisect import *
from math import *
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
"""

outcomes: Counter[Reason] = Counter()
_outcomes_lock = threading.Lock()
_places = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))


def run_code(program: str, tests: Sequence[dict[str, Any]], limits: Limits | None = None) -> Verdict:
    """Run a Python program (standard library only) against its tests; "ok" when all pass, else the first failure.

    A test is one of
    - {"input": str, "output": str}: a run with that standard input; output compared line by line, numbers by value;
    - {"fn_name": str, "args": list, "expected": value}: a call of a function, or of a method of class `Solution`;
    - {"code": str, "entry_point": str, "setup": str} (the last two optional): asserts; with `entry_point`, `check(it)` is
      called after `code` (HumanEval). Names that `setup` defines are the test's own and cannot be replaced by the program.
    Arguments and results cross by value, as plain Python values. Expected outputs and asserts never enter the program's jail.

    `limits.seconds` is for each test. A broken jail is tried again once, then gets the reason "jail_error"; JailError is
    raised when jails cannot be made here, or break in more than 1 % of the runs. Counts are in `outcomes`.
    """
    if not tests:
        raise ValueError("run_code needs at least one test: a program without tests has no verdict")
    limits = limits or Limits()
    began = time.monotonic()
    with _places:
        reason, detail = _attempt(program, tests, limits)
        if reason == "jail_error":
            reason, detail = _attempt(program, tests, limits)
    with _outcomes_lock:
        outcomes[reason] += 1
        failures, total = outcomes["jail_error"], outcomes.total()
    if failures > max(3, total // 100):
        raise JailError(f"{failures} of {total} jails broke down (last: {detail}); look at this machine's memory and processes")
    return verdict(reason, detail=detail, seconds=time.monotonic() - began)


def _attempt(program: str, tests: Sequence[dict[str, Any]], limits: Limits) -> tuple[Reason, str]:
    calls = [test for test in tests if "fn_name" in test]
    try:
        for place, test in enumerate(tests):
            if "fn_name" in test:
                continue
            reason, detail = _run_input(program, test, limits) if "input" in test else _run_asserts(program, test, limits)
            if reason != "ok":
                return reason, f"test {place}: {detail}"
        return _run_calls(program, calls, limits) if calls else ("ok", "")
    except JailBrokenError as error:
        return "jail_error", str(error)


def _run_input(program: str, test: dict[str, Any], limits: Limits) -> tuple[Reason, str]:
    expected = str(test["output"])
    with Cell(limits, stdin=str(test["input"]).encode()) as cell:
        deadline = time.monotonic() + limits.seconds
        cell.send({"mode": "script", "program": program})
        output, code, stopped = cell.output(deadline, max(limits.output_bytes, 2 * len(expected.encode())))
        if stopped == "timeout":
            return "timeout", f"stopped after {limits.seconds:g} s"
        if stopped:
            return "wrong", "more output than allowed"
        if code != 0:
            return _ended(cell, code)
    return ("ok", "") if same_output(output.decode(errors="replace"), expected) else ("wrong", "the output differs")


def _ended(cell: Cell, code: int | None) -> tuple[Reason, str]:
    """Why a program ended early, from its own last words (they choose among reasons that all score 0)."""
    if code is not None and code < 0:
        return "killed", f"ended by signal {-code}"
    return _complaint(cell.receive(time.monotonic() + 0.1) or {"error": f"exit code {code}"})


def _complaint(said: dict[str, Any]) -> tuple[Reason, str]:
    return ("oom" if said.get("error") == "MemoryError" else "error"), f"{said.get('error')}: {said.get('detail', '')}"


def _load(cell: Cell, program: str, deadline: float, limits: Limits) -> tuple[Reason, str, dict[str, Any]]:
    cell.send({"mode": "serve", "program": program})
    said = cell.receive(deadline)
    if said == {}:
        return "timeout", f"the program's own statements took longer than {limits.seconds:g} s", {}
    if said is None:
        return "error", "the program ended before it could be called", {}
    names = said.get("names")
    return ("ok", "", names) if isinstance(names, dict) else (*_complaint(said), {})


def _run_calls(program: str, tests: Sequence[dict[str, Any]], limits: Limits) -> tuple[Reason, str]:
    with Cell(limits) as cell:
        deadline = time.monotonic() + limits.seconds
        reason, detail, _ = _load(cell, PRELUDE + program, deadline, limits)
        for place, test in enumerate(tests):
            if reason != "ok":
                break
            reason, detail = _call(cell, test, time.monotonic() + limits.seconds)
            detail = f"call {place}: {detail}"
    return reason, detail if reason != "ok" else ""


def _call(cell: Cell, test: dict[str, Any], deadline: float) -> tuple[Reason, str]:
    key = secrets.token_hex(8)
    request = {"id": key, "target": ["name", test["fn_name"]], "arguments": encode(list(test["args"])), "options": encode({})}
    cell.send(request)
    said = cell.receive(deadline)
    if said == {}:
        return "timeout", f"stopped after {cell.limits.seconds:g} s"
    if said is None or said.get("id") != key:
        return "error", "the program ended, or answered out of turn"
    if "value" not in said:
        return _complaint(said)
    try:
        value = decode(said["value"])
    except ValueError as error:
        return "wrong", str(error)
    return ("ok", "") if same_value(value, test["expected"]) else ("wrong", "the result differs")


def _run_asserts(program: str, test: dict[str, Any], limits: Limits) -> tuple[Reason, str]:
    with Cell(limits) as solution:
        deadline = time.monotonic() + limits.seconds
        reason, detail, names = _load(solution, program, deadline, limits)
        if reason != "ok":
            return reason, detail
        with Cell(limits, peer=solution.control) as examiner:
            key = secrets.token_hex(8)
            request = {"entry_point": test.get("entry_point", ""), "setup": test.get("setup", ""), "code": test["code"]}
            examiner.send({"mode": "examine", "names": names, "key": key} | request)
            said = examiner.receive(deadline)
    if said == {}:
        return "timeout", f"stopped after {limits.seconds:g} s"
    if said is None or said.get("key") != key:
        return "error", "the test ended without a verdict"
    return said["outcome"], said["detail"]


def same_value(value: Any, expected: Any) -> bool:
    """Equality of plain values: tuples count as lists (expected values come from JSON), floats agree to 1e-9."""
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same_value(value[key], expected[key]) for key in expected)
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, float) and isinstance(expected, int | float):
        return value == expected or isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    return bool(value == expected)


def same_output(output: str, expected: str) -> bool:
    """Equality of printed text: trailing space and blank last lines do not count, numbers in a line compare as decimals."""
    lines, wanted = ([line.split() for line in text.rstrip().splitlines()] for text in (output, expected))
    return len(lines) == len(wanted) and all(len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(lines, wanted, strict=True))


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if len(word) > 400 or len(expected) > 400:
        return False
    try:
        return Decimal(word) == Decimal(expected)
    except InvalidOperation:
        return False
