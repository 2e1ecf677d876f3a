"""Programs get the verdicts of LiveCodeBench's own runner, in our jail.

`passes` of each case is what the runner of evalscope 1.14.1 (its copy of LiveCodeBench's) said.
"""

import base64
import gzip
import importlib.util
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from infir2.verify import Limits, run_code

DATA = Path(__file__).parents[2] / "../shared/data/code/lcb_format_fixture.jsonl.gz"
LIMITS = Limits(seconds=20, total_seconds=60, memory_bytes=4 << 30)

DOUBLE = [("4\n", "8\n"), ("5\n", "10\n")]
SUM = [("3\n1 2 3\n", "6\n"), ("1\n-4\n", "-4\n")]
# name -> (program, (input, output) pairs or (JSON lines, JSON) pairs, function, passes)
CASES: dict[str, tuple[str, list[tuple[str, str]], str, bool]] = {
    "plain": ("print(2 * int(input()))", DOUBLE, "", True),
    "wrong": ("print(3 * int(input()))", DOUBLE, "", False),
    "main last": (
        "def main():\n    print(2 * int(input()))\nif __name__ == '__main__':\n    main()",
        DOUBLE, "", True,
    ),
    "main not last": (
        "if __name__ == '__main__':\n    print(2 * int(input()))\nx = 1", DOUBLE, "", False,
    ),
    "main in double quotes": (
        'if __name__ == "__main__":\n    print(2 * int(input()))', DOUBLE, "", True,
    ),
    "names without imports": (
        "c = Counter(input().strip())\nprint(2 * int(next(iter(c))))\nassert gcd(4, 6) == 2\n"
        "heappush([], 1)\nbisect_left([1], 1)\nreduce(add, [1, 2])",
        DOUBLE, "", True,
    ),
    "pow with a modulus": ("print(2 * int(input()) * pow(2, 3, 7))", DOUBLE, "", True),
    "exit after right output": ("print(2 * int(input()))\nexit()", DOUBLE, "", True),
    "exit code 1": ("import sys\nprint(2 * int(input()))\nsys.exit(1)", DOUBLE, "", True),
    "quit": ("print(2 * int(input()))\nquit()", DOUBLE, "", False),
    "raise after right output": ("print(2 * int(input()))\n1 / 0", DOUBLE, "", False),
    "raise SystemExit": ("print(2 * int(input()))\nraise SystemExit('x')", DOUBLE, "", True),
    "deep recursion": (
        "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\nprint(2 * int(input()) + f(20000) - "
        "20000)",
        DOUBLE, "", True,
    ),
    "too deep recursion": (
        "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\nprint(2 * int(input()) + f(60000) - "
        "60000)",
        DOUBLE, "", False,
    ),
    "numpy": (
        "import numpy as np\nprint(int(np.array([int(input())]).sum() * 2))", DOUBLE, "", True,
    ),
    "open(0)": ("print(2 * int(open(0).read()))", DOUBLE, "", False),
    "sys.stdin.read": ("import sys\nprint(2 * int(sys.stdin.read()))", DOUBLE, "", True),
    "sys.stdin.readline": ("import sys\nprint(2 * int(sys.stdin.readline()))", DOUBLE, "", True),
    "input = sys.stdin.readline": (
        "import sys\ninput = sys.stdin.readline\nn = int(input())\n"
        "print(sum(map(int, input().split())))",
        SUM, "", True,
    ),
    "sys.stdin.buffer": (
        "import sys\nd = sys.stdin.buffer.read().split()\nprint(sum(map(int, d[1:])))",
        SUM, "", True,
    ),
    "iteration over sys.stdin": (
        "import sys\nprint(sum(int(x) for line in list(sys.stdin)[1:] for x in line.split()))",
        SUM, "", True,
    ),
    "stdin of an import": (
        "from sys import stdin\nstdin.readline()\nprint(sum(map(int, stdin.readline().split())))",
        SUM, "", True,
    ),
    "stdout of an import": (
        "from sys import stdout\nstdout.write(str(2 * int(input())))", DOUBLE, "", False,
    ),
    "sys.stdout.write": (
        "import sys\nsys.stdout.write(str(2 * int(input())) + '\\n')", DOUBLE, "", True,
    ),
    "sys.stdout.buffer": (
        "import sys\nsys.stdout.buffer.write(str(2 * int(input())).encode())", DOUBLE, "", False,
    ),
    "os.write": ("import os\nos.write(1, str(2 * int(input())).encode())", DOUBLE, "", False),
    "class Solution that reads": (
        "class Solution:\n    def go(self):\n        print(2 * int(input()))\nSolution().go()",
        DOUBLE, "", False,
    ),
    "globals of a function": (
        "n = 0\ndef f():\n    global n\n    n += 1\nf()\nprint(2 * int(input()))",
        DOUBLE, "", False,
    ),
    "a thread with a large stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
        "def main():\n    print(2 * int(input()))\nt = threading.Thread(target=main)\nt.start()\n"
        "t.join()",
        DOUBLE, "", True,
    ),
    "os.getcwd": ("import os\nos.getcwd()\nprint(2 * int(input()))", DOUBLE, "", False),
    "syntax error": ("print(2 * int(input())", DOUBLE, "", False),
    "future import": (
        "from __future__ import annotations\nprint(2 * int(input()))", DOUBLE, "", False,
    ),
    "decimals": ("input()\nprint('2.50 1')", [("1\n", "2.5 1.0\n")], "", True),
    "floats to a tolerance": ("input()\nprint(0.1 + 0.2)", [("1\n", "0.3\n")], "", False),
    "spaces and blank lines": ("input()\nprint('  a b  \\n')", [("1\n", "a b")], "", True),
    "inner blank line": ("input()\nprint('a\\n\\nb')", [("1\n", "a\nb")], "", False),
    "case of words": ("input()\nprint('yes')", [("1\n", "YES")], "", False),
    "no output": ("input()", [("1\n", "\n")], "", True),
    "method": (
        "class Solution:\n    def f(self, a: List[int], k: int) -> int:\n        return sum(a) + k",
        [("[1, 2]\n3", "6"), ("[]\n0", "0")], "f", True,
    ),
    "function": ("def f(a):\n    return sorted(a)", [("[2, 1]", "[1, 2]")], "f", True),
    "True for 1": ("def f(a):\n    return a == 2", [("2", "1")], "f", True),
    "1.0 for 1": ("def f(a):\n    return a / 2", [("2", "1")], "f", True),
    "float that differs in the last place": (
        "def f():\n    return 0.1 + 0.2", [("", "0.3")], "f", False,
    ),
    "float of another sum": ("def f(a):\n    return 0.1 + 0.2", [("1", "0.3")], "f", False),
    "tuple for a list": ("def f(a):\n    return (a, a)", [("1", "[1, 1]")], "f", True),
    "nested tuples": ("def f(a):\n    return [(a, a)]", [("1", "[[1, 1]]")], "f", False),
    "set for a list": ("def f(a):\n    return {a}", [("1", "[1]")], "f", False),
    "generator for a list": ("def f(a):\n    yield a", [("1", "[1]")], "f", False),
    "range for a list": ("def f(a):\n    return range(a)", [("2", "[0, 1]")], "f", False),
    "Counter for an object": (
        "def f(a):\n    return Counter(a)", [('"aab"', '{"a": 2, "b": 1}')], "f", True,
    ),
    "integers as keys": ("def f(a):\n    return {a: 1}", [("1", '{"1": 1}')], "f", False),
    "number of numpy": (
        "import numpy as np\ndef f(a):\n    return np.int64(a) * 2", [("2", "4")], "f", True,
    ),
    "None": ("def f(a):\n    pass", [("1", "null")], "f", True),
    "exit in a method": ("def f(a):\n    exit()", [("1", "null")], "f", False),
    "missing function": ("def g(a):\n    return a", [("1", "1")], "f", False),
    "state between calls": (
        "seen = []\ndef f(a):\n    seen.append(a)\n    return len(seen)",
        [("7", "1"), ("7", "2")], "f", True,
    ),
    "setting attributes of the judge": (
        "class Yes(int):\n    def __eq__(self, other):\n        return False\n    __hash__ = "
        "int.__hash__\ndef f(a):\n    return a",
        [("1", "1")], "f", True,
    ),
}  # fmt: skip


