"""Checks of the answer verifier and of the jail for programs."""

import time

from infir2 import verify
from infir2.errors import ConfigError
from infir2.preflight.finding import Finding


def check_verifier() -> Finding:
    """A right answer passes and a wrong one does not. Raises ConfigError."""
    start = time.perf_counter()
    response = r"\boxed{\sqrt{8}}"
    right = verify.check_math(response, r"2\sqrt{2}")
    wrong = verify.check_math(response, r"3\sqrt{2}")
    if not right.correct or wrong.correct:
        raise ConfigError(
            "the answer checker does not work on this machine "
            f"({right.reason}, {wrong.reason}: {right.detail})."
        )
    seconds = time.perf_counter() - start
    detail = (
        f"a right and a wrong answer are told apart ({seconds:.1f} s with the start of a worker)"
    )
    return Finding("verifier", "ok", detail)


def check_jail() -> Finding:
    """An honest program passes; a cheat and an endless loop do not.

    Raises ConfigError for a jail with another result. A machine that refuses a jail is a warning:
    only rewards for programs need one.
    """
    tests = [{"fn_name": "double", "args": [4], "expected": 8}]
    bodies = ("return 2 * x", "import os; os._exit(0)", "while True: pass")
    start = time.perf_counter()
    try:
        honest, cheat, loop = (
            verify.run_code(f"def double(x):\n    {body}", tests, verify.Limits(seconds=1.0)).reason
            for body in bodies
        )
    except verify.JailError as error:
        return Finding("jail", "warn", str(error))
    if honest != "ok" or cheat == "ok" or loop != "timeout":
        raise ConfigError(
            "the jail does not work on this machine: "
            f"an honest program gave {honest}, a cheat {cheat}, a loop {loop}."
        )
    seconds = time.perf_counter() - start
    detail = f"honest {honest}, cheat {cheat}, endless loop {loop} ({seconds:.1f} s)"
    return Finding("jail", "ok", detail)
