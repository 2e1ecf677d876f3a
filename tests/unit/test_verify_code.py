"""Programs get their reasons from all three kinds of test, in both levels of jail."""

import base64
import gzip
import json
import os
import pickle
import shutil
import subprocess
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infir2.verify import JailError, Limits, run_code
from infir2.verify.code import same_output, same_value
from infir2.verify.plain import decode, encode
from infir2.verify.sandbox import Cell

ROOT = Path(__file__).parents[2]
DATA = ROOT / "../shared/data/code"

pytestmark = pytest.mark.filterwarnings("ignore:level 'process'")


def rows(name: str, count: int) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    text = gzip.decompress(path.read_bytes()).decode() if name.endswith("gz") else path.read_text()
    everything = [json.loads(line) for line in text.splitlines()]
    return everything[:: max(1, len(everything) // count)]


def lcb_tests(row: dict[str, Any]) -> list[dict[str, Any]]:
    hidden = json.loads(pickle.loads(zlib.decompress(base64.b64decode(row["private_test_cases"]))))
    tests = []
    for case in json.loads(row["public_test_cases"]) + hidden:
        if case["testtype"] == "stdin":
            tests.append({"input": case["input"], "output": case["output"]})
        else:
            name = json.loads(row["metadata"])["func_name"]
            arguments = [json.loads(line) for line in case["input"].split("\n")]
            tests.append(
                {"fn_name": name, "args": arguments, "expected": json.loads(case["output"])}
            )
    return tests


def test_humaneval_canonical_solutions_pass_and_empty_bodies_fail() -> None:
    everything = rows("humaneval.jsonl", 164)
    with_helpers = [row for row in everything if row["task_id"] in ("HumanEval/32", "HumanEval/38")]
    chosen = everything[::40] + with_helpers
    for row in chosen:
        tests = [{"code": row["test"], "entry_point": row["entry_point"], "setup": row["prompt"]}]
        assert run_code(row["prompt"] + row["canonical_solution"], tests).reason == "ok", row[
            "task_id"
        ]
    for row in chosen[::3]:
        tests = [{"code": row["test"], "entry_point": row["entry_point"], "setup": row["prompt"]}]
        assert not run_code(row["prompt"] + "    return None\n", tests).correct, row["task_id"]


def test_mbpp_solutions_pass_also_with_objects_of_their_own_classes() -> None:
    everything = rows("mbpp.jsonl", 974)
    for row in everything[::300] + [row for row in everything if row["task_id"] in (367, 533, 927)]:
        code = "\n".join([row["test_setup_code"], *row["test_list"]])
        assert run_code(row["code"], [{"code": code}]).reason == "ok", row["task_id"]


def test_functions_and_methods_of_solution_classes() -> None:
    for row in [
        row for row in rows("lcb_format_fixture.jsonl.gz", 295) if row.get("reference_solution")
    ][:5]:
        tests = lcb_tests(row)
        assert run_code(row["reference_solution"], tests).reason == "ok", row["question_id"]
        wrong = [test | {"expected": [test["expected"], 1]} for test in tests]
        assert run_code(row["reference_solution"], wrong).reason == "wrong", row["question_id"]


STDIN = [{"input": "3\n4\n", "output": "7"}, {"input": "10\n-4", "output": "6\n"}]


@pytest.mark.parametrize("level", ["namespaces", "process"])
@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("print(int(input()) + int(input()))", STDIN, "ok"),
        ("import sys\nprint(sum(map(float, sys.stdin)))", STDIN, "ok"),
        (
            "if __name__ == '__main__':\n  print(eval(input() + '+' + input()), end='  \\n\\n')",
            STDIN,
            "ok",
        ),
        ("print(7)", STDIN, "wrong"),
        ("print(1 / 0)", STDIN, "error"),
        ("import sys\nprint(7)\nsys.exit(3)", STDIN, "error"),
        ("def broken(:", STDIN, "error"),
        ("while True: pass", STDIN, "timeout"),
        ("import time\ntime.sleep(60)", STDIN, "timeout"),
        ("while True: print('x' * 1000)", STDIN, "wrong"),
        ("x = [bytearray(50 << 20) for _ in range(100)]", STDIN, "oom"),
        ("import ctypes\nctypes.string_at(0)", STDIN, "killed"),
        (
            "def f(x): return sorted(Counter(x).items())",
            [{"fn_name": "f", "args": ["aab"], "expected": [["a", 2], ["b", 1]]}],
            "ok",
        ),
        (
            "from __future__ import annotations\ndef f(x: Any): return x",
            [{"fn_name": "f", "args": [1], "expected": 1}],
            "ok",
        ),
        ("def f(): raise ValueError('no')", [{"fn_name": "f", "args": [], "expected": 1}], "error"),
        ("def g(): return 1", [{"fn_name": "f", "args": [], "expected": 1}], "error"),
        ("def f():\n  while True: pass", [{"fn_name": "f", "args": [], "expected": 1}], "timeout"),
        (
            "def f(a, k=1): return a, {k}",
            [{"code": "assert f(1) == (1, {1})\nassert f([2], k=3)[0] == [2]"}],
            "ok",
        ),
        (
            "def f(a): raise KeyError(a)",
            [{"code": "try:\n  f(1)\n  assert False\nexcept KeyError: pass"}],
            "ok",
        ),
        ("def f(a): return a", [{"code": "assert f(1) == 2"}], "wrong"),
        ("def f(a): return a", [{"code": "assert g(1) == 1"}], "error"),
    ],
)
def test_programs_get_their_reasons(
    level: Any, program: str, tests: list[dict[str, Any]], reason: str
) -> None:
    limits = Limits(seconds=1.0 if reason == "timeout" else 60.0, level=level, memory_bytes=1 << 29)
    verdict = run_code(program, tests, limits)
    assert verdict.reason == reason, verdict
    assert verdict.seconds < 50, "its own limit ends a program, not the total of 60 s"


