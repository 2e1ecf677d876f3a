"""F18: what a program can cost the machine and the trainer is bounded for the jail as a whole."""

import resource
import time
from typing import Any

import pytest

from infir2.verify import Limits, run_code
from infir2.verify.compare import same_value, unhashed
from infir2.verify.plain import encode

SMALL = Limits(seconds=60.0, memory_bytes=64 << 20)
CALL: list[dict[str, Any]] = [{"fn_name": "f", "args": [], "expected": 1}]
STDIN: list[dict[str, Any]] = [{"input": "", "output": "1"}]
ASSERT: list[dict[str, Any]] = [{"code": "assert f() == 1"}]
FILL = """
import os, socket, threading, time
def fill():
    held = bytearray(30 << 20)
    for at in range(0, len(held), 4096):
        held[at] = 1
    time.sleep(50)
"""
FORKS = """
def f():
    for _ in range(10):
        if os.fork() == 0:
            fill()
    time.sleep(50)
    return 1
"""
DAEMONS = """
def f():
    for _ in range(6):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                fill()
            os._exit(0)
    time.sleep(50)
    return 1
"""
FIRST_THREAD_ENDS = """
import ctypes
def f():
    threading.stack_size(1 << 17)
    for _ in range(4):
        if os.fork() == 0:
            threading.Thread(target=fill).start()
            ctypes.CDLL(None).pthread_exit(None)
    time.sleep(50)
    return 1
"""
SOCKETS = """
def f():
    for _ in range(10):
        if os.fork() == 0:
            pairs = []
            try:
                while True:
                    pairs.append(socket.socketpair())
            except OSError:
                time.sleep(50)
    time.sleep(50)
    return 1
"""
SHARED_PAGES = """
import os, time
block = bytearray(b"x") * (30 << 20)
def f():
    children = []
    for _ in range(8):
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(0.3)
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    return 1
"""


@pytest.mark.filterwarnings("ignore:level 'process'")
@pytest.mark.parametrize("level", ["namespaces", "process"])
@pytest.mark.parametrize("program", [FORKS, DAEMONS, FIRST_THREAD_ENDS])
def test_processes_of_a_jail_share_one_limit_of_memory(level: Any, program: str) -> None:
    limits = Limits(seconds=60.0, memory_bytes=64 << 20, level=level)
    assert run_code(FILL + program, CALL, limits).reason == "oom"


@pytest.mark.parametrize("tests", [STDIN, ASSERT])
def test_the_limit_holds_in_every_kind_of_test(tests: list[dict[str, Any]]) -> None:
    program = FILL + FORKS + ("print(f())" if tests is STDIN else "")
    assert run_code(program, tests, SMALL).reason == "oom"


def test_buffers_of_sockets_count() -> None:
    assert run_code(FILL + SOCKETS, CALL, SMALL).reason == "oom"


def test_pages_that_processes_share_count_once() -> None:
    assert run_code(SHARED_PAGES, CALL, SMALL).correct


def test_the_memory_of_a_test_is_bounded_too() -> None:
    code = FILL + FORKS + "\nf()"
    assert run_code("def g(): pass", [{"code": code}], SMALL).reason == "oom"


ONE_HASH = [index * ((1 << 61) - 1) for index in range(160_000)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (["set", ONE_HASH], set(range(160_000))),
        (["frozenset", ONE_HASH], {1, 2}),
        (["dict", [[number, 1] for number in ONE_HASH]], dict.fromkeys(range(160_000), 1)),
        (["list", [["set", ONE_HASH]]], [{1}]),
        (["set", [["tuple", [number]] for number in ONE_HASH]], {(n,) for n in range(160_000)}),
    ],
)
def test_values_of_one_hash_cost_no_more_than_others(data: Any, expected: Any) -> None:
    began = time.process_time()
    assert not same_value(unhashed(data), expected)
    assert time.process_time() - began < 10, "243 s when they were hashed"


def test_a_program_that_answers_with_values_of_one_hash_keeps_nobody_busy() -> None:
    program = """
import infir2.verify.serve as jail
encode = jail.encode
numbers = [index * ((1 << 61) - 1) for index in range(100_000)]
jail.encode = lambda value, *rest: ["set", numbers]
def f(): return 1
"""
    tests = [{"fn_name": "f", "args": [], "expected": set(range(100_000))}]
    before = resource.getrusage(resource.RUSAGE_SELF)
    verdict = run_code(program, tests, Limits(seconds=60.0))
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert verdict.reason == "wrong", verdict
    assert after.ru_utime - before.ru_utime < 10


def test_sets_and_dicts_are_compared_by_value() -> None:
    pairs = [
        ({1, 2.0}, {1.0, 2}, True),
        ({1}, {2}, False),
        ({1, 2}, {1}, False),
        ({(1, "a"), (2, "b")}, {(2, "b"), (1, "a")}, True),
        ({(1, 2)}, {frozenset({1, 2})}, False),
        ({"1"}, {1}, False),
        ({frozenset({1, 2})}, {frozenset({2, 1})}, True),
        ({1: 2, 3: 4}, {"1": 2, "3": 4}, True),
        ({1: 2, 3: 4}, {"1": 4, "3": 2}, False),
        ({None: 1, True: 2, 0.5: 3}, {"null": 1, "true": 2, "0.5": 3}, True),
        ({"1": 2}, {1: 2}, False),
        ({1: 2, "1": 2}, {"1": 2, "2": 2}, False),
        ({1: 2.0 + 1e-12}, {1: 2.0}, True),
        ({1: {2}}, {1: {2}}, True),
        ({1: {2}}, {1: [2]}, False),
        ([1], {1}, False),
        ({1}, [1], False),
        ({}, [], False),
        (set(), {}, False),
    ]
    for value, expected, same in pairs:
        assert same_value(unhashed(encode(value)), expected) is same, (value, expected)
        assert same_value(value, expected) is same, (value, expected)
