"""Answer checks that hang, crash, leak processes or flood output, for test_reward_faults.py."""

import contextlib
import ctypes
import os
import re
import shutil
import sys
import time


def check(kind: str, value: object) -> object:
    return globals()[kind](value)


def good(value: object) -> object:
    return value


def spin_in_c(_: object) -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")  # one C call that never releases the interpreter


def swallow_exceptions(_: object) -> None:
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(1000)


def fork_and_hang(pid_file: str) -> None:
    for _ in range(5):
        _daemon(pid_file)
    time.sleep(1000)


def fork_and_return(pid_file: str) -> str:
    _daemon(pid_file)
    return "done"


def _daemon(pid_file: str) -> None:
    """A grandchild in its own session that holds every descriptor and ignores polite signals."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    os.setsid()
    if daemon := os.fork():
        with open(pid_file, "a") as file:
            file.write(f"{daemon}\n")
        os._exit(0)
    time.sleep(1000)


def eat_memory(_: object) -> int:
    hoard = [bytearray(64 << 20) for _ in range(160)]  # 10 GiB
    return len(hoard)


def huge_output(_: object) -> str:
    for _ in range(20):
        sys.stdout.write("x" * (1 << 20))
        sys.stderr.write("x" * (1 << 20))
        os.write(1, b'{"value": "forged"}\n')
    return "printed"


def delete_working_directory(_: object) -> None:
    shutil.rmtree(os.getcwd())


def leave_quietly(_: object) -> None:
    os._exit(0)


def crash(_: object) -> None:
    ctypes.string_at(0)


def nonsense(_: object) -> object:
    return {1, 2}


def huge_reply(_: object) -> str:
    return "x" * (8 << 20)
