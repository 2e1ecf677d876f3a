"""The program's side of LiveCodeBench's rules: what its runner does to a program and its input.

Published scores depend on these habits, so they are kept to the letter: names that are there
without an import, a program as the body of one function, standard input as a patched object, a
recursion limit of 50,000, SystemExit as a normal end. Nothing here decides a verdict. This file
imports only the standard library, because it runs inside jails (jail.py).
"""

import ast
import builtins
import contextlib
import importlib
import io
import json
import os
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from numbers import Number
from typing import Any, BinaryIO

from infir2.verify.plain import decode, encode
from infir2.verify.serve import send

_FROM = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random",
    "statistics", "itertools", "functools", "operator", "io", "sys", "json",
)  # fmt: skip
# The order matters: operator's `pow` hides math's, and builtins come back after them.
PRELUDE = "\n".join(
    [
        *(f"from {name} import *" for name in (*_FROM, "builtins", "typing")),
        *(f"import {name}" for name in _FROM),
        "sys.setrecursionlimit(50000)\n",
    ]
)
# Programs that use these fail under the runner, which sets them to None.
_REMOVED = (
    "kill", "system", "putenv", "remove", "removedirs", "rmdir", "fchdir", "setuid", "fork",
    "forkpty", "killpg", "rename", "renames", "truncate", "replace", "unlink", "fchmod", "fchown",
    "chmod", "chown", "chroot", "lchown", "getcwd", "chdir",
)  # fmt: skip
_HIDDEN_MODULES = ("ipdb", "joblib", "resource", "psutil", "tkinter")


def judge_contest(channel: socket.socket, requests: BinaryIO, request: dict[str, Any]) -> None:
    """Load the program, then run it on each input (or call `function`) that is requested."""
    sys.path += request["packages"]
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    if "numpy" in request["program"]:
        _import_numpy()
    _restrict()
    try:
        target = _load(request["program"], request["function"])
        send(channel, loaded=True)
    except BaseException as error:
        return _send_error(channel, "", error)
    answer = _call if request["function"] else _run
    for line in requests:
        test = json.loads(line)
        try:
            send(channel, id=test["id"], **answer(target, test))
        except BaseException as error:
            _send_error(channel, test["id"], error)


def _send_error(channel: socket.socket, key: str, error: BaseException) -> None:
    send(channel, id=key, error=type(error).__name__, detail=str(error)[:200])


def _import_numpy() -> None:
    """The runner has imported it before it removes what numpy needs to start."""
    with contextlib.suppress(ImportError):
        importlib.import_module("numpy")


def _restrict() -> None:
    for name in _REMOVED:
        setattr(os, name, None)
    sys.modules.update(dict.fromkeys(_HIDDEN_MODULES))  # type: ignore[arg-type]
    subprocess.Popen = None  # type: ignore[assignment,misc]
    vars(builtins).update(quit=None, help=None)


def _load(program: str, function: str) -> Callable[..., Any]:
    if function:
        program = f"{PRELUDE}\n\n{program}"
    else:
        program = _as_function(_without_main(program))
    module = types.ModuleType("tmp_sol", "")
    exec(program, module.__dict__)
    owner = module.__dict__["Solution"]() if "class Solution" in program else module
    found: Callable[..., Any] = getattr(owner, function or "wrapped_function")
    return found


def _without_main(program: str) -> str:
    """The program with the body of a last `if __name__ == '__main__'` in its place."""
    try:
        tree = ast.parse(program)
        last = tree.body[-1]
        if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
            parts = [ast.Module(part, []) for part in (tree.body[:-1], last.body)]
            return "\n".join(map(ast.unparse, parts))
    except Exception:
        pass
    return program


def _as_function(program: str) -> str:
    """The program as the body of `wrapped_function`, with its imports before it."""
    try:
        body = ast.parse(program).body
        kinds = (ast.Import, ast.ImportFrom)
        imports: list[ast.stmt] = [each for each in body if isinstance(each, kinds)]
        rest = [each for each in body if not isinstance(each, kinds)]
        function = ast.parse("def wrapped_function():\n    pass")
        function.body[0].body = rest  # type: ignore[attr-defined]
        parts = (ast.unparse(ast.Module(imports, [])), ast.unparse(function))
        return "\n".join((PRELUDE, *parts))
    except Exception:
        return program


def _run(function: Callable[..., Any], test: dict[str, Any]) -> dict[str, str]:
    """What the program prints for one input."""
    from unittest import mock  # which is slow to import

    text, printed, output = test["input"], sys.stdout, io.StringIO()
    output.close = lambda _: None  # type: ignore[method-assign,misc,assignment]
    lines = iter(text.split("\n"))
    readers: dict[str, Any] = {
        "read": lambda *_: text,
        "readline": lambda *_: next(lines),
        "readlines": lambda *_: text.split("\n"),
    }
    new_input = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    sys.stdout = output
    try:
        # On the object that `from sys import stdin` has found, then on `sys.stdin` itself.
        with (
            mock.patch.multiple(sys.stdin, **readers),
            mock.patch("sys.stdin", new_input),
            mock.patch("builtins.open", mock.mock_open(read_data=text)),
        ):
            function()
    except SystemExit:
        pass
    finally:
        sys.stdout = printed
    return {"output": output.getvalue()}


def _call(function: Callable[..., Any], test: dict[str, Any]) -> dict[str, Any]:
    value = function(*decode(test["args"]))
    return {"value": encode(value, _opaque)}


def _opaque(value: Any) -> list | None:
    """How an object crosses that is no plain value: numbers of numpy as numbers, others as such."""
    if isinstance(value, tuple(_PLAIN)):
        return None  # a subclass crosses without its methods
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return ["plain", value.item()]
    if isinstance(value, Number) and not isinstance(value, complex):
        return ["plain", float(value)]  # type: ignore[arg-type]
    return ["opaque", type(value).__name__]


_PLAIN = (str, float, int, dict, list, tuple, set, frozenset, bytes, bytearray)