def test_all_tests_together_have_a_limit() -> None:
    tests = [{"input": str(i), "output": str(i)} for i in range(100)]
    began = time.monotonic()
    verdict = run_code(
        "import time\ntime.sleep(0.4)\nprint(input())",
        tests,
        Limits(seconds=5.0, total_seconds=1.0),
    )
    assert verdict.reason == "timeout"
    assert time.monotonic() - began < 30, "all hundred would take 40 s"


def test_long_expected_output_and_large_input_pass() -> None:
    numbers = "\n".join(map(str, range(60_000)))
    assert run_code(
        "import sys\nprint(sys.stdin.read())",
        [{"input": numbers, "output": numbers}],
        Limits(seconds=60),
    ).correct


def test_the_jail_shows_an_empty_world() -> None:
    program = """
import glob, json, os
folders, outside, writable = ["/"], [], []
for folder in folders:
    writable += [folder] if os.access(folder, os.W_OK) else []
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith("lib"):
            folders.append(entry.path)
        elif not entry.name.startswith("lib"):
            outside.append(entry.path)
packages = []
for base in (os.path.dirname(os.__file__), "/usr/lib/python3*"):
    packages += glob.glob(base + "/*-packages/*")
environment = sorted(set(os.environ) - {"LC_CTYPE"})
ids = [os.getpid(), os.getppid(), os.getuid()]
print(json.dumps([sorted(outside), packages, writable, environment, *ids]))
"""
    with Cell(Limits()) as cell:
        cell.send({"mode": "script", "program": program})
        output, code, _ = cell.output(time.monotonic() + 20, 1 << 16)
        assert code == 0, cell.receive(time.monotonic() + 1)
    *world, user = json.loads(output)
    assert world == [["/dev/null", "/dev/urandom"], [], ["/tmp"], ["PATH"], 1, 0]
    assert user not in (0, os.getuid())


def test_threads_run_programs_at_the_same_time() -> None:
    def work(i: int) -> bool:
        return run_code(f"print({i})", [{"input": "", "output": str(i)}]).correct

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [True] * 8


def test_process_level_says_once_that_it_protects_nothing() -> None:
    with pytest.warns(RuntimeWarning, match="your own rights"):
        assert run_code("print(1)", [{"input": "", "output": "1"}], Limits(level="process")).correct


def test_no_tests_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="at least one test"):
        run_code("print(1)", [])
    with pytest.raises(ValueError, match="test 1 needs"):
        run_code("print(1)", [*STDIN[:1], {"input": "1", "expected": "1"}])


