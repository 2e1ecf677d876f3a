"""Run programs against tests. Programs run in jails; the parent process decides the verdict."""

import importlib.util
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from infir2.verify.compare import (
    contest_value,
    same_contest_output,
    same_contest_value,
    same_output,
    same_value,
    unhashed,
)
from infir2.verify.plain import encode
from infir2.verify.sandbox import Cell, JailBrokenError, JailError, Limits
from infir2.verify.verdict import Reason, Verdict

# The imports that common judges put before a solution.
PRELUDE = """\
from typing import *
from collections import *
from itertools import *
from functools import *
from heapq import *
from bisect import *
from math import *
from builtins import *
import bisect, collections, copy, functools, heapq, itertools
import math, operator, random, re, string, sys
"""

Rules = Literal["infir2", "live_code_bench"]
# Of one byte in JSON: a control character is written as \u0007.
_JSON_BYTES = 6
outcomes: Counter[Reason] = Counter()
_outcomes_lock = threading.Lock()
_run_slots = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))


def run_code(
    program: str,
    tests: Sequence[dict[str, Any]],
    limits: Limits | None = None,
    rules: Rules = "infir2",
) -> Verdict:
    """Run a Python program (standard library only); "ok" if all tests pass, else the first failure.

    A test is one of
    - {"input": str, "output": str}: run with that standard input, and compare the output line by
      line, numbers by value;
    - {"fn_name": str, "args": list, "expected": value}: call a function, or a method of `Solution`.
      Iterators, ranges and views equal lists of their items; other keys equal an expected dict's
      string keys by their spelling, since JSON has no others.
    - {"code": str, "entry_point": str, "setup": str}, the last two optional: run asserts; with
      `entry_point`, call `check(entry_point)` after `code` (HumanEval). From the program a test
      gets the entry point, or without one the names that it uses and does not define; never a
      helper that judges results, and a standard name only if the test is about nothing else.
    Plain values cross by value. In asserts, objects of the program's classes are proxies; they
    never equal a plain value, and a list that a function changed is updated if it returned None.
    Expected outputs and asserts never enter the program's jail.

    With `rules` "live_code_bench" the program has numpy too, tests are all of the first or all of
    the second form, and the verdict is that of LiveCodeBench's runner (contest.py): one process
    runs all tests, SystemExit is a normal end, `==` compares results, exact decimals output.

    `limits.seconds` bounds each test, `limits.total_seconds` all of them. A broken jail is retried
    once and then gets the reason "jail_error". Outcomes are counted in `outcomes`.

    Raises:
        ValueError: `tests` is empty, or a test has none of these forms.
        JailError: this machine cannot create jails, or more than 1 % of them break.
    """
    _check_tests(tests)
    limits = limits or Limits()
    start = time.monotonic()
    kind = _Run if rules == "infir2" else _ContestRun
    with _run_slots:
        reason, detail = kind(program, tests, limits).attempt()
        if reason == "jail_error":
            reason, detail = kind(program, tests, limits).attempt()
    with _outcomes_lock:
        outcomes[reason] += 1
        failures, total = outcomes["jail_error"], outcomes.total()
    if failures > max(3, total // 100):
        raise JailError(
            f"{failures} of {total} jails broke down (last: {detail}); "
            "check this machine's memory and processes"
        )
    return Verdict(reason, detail=detail, seconds=time.monotonic() - start)


def _check_tests(tests: Sequence[dict[str, Any]]) -> None:
    if not tests:
        raise ValueError("run_code needs at least one test: a program without tests has no verdict")
    kinds = ({"input", "output"}, {"fn_name", "args", "expected"}, {"code"})
    for index, test in enumerate(tests):
        if not any(kind <= test.keys() for kind in kinds):
            raise ValueError(
                f"test {index} needs input and output, or fn_name, args and expected, or code; "
                f"it has {sorted(test)}"
            )


class _Run:
    """One program against its tests. Methods return (reason, detail)."""

    def __init__(self, program: str, tests: Sequence[dict[str, Any]], limits: Limits) -> None:
        self.program, self.tests, self.limits = program, tests, limits
        self.total_deadline = time.monotonic() + limits.total_seconds

    def attempt(self) -> tuple[Reason, str]:
        """The first failure, or ("ok", "")."""
        try:
            return self._attempt()
        except JailBrokenError as error:
            return "jail_error", str(error)

    def _attempt(self) -> tuple[Reason, str]:
        calls = [test for test in self.tests if "fn_name" in test]
        for index, test in enumerate(self.tests):
            if "fn_name" not in test:
                reason, detail = self._input(test) if "input" in test else self._asserts(test)
                if reason != "ok":
                    return reason, f"test {index}: {detail}"
        return self._calls(calls) if calls else ("ok", "")

    def _deadline(self) -> float:
        return min(time.monotonic() + self.limits.seconds, self.total_deadline)

    def _input(self, test: dict[str, Any]) -> tuple[Reason, str]:
        expected = str(test["output"])
        with Cell(self.limits, stdin=str(test["input"]).encode(errors="replace")) as cell:
            deadline = self._deadline()
            cell.send({"mode": "script", "program": self.program})
            output, code, stopped = cell.output(
                deadline, max(self.limits.output_bytes, 2 * len(expected.encode()))
            )
            if stopped == "timeout":
                return "timeout", "the time limit expired"
            if stopped:
                return "wrong", "the output is larger than allowed"
            if code != 0:
                return _early_exit(cell, code)
        same = same_output(output.decode(errors="replace"), expected)
        return ("ok", "") if same else ("wrong", "the output differs")

    def _load(self, cell: Cell, prelude: str, deadline: float) -> tuple[Reason, str, list[str]]:
        cell.send({"mode": "serve", "program": self.program, "prelude": prelude})
        reply = cell.channel.receive(deadline)
        if reply == {}:
            return "timeout", "the time limit expired while the program was loading", []
        if reply is None:
            return *_ended(cell, "the program ended before it could be called"), []
        names = reply.get("names")
        return ("ok", "", names) if isinstance(names, list) else (*_reported_error(reply), [])

    def _calls(self, tests: Sequence[dict[str, Any]]) -> tuple[Reason, str]:
        with Cell(self.limits) as cell:
            reason, detail, _ = self._load(cell, PRELUDE, self._deadline())
            for index, test in enumerate(tests):
                if reason != "ok":
                    break
                reason, detail = _call(cell, test, self._deadline())
                detail = f"call {index}: {detail}"
        return reason, detail if reason != "ok" else ""

    def _asserts(self, test: dict[str, Any]) -> tuple[Reason, str]:
        with Cell(self.limits) as solution:
            deadline = self._deadline()
            reason, detail, names = self._load(solution, "", deadline)
            if reason != "ok":
                return reason, detail
            left = deadline - time.monotonic()
            with Cell(self.limits, peer=solution.channel.socket) as examiner:
                deadline = min(time.monotonic() + left, self.total_deadline)  # its start is free
                key = secrets.token_hex(8)
                request = {
                    "entry_point": test.get("entry_point", ""),
                    "setup": test.get("setup", ""),
                    "code": test["code"],
                }
                examiner.send({"mode": "examine", "names": names, "key": key} | request)
                reply = examiner.channel.receive(deadline)
                if reply == {}:
                    return "timeout", "the time limit expired"
                if reply is None or reply.get("key") != key:
                    return _ended(examiner, "the test ended without a verdict")
                if reply["outcome"] == "ended":
                    return _ended(solution, reply["detail"])
        return reply["outcome"], reply["detail"]


class _ContestRun(_Run):
    """One program against its tests, by LiveCodeBench's rules."""

    def _attempt(self) -> tuple[Reason, str]:
        if len({test.get("fn_name", "") for test in self.tests}) > 1:
            raise ValueError("the tests of a contest's program are all of one kind")
        with Cell(self.limits, packages=_numpy()) as cell:
            largest = max(len(str(test.get("output", ""))) for test in self.tests)
            cell.channel.max_bytes += 2 * _JSON_BYTES * largest
            request = {"program": self.program, "packages": [cell.package_folder]}
            cell.send({"mode": "contest", "function": self.tests[0].get("fn_name", "")} | request)
            reply = cell.channel.receive(self._deadline())
            if reply == {}:
                return "timeout", "the time limit expired while the program was loading"
            if reply is None or "loaded" not in reply:
                return _failed(cell, reply, "the program ended while it was loading")
            for index, test in enumerate(self.tests):
                reason, detail = self._test(cell, test)
                if reason != "ok":
                    return reason, f"test {index}: {detail}"
        return "ok", ""

    def _test(self, cell: Cell, test: dict[str, Any]) -> tuple[Reason, str]:
        key = secrets.token_hex(8)
        if "fn_name" in test:
            cell.send({"id": key, "args": encode(list(test["args"]))})
        else:
            cell.send({"id": key, "input": str(test["input"])})
        reply = cell.channel.receive(self._deadline())
        if reply == {}:
            return "timeout", "the time limit expired"
        if reply is None or reply.get("id") != key or not reply.keys() & {"output", "value"}:
            return _failed(cell, reply, "the program ended, or sent an unexpected message")
        try:
            same = (
                same_contest_value(contest_value(reply["value"]), test["expected"])
                if "fn_name" in test
                else same_contest_output(str(reply["output"]), str(test["output"]))
            )
        except (ValueError, RecursionError, KeyError) as error:
            return "wrong", str(error)
        return ("ok", "") if same else ("wrong", "the result differs")


def _numpy() -> list[Path]:
    """The directories of numpy, which contest programs may import; [] where it is not installed."""
    spec = importlib.util.find_spec("numpy")
    folders = [Path(each) for each in (spec and spec.submodule_search_locations) or ()][:1]
    libraries = [each.with_name("numpy.libs") for each in folders]
    return [*folders, *(each for each in libraries if each.is_dir())]


def _failed(cell: Cell, reply: dict[str, Any] | None, detail: str) -> tuple[Reason, str]:
    return _reported_error(reply) if reply and "error" in reply else _ended(cell, detail)


def _ended(cell: Cell, detail: str) -> tuple[Reason, str]:
    """Why a jail's connection ended."""
    if cell.out_of_memory():
        return "oom", "the program's processes exceeded its memory"
    return "error", detail


def _early_exit(cell: Cell, code: int | None) -> tuple[Reason, str]:
    """Why a program ended early, from its own message; every reason that it can choose scores 0."""
    if cell.out_of_memory():
        return "oom", "the program's processes exceeded its memory"
    if code is not None and code < 0:
        return "killed", f"ended by signal {-code}"
    return _reported_error(
        cell.channel.receive(time.monotonic() + 0.1) or {"error": f"exit code {code}"}
    )


def _reported_error(reply: dict[str, Any]) -> tuple[Reason, str]:
    reason: Reason = "oom" if reply.get("error") == "MemoryError" else "error"
    return reason, f"{reply.get('error')}: {reply.get('detail', '')}"


def _call(cell: Cell, test: dict[str, Any], deadline: float) -> tuple[Reason, str]:
    key = secrets.token_hex(8)
    request = {
        "id": key,
        "target": ["name", test["fn_name"]],
        "arguments": encode(list(test["args"])),
        "options": encode({}),
        "plain": True,
    }
    cell.send(request)
    reply = cell.channel.receive(deadline)
    if reply == {}:
        return "timeout", "the time limit expired"
    if reply is None or reply.get("id") != key:
        return _ended(cell, "the program ended, or sent an unexpected message")
    if "value" not in reply:
        return _reported_error(reply)
    try:
        same = same_value(unhashed(reply["value"]), test["expected"])
    except (ValueError, RecursionError) as error:
        return "wrong", str(error)
    return ("ok", "") if same else ("wrong", "the result differs")