def contest_tests(pairs: list[tuple[str, str]], function: str) -> list[dict[str, Any]]:
    if not function:
        return [{"input": given, "output": expected} for given, expected in pairs]
    return [
        {
            "fn_name": function,
            "args": [json.loads(line) for line in given.split("\n")] if given else [],
            "expected": json.loads(expected),
        }
        for given, expected in pairs
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_that_of_the_benchmarks_runner(name: str) -> None:
    program, pairs, function, passes = CASES[name]
    verdict = run_code(program, contest_tests(pairs, function), LIMITS, "live_code_bench")
    assert verdict.correct == passes, verdict
    assert verdict.reason != "jail_error"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True: pass", "timeout"),
        ("import time\ninput()\ntime.sleep(60)", "timeout"),
        ("x = [bytearray(100 << 20) for _ in range(100)]", "oom"),
        ("print('x' * (9 << 20))", "error"),
        ("import ctypes\nctypes.string_at(0)", "error"),
    ],
)
def test_limits_hold(program: str, reason: str) -> None:
    limits = Limits(seconds=2.0, memory_bytes=1 << 29)
    tests = [{"input": "1\n", "output": "1"}]
    assert run_code(program, tests, limits, "live_code_bench").reason == reason


def test_the_jail_stays_the_wall() -> None:
    """No expected output is in the jail, and a claim to be equal to everything is not believed."""
    program = """
class Solution:
    def f(self, a):
        class Equal:
            def __eq__(self, other): return True
        return Equal()
"""
    tests = [{"fn_name": "f", "args": [1], "expected": 1}]
    assert run_code(program, tests, LIMITS, "live_code_bench").reason == "wrong"
    escape = (
        "import io, socket\ntry:\n    io.open('/etc/passwd')\n    print('read it')\n"
        "except OSError:\n    print('no file')\ntry:\n"
        "    socket.create_connection(('127.0.0.1', 22), 1)\n    print('network')\n"
        "except OSError:\n    print('no network')"
    )
    tests = [{"input": "", "output": "no file\nno network"}]
    assert run_code(escape, tests, LIMITS, "live_code_bench").correct