def test_without_namespaces_the_error_says_what_to_do_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import infir2.verify.sandbox as sandbox

    refused = sandbox._BOOT_TEXT.replace(
        "flags = _NEWNS", "flags = 1 | _NEWNS"
    )  # no such flag: EINVAL
    assert refused != sandbox._BOOT_TEXT
    monkeypatch.setattr(sandbox, "_BOOT_TEXT", refused)
    with pytest.raises(JailError, match=r"user namespaces.*level 'process'"):
        run_code("print(1)", [{"input": "", "output": "1"}])


def test_a_jail_that_breaks_is_no_verdict_about_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import infir2.verify.code as code
    import infir2.verify.sandbox as sandbox

    monkeypatch.setattr(sandbox, "_BOOT_TEXT", "import os; os._exit(3)")
    monkeypatch.setattr(code, "outcomes", code.Counter({"ok": 500}))
    tests = [{"input": "", "output": "1"}]
    assert [run_code("print(1)", tests).reason for _ in range(5)] == ["jail_error"] * 5
    with pytest.raises(JailError, match="6 of 506 jails broke down"):
        run_code("print(1)", tests)


@pytest.mark.skipif(
    not (shutil.which("setpriv") and Path("/usr/bin/python3").exists()),
    reason="needs setpriv and a system Python",
)
def test_an_unprivileged_user_gets_the_same_jail() -> None:
    if os.geteuid() != 0:
        pytest.skip("the other tests run unprivileged already")
    version = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print(sys.version_info >= (3, 11))"],
        capture_output=True,
        text=True,
    )
    if version.stdout.strip() != "True":
        pytest.skip("the system's Python is too old")
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from infir2.verify.code import run_code
ok = run_code("print(int(input()) * 2)", [{{"input": "3", "output": "6"}}])
escape = run_code("import os\\nprint(os.listdir('/home'))", [{{"input": "", "output": "[]"}}])
print(ok.reason, escape.reason, ok.detail)
"""
    run = [
        "setpriv",
        "--reuid=54321",
        "--regid=54321",
        "--clear-groups",
        "/usr/bin/python3",
        "-B",
        "-c",
        program,
    ]
    result = subprocess.run(run, capture_output=True, text=True, cwd="/")
    if "PermissionError" in result.stderr or "No module named 'infir2" in result.stderr:
        pytest.skip("another user may not read this checkout")
    assert result.stdout.split()[:2] == ["ok", "error"], result.stdout + result.stderr


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -(10**30),
        1.5,
        float("inf"),
        "ä\x00",
        b"\xff",
        [1, (2, {3}), {"a": {4: [5]}}],
        frozenset({(1, 2)}),
        1 + 2j,
        int,
    ],
)
def test_plain_values_survive_the_crossing(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_integers_of_any_length_cross() -> None:
    assert decode(json.loads(json.dumps(encode([-(10**5000)])))) == [-(10**5000)]


def test_subclasses_arrive_without_their_methods() -> None:
    class Liar(list):
        def __eq__(self, other: object) -> bool:
            return True

    class Seven(int):
        def __index__(self) -> int:
            return 9

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert type(decode(encode(Liar([1])))) is list
    assert decode(encode(Seven(7))) == 7
    with pytest.raises(ValueError, match="no plain value"):
        encode(object())


@pytest.mark.parametrize(
    "data",
    [
        ["remote", 1],
        ["list"],
        ["list", 3],
        ["dict", [[["list", []], 1]]],
        ["what", 1],
        ["int", "zz"],
        {},
        [],
        ["type", "object"],
    ],
)
def test_what_is_no_plain_value_is_refused(data: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - decode raises ValueError of several origins
        decode(data)


def test_comparison_of_values_and_text() -> None:
    assert same_value((1, [2.0]), [1, [2.0 + 1e-12]])
    assert not same_value(1.0, 10**400)
    assert not same_value(True, 1)
    assert not same_value([1], [1, 2])
    assert not same_value(float("nan"), float("nan"))
    assert same_value({"a": (1,)}, {"a": [1]})
    assert same_output("1.0 2\nyes \n\n", "1 2.00\nyes")
    assert not same_output("1 2", "1\n2")
    assert not same_output("1e999999999", "1")
    assert not same_output("", "0")
