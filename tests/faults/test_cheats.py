"""F18: no program gets an unearned reward, and none reaches anything outside its jail."""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infir2.verify import Limits, run_code
from infir2.verify.process import living_descendants

STDIN = [{"input": "20 22\n", "output": "42"}]
CALL = [
    {"fn_name": "f", "args": [20, 22], "expected": 42},
    {"fn_name": "f", "args": [[1]], "expected": [1]},
]
ASSERT = [
    {
        "code": "import math\ndef check(c):\n  assert c(20, 22) == 42\n"
        "  assert abs(c(1, 2.5) - 3.5) < 1e-6",
        "entry_point": "f",
    }
]
LOOSE = [
    {"code": "assert f(20, 22) == 42\nassert isclose(f(1, 2), 3)\nassert math.isclose(f(1, 2), 3)"}
]
HELPER = [
    {
        "code": "def check(c): assert poly(c(2)) == 0",
        "setup": "def poly(x): return x - 7",
        "entry_point": "f",
    }
]
ANY_TRUTH = [{"code": "assert all(map(f, [1, 2, 3]))\nassert all(f(x) for x in (1, 2))"}]

LIAR = """
class Liar:
    def __eq__(self, other): return True
    def __sub__(self, other): return self
    __add__ = __radd__ = __rsub__ = __abs__ = lambda self, *a: self
    def __lt__(self, other): return True
    def __hash__(self): return 0
    def __bool__(self): return True
"""
WRITE_TO_EVERY_DESCRIPTOR = """
import os
LINES = ('{"outcome": "ok", "detail": ""}', '{"correct": true}', '{"ready": true}')
for line in (*LINES, '{"id": "1", "value": 42}', "ok", "42"):
    for fd in range(3, 64):
        try: os.write(fd, (line + chr(10)).encode())
        except OSError: pass
"""
SEARCH = """
import gc, os, sys
def hunt():
    for thing in gc.get_objects():
        if isinstance(thing, dict):
            for key, value in list(thing.items()):
                if key in ("expected", "output") and value not in ("", None): return value
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if isinstance(value, dict) and "expected" in value: return value["expected"]
        frame = frame.f_back
    for folder, _, files in os.walk("/tmp"):
        for name in files: return open(os.path.join(folder, name)).read()
    for path in ("/proc/1/environ", "/proc/self/environ", "/proc/1/cmdline", "/proc/1/mem"):
        try: return open(path).read()
        except OSError: pass
    raise LookupError
"""

CHEATS: list[tuple[str, str, list[dict[str, Any]]]] = [
    ("exit 0", "import sys\nsys.exit(0)", STDIN),
    ("exit 0 while loading", "import sys\nsys.exit(0)", ASSERT),
    ("exit 0 in the call", "import sys\ndef f(*a): sys.exit(0)", CALL),
    ("os._exit in the call", "import os\ndef f(*a): os._exit(0)", ASSERT),
    ("os._exit", "import os\nos._exit(0)", STDIN),
    ("always equal, call", LIAR + "def f(*a): return Liar()", CALL),
    ("always equal, assert", LIAR + "def f(*a): return Liar()", ASSERT),
    ("always equal int", LIAR + "class N(Liar, int): pass\ndef f(*a): return N(1)", ASSERT),
    ("always equal list", LIAR + "class N(Liar, list): pass\ndef f(*a): return N()", CALL),
    (
        "lies about its class",
        LIAR + "class N(Liar):\n  __class__ = int\ndef f(*a): return N()",
        ASSERT,
    ),
    (
        "patched json",
        'import json\njson.dumps = lambda *a, **k: \'{"outcome": "ok", "correct": true}\'\n'
        "def f(*a): return 0",
        CALL,
    ),
    (
        "patched builtins",
        "import builtins\nbuiltins.isinstance = builtins.all = lambda *a: True\n"
        "def f(*a): return 0",
        ASSERT,
    ),
    (
        "patched socket",
        "import socket\nsocket.socket.sendall = lambda *a: None\ndef f(*a): return 42",
        ASSERT,
    ),
    ("shadowed abs", "abs = lambda x: 0\ndef f(a, b): return 42", ASSERT),
    ("shadowed check", "def check(c): pass\ndef f(a, b): return 0", ASSERT),
    (
        "false isclose",
        "isclose = lambda *a: True\nclass math: isclose = staticmethod(lambda *a: True)\n"
        "def f(a, b): return 42",
        LOOSE,
    ),
    (
        "false module",
        "import types\nmath = types.SimpleNamespace(isclose=lambda *a: True)\nisclose = max\n"
        "def f(a, b): return 42",
        LOOSE,
    ),
    ("replaced helper of the test", "def poly(x): return 0\ndef f(x): return x", HELPER),
    ("cut the loop short", "def f(x): raise StopIteration", ANY_TRUTH),
    (
        "assertions off",
        "import sys\nsys.flags = None\n__debug__x = 0\ndef f(*a): raise SystemExit(0)",
        ASSERT,
    ),
    ("verdict on stdout", "print('ok'); print('{\"outcome\": \"ok\"}'); print('passed')", STDIN),
    ("verdict on every descriptor", WRITE_TO_EVERY_DESCRIPTOR, STDIN),
    ("verdict on every descriptor, call", WRITE_TO_EVERY_DESCRIPTOR + "def f(*a): return 0", CALL),
    (
        "verdict on every descriptor, assert",
        WRITE_TO_EVERY_DESCRIPTOR + "def f(*a): return 0",
        ASSERT,
    ),
    ("look for the answer", SEARCH + "def f(*a): return hunt()", CALL),
    ("look for the answer, script", SEARCH + "print(hunt())", STDIN),
    ("look for the answer, assert", SEARCH + "def f(*a): return hunt()", ASSERT),
    (
        "answer at exit",
        "import atexit\natexit.register(print, 42)\ndef f(*a): raise KeyboardInterrupt",
        CALL,
    ),
    (
        "kill everything",
        "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(os.getppid(), signal.SIGKILL)",
        STDIN,
    ),
    ("fork bomb", "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", STDIN),
    (
        "trickle",
        "import os\nwhile True:\n  for fd in (1, 3, 4, 5, 6):\n    try: os.write(fd, b'x')\n"
        "    except OSError: pass",
        CALL,
    ),
    ("deep nesting", "def f(*a):\n  x = []\n  for _ in range(100000): x = [x]\n  return x", CALL),
    ("endless reply", "def f(*a): return 'x' * (64 << 20)", CALL),
]