def test_tests_of_two_kinds_are_the_callers_mistake() -> None:
    tests = [{"input": "", "output": ""}, {"fn_name": "f", "args": [], "expected": 1}]
    with pytest.raises(ValueError, match="all of one kind"):
        run_code("x = 1", tests, LIMITS, "live_code_bench")


@pytest.mark.skipif(not DATA.exists(), reason="the problems in LiveCodeBench's format are not here")
def test_reference_solutions_pass_and_an_empty_program_fails() -> None:
    rows = [json.loads(line) for line in gzip.decompress(DATA.read_bytes()).splitlines()]
    for row in [row for row in rows if row.get("reference_solution")][:4]:
        packed = zlib.decompress(base64.b64decode(row["private_test_cases"]))
        cases = json.loads(row["public_test_cases"]) + json.loads(pickle.loads(packed))
        function = json.loads(row["metadata"]).get("func_name", "")
        tests = contest_tests([(case["input"], case["output"]) for case in cases], function)
        assert run_code(row["reference_solution"], tests, LIMITS, "live_code_bench").correct
        assert not run_code("x = 1", tests, LIMITS, "live_code_bench").correct


@pytest.mark.skipif(not importlib.util.find_spec("evalscope"), reason="evalscope is not installed")
def test_the_recorded_verdicts_are_the_runners() -> None:
    from evalscope.benchmarks.live_code_bench.evaluate_utils import codegen_metrics

    for name, (program, pairs, function, passes) in CASES.items():
        inputs, outputs = ([pair[side] for pair in pairs] for side in (0, 1))
        sample = {"inputs": inputs, "outputs": outputs, "fn_name": function or None}
        reference = [{"input_output": json.dumps(sample)}]
        metrics, *_ = codegen_metrics(reference, [[program]], k_list=[1], timeout=60)
        assert (metrics["pass@1"] == 100) == passes, name
