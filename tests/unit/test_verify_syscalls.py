"""The filter of kernel calls: what it denies, what honest programs need, its tables."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infir2.verify import Limits
from infir2.verify.sandbox import Cell
from infir2.verify.syscalls import Instruction, filter_program

ROOT = Path(__file__).parents[2]
X86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="calls by their x86_64 numbers")
ALLOW, KILL = 0x7FFF0000, 0x80000000
DENIED = {
    "add_key": (248, 0),
    "request_key": (249, 0),
    "keyctl": (250, 0, -3, 0),
    "io_uring_setup": (425, 1, 0),
    "userfaultfd": (323, 0),
    "ptrace": (101, 0, 0, 0, 0),
    "process_vm_readv": (310, 1, 0, 0, 0, 0, 0),
    "memfd_create": (319, 0, 0),
    "memfd_secret": (447, 0),
    "shmget": (29, 0, 4096, 0o1600),
    "semget": (64, 0, 1, 0o1600),
    "msgget": (68, 0, 0o1600),
    "mq_open": (240, 0, 0, 0, 0),
    "bpf": (321, 0, 0, 0),
    "perf_event_open": (298, 0, 0, 0, 0, 0),
    "clone3": (435, 0, 0),
    "clone into a user namespace": (56, 0x10000011, 0, 0, 0, 0),
    "unshare": (272, 0x10000000),
    "mount": (165, 0, 0, 0, 0, 0),
    "seccomp": (317, 0, 0, 0),
    "setsockopt": (54, 1, 1, 7, 0, 0),
    "inotify_init1": (294, 0),
    "fanotify_init": (300, 0, 0),
    "personality": (135, 0x0400000),
    "shared memory without a file": (9, 0, 4096, 3, 0x21, -1, 0),
    "enlarge a pipe": (72, 1, 1031, 1 << 20),
    "set dumpable": (157, 4, 1, 0, 0, 0),
    "push a character into a terminal": (16, 0, 0x5412, 0),
    "a call of the future": (1000,),
    "a call of the x32 table": (0x40000000 + 39,),
}


def run_in_a_jail(program: str) -> str:
    """Standard output of a script that must end with code 0."""
    with Cell(Limits(seconds=60)) as cell:
        cell.send({"mode": "script", "program": program})
        output, code, stopped = cell.output(time.monotonic() + 60, 1 << 16)
        assert (code, stopped) == (0, ""), cell.channel.receive(time.monotonic() + 1)
    return output.decode()


@X86_64
def test_no_program_reaches_keyrings_rings_tracing_or_unbounded_memory() -> None:
    program = f"""
import ctypes, json
libc = ctypes.CDLL(None, use_errno=True)
calls, failed = {DENIED!r}, {{}}
for name, arguments in calls.items():
    result = libc.syscall(*map(ctypes.c_long, arguments))
    failed[name] = ctypes.get_errno() if result == -1 else 0
print(json.dumps(failed))
"""
    failed = json.loads(run_in_a_jail(program))
    assert failed.keys() == DENIED.keys()
    assert {name for name, code in failed.items() if code not in (errno.ENOSYS, errno.EPERM)} == (
        set()
    )


def test_sockets_reach_nothing_outside() -> None:
    program = """
import errno, socket
pair, families, refused = socket.socketpair(), (2, 10, 16, 17, 30, 38, 40, 44), 0
for family in families:
    try:
        socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        refused += error.errno == errno.EPERM
print(refused == len(families), pair[0].send(b"x"))
"""
    assert run_in_a_jail(program) == "True 1\n"


def test_standard_input_can_be_read_and_not_written() -> None:
    program = """
import os
try:
    os.ftruncate(0, 1 << 20)
except OSError:
    print(repr(open(0).read()))
"""
    assert run_in_a_jail(program) == "''\n"


def test_threads_processes_files_and_event_loops_work() -> None:
    program = """