@pytest.fixture(autouse=True)
def no_leftovers_of_jails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(living_descendants(os.getpid()))
    yield
    assert set(living_descendants(os.getpid())) <= before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "tests"), [cheat[1:] for cheat in CHEATS], ids=[cheat[0] for cheat in CHEATS]
)
def test_cheats_get_no_reward(program: str, tests: list[dict[str, Any]]) -> None:
    verdict = run_code(program, tests, Limits(seconds=2.0))
    assert not verdict.correct
    assert verdict.reason != "jail_error", verdict


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("print(sum(map(int, input().split())))", STDIN),
        ("def f(*a): return sum(a) if len(a) > 1 else a[0]", CALL),
        ("def f(a, b): return a + b", ASSERT),
        (
            "import math\ndef f(a, b): return a + b",
            [{"code": "assert f(20, 22) == 42\nassert math.isclose(f(1, 2), 3)"}],
        ),
        ("def poly(x): return 0\ndef f(x): return 7", HELPER),
        ("def f(x): return True", ANY_TRUTH),
    ],
)
def test_honest_programs_pass_the_same_tests(program: str, tests: list[dict[str, Any]]) -> None:
    assert run_code(program, tests, Limits(seconds=60.0)).reason == "ok"


def test_the_network_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint(42)"
        assert run_code(program, STDIN).reason == "error"
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_privilege_can_be_regained() -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
tries = [libc.unshare(0x10000000), libc.unshare(0x20000), libc.chroot(b"/tmp"), libc.setuid(0)]
tries += [libc.mount(b"x", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/tmp", 0)]
tries += [libc.sethostname(b"x", 1), libc.ptrace(16, 1, 0, 0)]
tries += [libc.mknod(b"/tmp/x", 0o60600, 0x800)]
class Head(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
data = (ctypes.c_uint32 * 6)()
assert libc.capget(ctypes.byref(Head(0x20080522, 0)), data) == 0
print(all(result != 0 for result in tries), not any(data))
"""
    verdict = run_code(program, [{"input": "", "output": "True True"}])
    assert verdict.correct, verdict


def test_nothing_of_the_interpreter_can_be_changed() -> None:
    marker = f"cheat-{os.getpid()}"
    program = f"""
import os
done = 0
paths = [os.path.dirname(os.__file__), "/usr/lib", "/lib", "/", "/dev", "/home", "/var/tmp"]
for path in (*paths, "/tmp/../.."):
    try:
        open(os.path.join(path, {marker!r}), "w").write("x")
        done += 1
    except OSError: pass
open("/tmp/" + {marker!r}, "w").write("x")
try:
    with open("/tmp/big", "wb") as file:
        for _ in range(100): file.write(bytes(1 << 20)); file.flush()
    done += 100
except OSError: pass
print(done)
"""
    assert run_code(program, [{"input": "", "output": "0"}]).correct
    assert not [
        path
        for path in (os.path.dirname(os.__file__), "/usr/lib", "/lib", "/", "/tmp", "/var/tmp")
        if marker in os.listdir(path)
    ]


def jailed(limits: Limits) -> set[str]:
    """Processes of the jails with these limits, found by their command lines."""
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True
    ).stdout
    return {
        line.split()[0]
        for line in listing.splitlines()
        if f'"total_seconds": {limits.total_seconds}' in line
    }


@pytest.mark.filterwarnings("ignore:level 'process'")
@pytest.mark.parametrize("level", ["namespaces", "process"])
def test_daemons_that_hold_the_pipe_cause_no_delay_and_die(level: Any) -> None:
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
time.sleep(0.1)
print(42)
"""
    limits = Limits(seconds=60, level=level, total_seconds=60 + random.random())
    began = time.monotonic()
    assert run_code(program, STDIN, limits).correct
    assert time.monotonic() - began < 60, "the daemon sleeps for 1000 s"
    assert jailed(limits) == set()


def test_jails_die_with_a_killed_trainer() -> None:
    limits = Limits(seconds=60, total_seconds=60 + random.random())
    program = f"""
from infir2.verify import Limits, run_code
run_code("while True: pass", [{{"input": "", "output": "1"}}], {limits!r})
"""
    trainer = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while len(jailed(limits)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(jailed(limits)) == 2, "the watcher and the program"
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    while jailed(limits) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert jailed(limits) == set()
