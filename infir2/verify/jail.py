"""The code inside a jail. sandbox.py starts it, plain.py and walls.py under `python -I -S`.

These three files import only the standard library. A first process creates the namespaces and
watches; the second one (process 1 of its pid namespace) builds a file system of read-only libraries
and a small tmpfs, drops every privilege, sends {"ready": true}, and only then receives the program.

The process that runs a program contains nothing that decides the verdict: no expected value, no
test, no key. The parent compares plain values; an assert-style test runs in a second jail, the
examiner, which calls the program's functions by messages.
"""

import builtins
import importlib
import json
import os
import re
import socket
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO

from infir2.verify.plain import decode, encode
from infir2.verify.walls import confine

MAX_LINE_BYTES = 4 << 20  # of one message


def _send(channel: socket.socket, **message: Any) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


def _run(program: str, name: str, prelude: str = "") -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(prelude, module.__dict__)
    exec(compile(program, "<program>", "exec"), module.__dict__)
    return module.__dict__


def _script(channel: socket.socket, program: str) -> None:
    try:
        _run(program, "__main__")
    except Exception as error:
        _send(channel, error=type(error).__name__, detail=str(error)[:200])
        sys.exit(1)


def _serve(channel: socket.socket, requests: BinaryIO, program: str, prelude: str) -> None:
    """Load the program; then serve calls of its functions and of the objects they returned."""
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    try:
        names = _run(program, "solution", prelude)
        _send(channel, names=list(names))
    except BaseException as error:
        return _send(channel, error=type(error).__name__, detail=str(error)[:200])
    tools: dict[str, Any] = {
        "getattr": getattr,
        "setattr": setattr,
        "len": len,
        "list": list,
        "str": str,
        "repr": repr,
        "bool": bool,
    }
    tools["getitem"] = lambda container, key: container[key]
    tools["name"] = lambda name: (
        ("module", names[name].__name__)
        if isinstance(names[name], types.ModuleType)
        else ("value", names[name])
    )
    for line in requests:
        request = json.loads(line)
        try:
            kind, target = request["target"]
            if kind == "name":
                function = (
                    names[target] if target in names else getattr(names["Solution"](), target)
                )
            else:
                function = tools[target] if kind == "tool" else kept[target]
            arguments, options = (
                decode(request["arguments"], kept.__getitem__),
                decode(request["options"], kept.__getitem__),
            )
            _send(channel, id=request["id"], value=encode(function(*arguments, **options), keep))
        except BaseException as error:
            _send(channel, id=request["id"], error=type(error).__name__, detail=str(error)[:200])


class _EndedError(BaseException):
    """The program's jail does not answer; no test may catch this."""


class Remote:
    """A proxy of an object in the program's jail; two are equal only if they are identical."""

    def __init__(self, ask: Callable[..., Any], target: list) -> None:
        self.__dict__.update(_ask=ask, _target=target)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._ask(self._target, arguments, options)

    def _tool(self, name: str, *arguments: Any) -> Any:
        return self._ask(["tool", name], (self, *arguments), {})

    def __getattr__(self, name: str) -> Any:
        return self._tool("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._tool("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._tool("getitem", key)

    def __iter__(self) -> Any:
        return iter(list(self._tool("list")))

    def __len__(self) -> int:
        return int(self._tool("len"))

    def __bool__(self) -> bool:
        return bool(self._tool("bool"))

    def __str__(self) -> str:
        return str(self._tool("str"))


def _examine(channel: socket.socket, peer: socket.socket, request: dict) -> None:
    """Run an assert-style test against the program in the other jail, and send its outcome."""
    # The parent's timeout on its descriptor of the same socket made it non-blocking.
    peer.setblocking(True)
    replies = peer.makefile("rb")

    def ask(target: list, arguments: tuple, options: dict) -> Any:
        key = os.urandom(8).hex()
        _send(
            peer,
            id=key,
            target=target,
            arguments=encode(arguments, handle),
            options=encode(options, handle),
        )
        reply = json.loads(replies.readline(MAX_LINE_BYTES) or "{}")
        if reply.get("id") != key:
            raise _EndedError("the program ended, or sent an unexpected message")
        if "error" in reply:
            raise _exception(str(reply["error"]))(reply.get("detail"))
        return decode(reply["value"], remote)

    def handle(value: Any) -> int:
        if type(value) is not Remote or value._target[0] != "object":
            raise ValueError(
                "only plain values and the program's own objects can be passed to the program"
            )
        return value._target[1]

    def remote(index: int) -> Remote:
        return Remote(ask, ["object", index])

    space: dict[str, Any] = {"__name__": "examiner"}
    outcome, detail = "ok", ""
    try:
        exec(compile(request["setup"], "<setup>", "exec"), space)
        _bind_names(space, request, ask)
        exec(compile(request["code"], "<test>", "exec"), space)
        if request["entry_point"] and "check" in space:
            space["check"](space[request["entry_point"]])
    except AssertionError as error:
        outcome, detail = "wrong", f"AssertionError: {error}"
    except _EndedError as error:
        outcome, detail = "ended", str(error)
    except BaseException as error:
        outcome, detail = "error", f"{type(error).__name__}: {error}"
    _send(channel, key=request["key"], outcome=outcome, detail=detail[:200])


def _bind_names(space: dict[str, Any], request: dict, ask: Callable[..., Any]) -> None:
    used = set(re.findall(r"[^\W\d]\w*", request["code"])).intersection(request["names"])
    for name in used | {request["entry_point"]} - {""}:
        if name == request["entry_point"] or not (name in space or hasattr(builtins, name)):
            _bind(space, name, *ask(["tool", "name"], (name,), {}))


def _exception(name: str) -> type[Exception]:
    """The builtin exception of that name, except StopIteration, which could end a test's loop."""
    kind = getattr(builtins, name, None)
    if (
        isinstance(kind, type)
        and issubclass(kind, Exception)
        and not issubclass(kind, StopIteration | StopAsyncIteration)
    ):
        return kind
    return RuntimeError


def _bind(space: dict[str, Any], name: str, kind: str, value: Any) -> None:
    """Bind one of the program's names for the test; never a builtin or a name of `setup`."""
    if kind == "module":
        # The real module: in the program's own, everything could be close to everything.
        if value in sys.stdlib_module_names:
            space[name] = importlib.import_module(value)
    elif isinstance(value, Remote) and name in sys.stdlib_module_names:
        # A function of that name can be called, but a fake module has no attributes.
        space[name] = value.__call__
    else:
        space[name] = value


def main() -> None:
    """Confine this process, then serve the request in the first line of the control channel."""
    config = json.loads(sys.argv[1])
    channel = socket.socket(fileno=config["control"])
    try:
        confine(config)
    except (OSError, ValueError) as error:
        return _send(channel, jail=f"{type(error).__name__}: {error}")
    _send(channel, ready=True)
    requests = channel.makefile("rb")
    request = json.loads(requests.readline())
    if request["mode"] == "script":
        _script(channel, request["program"])
    elif request["mode"] == "serve":
        _serve(channel, requests, request["program"], request["prelude"])
    else:
        _examine(channel, socket.socket(fileno=config["peer"]), request)