import asyncio, multiprocessing, os, shutil, signal, subprocess, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
threading.stack_size(64 << 20)
print(sum(ThreadPoolExecutor(4).map(abs, range(-9, 0))))
asyncio.run(asyncio.wait_for(asyncio.sleep(0.01), 5))
receiver, sender = multiprocessing.Pipe(False)
process = multiprocessing.Process(target=sender.send, args=("child",))
process.start()
print(receiver.recv(), process.join())
folder = tempfile.mkdtemp()
open(folder + "/a", "w").write("text")
shutil.copy2(folder + "/a", folder + "/b")
shutil.copytree(folder, folder + "/copy")
shutil.move(folder + "/b", folder + "/c")
print(sorted(os.listdir(folder)), open(folder + "/copy/b").read())
shutil.rmtree(folder)
def ring(*_):
    raise InterruptedError
signal.signal(signal.SIGALRM, ring)
signal.setitimer(signal.ITIMER_REAL, 0.05)
try:
    time.sleep(5)
except InterruptedError:
    print("alarm")
try:
    subprocess.run(["/no/such/program"])
except FileNotFoundError:
    print(time.monotonic() > 0)
"""
    expected = "45\nchild None\n['a', 'c', 'copy'] text\nalarm\nTrue\n"
    assert run_in_a_jail(program) == expected


def test_numerical_libraries_and_their_threads_work_behind_the_filter() -> None:
    program = """
import ctypes, sys
from infir2.verify.syscalls import install_filter
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
install_filter(libc)
assert libc.syscall(250, 0, -3, 0) == -1
import numpy, sympy
square = numpy.random.default_rng(0).random((600, 600))
print(numpy.allclose(square @ numpy.linalg.inv(square), numpy.eye(600)))
print(sympy.factor("x**2 - 1"), sympy.integrate("sin(x)"))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert result.stdout == "True\n(x - 1)*(x + 1) -cos(x)\n", result.stderr


def test_a_new_session_keyring_is_not_the_callers() -> None:
    program = """
import ctypes, os
from infir2.verify.syscalls import leave_session_keyring
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
session = lambda: libc.syscall(number, 0, ctypes.c_long(-3), 1)
before = session()
leave_session_keyring(libc)
print(before, session())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    before, after = map(int, result.stdout.split())
    if before == -1:
        pytest.skip("this kernel has no keyrings")
    assert after not in (-1, before)


def answer(program: list[Instruction], architecture: int, number: int, argument: int = 0) -> int:
    """What the filter returns, by interpreting its instructions; `argument` is every argument."""
    at, loaded = 0, 0
    while True:
        opcode, yes, no, operand = program[at]
        at += 1
        if opcode == 0x20:
            loaded = {0: number, 4: architecture}.get(operand, argument)
        elif opcode == 0x06:
            return operand
        elif opcode == 0x54:
            loaded &= operand
        elif opcode == 0x15:
            at += yes if loaded == operand else no
        else:
            at += yes if loaded & operand else no


@pytest.mark.parametrize(
    ("machine", "architecture", "read", "openat", "clone", "keyctl"),
    [("x86_64", 0xC000003E, 0, 257, 56, 250), ("aarch64", 0xC00000B7, 63, 56, 220, 219)],
)
def test_each_machine_has_its_table(
    machine: str, architecture: int, read: int, openat: int, clone: int, keyctl: int
) -> None:
    program = filter_program(machine)
    assert len(program) < 4096, "the kernel's bound"
    assert answer(program, architecture, read) == ALLOW
    assert answer(program, architecture, openat) == ALLOW
    assert answer(program, architecture, keyctl) == 0x50000 | errno.ENOSYS
    assert answer(program, architecture, clone, 0x11) == ALLOW
    for namespace in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000):
        assert answer(program, architecture, clone, 0x11 | namespace) == 0x50000 | errno.EPERM
    assert answer(program, 0x40000003, read) == KILL
    numbers = [instruction[3] for instruction in program if instruction[:3] == (0x15, 0, 1)]
    assert len(numbers) > 150


def test_a_machine_without_a_table_gets_no_jail() -> None:
    with pytest.raises(ValueError, match="no table of kernel calls for riscv64"):
        filter_program("riscv64")
