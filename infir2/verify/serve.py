"""The program's side of a call: load a program, then serve calls of its functions and objects.

Everything here may be replaced by the program, so nothing here decides a verdict. This file imports
only the standard library, because it runs inside jails (jail.py).
"""

import builtins
import copy
import json
import operator
import socket
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from infir2.verify.plain import decode, encode, standard

BINARY = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul",
    "and_", "or_", "xor", "lshift", "rshift",
)  # fmt: skip
ORDER = ("lt", "le", "gt", "ge")
_OPERATORS = (
    *BINARY, *(f"i{name.strip('_')}" for name in BINARY), *ORDER,
    "neg", "pos", "abs", "invert", "index", "getitem", "setitem", "delitem", "contains",
)  # fmt: skip
# Containers that a class of the program may extend: a copy without the class.
_PLAIN: dict[Any, Callable[[Any], Any]] = {
    list: lambda value: list(list.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    deque: lambda value: list(deque.__iter__(value)),
}


def send(channel: socket.socket, **message: Any) -> None:
    """Send one line of JSON."""
    channel.sendall(json.dumps(message).encode() + b"\n")


def run(program: str, name: str, prelude: str = "") -> dict[str, Any]:
    """Run a program as the module `name`; its names."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(prelude, module.__dict__)
    exec(compile(program, "<program>", "exec"), module.__dict__)
    return module.__dict__


def _equal(one: Any, other: Any) -> bool:
    """Equality by the class's own definition, unless it finds everything equal."""
    return bool(one == other) and not one == object()  # noqa: SIM201 - it asks `__eq__`


def _next(iterator: Any) -> tuple[bool, Any]:
    try:
        return True, next(iterator)
    except StopIteration:
        return False, None


def _exit(manager: Any, kind: Any, *arguments: Any) -> bool:
    error = kind(*arguments) if kind else None
    return bool(type(manager).__exit__(manager, kind, error, None))


def _await(coroutine: Any) -> Any:
    import asyncio  # which takes as long to import as everything else

    return asyncio.run(coroutine)


def _plain(value: Any) -> Any:
    return next(copied for base, copied in _PLAIN.items() if isinstance(value, base))(value)


_TOOLS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in _OPERATORS
} | {
    tool.__name__: tool
    for tool in (getattr, setattr, delattr, len, str, repr, format, bool, hash, int, float, complex,
                 round, iter, reversed, isinstance, issubclass, dir)
} | {
    "equal": _equal,
    "next": _next,
    "enter": lambda manager: type(manager).__enter__(manager),
    "exit": _exit,
    "await": _await,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "plain": _plain,
}  # fmt: skip


class Callback:
    """A function of the test that was passed to the program."""

    def __init__(self, call: Callable[..., Any], index: int) -> None:
        self._call, self._index = call, index

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._call(self._index, arguments, options)


class Server:
    """Serves calls over a channel, one line of JSON each; a call may call back meanwhile."""

    def __init__(self, channel: socket.socket, requests: BinaryIO, names: dict[str, Any]) -> None:
        self.channel, self.requests, self.names = channel, requests, names
        self.kept: list[Any] = []
        self.index_of: dict[int, int] = {}  # by id(); kept objects stay alive

    def serve(self) -> None:
        """Answer requests until the channel ends."""
        for line in self.requests:
            self.answer(json.loads(line))

    def answer(self, request: dict[str, Any]) -> None:
        """Make one call and send its result or its exception."""
        key = request["id"]
        try:
            arguments = decode(request["arguments"], self._other)
            options = decode(request["options"], self._other)
            value = self._target(*request["target"])(*arguments, **options)
            if request.get("plain"):
                return send(self.channel, id=key, value=encode(value))
            reply = {"id": key, "value": encode(value, self.keep)}
            if value is None and request["target"][0] != "tool":
                reply["arguments"] = encode(arguments, self.keep)  # it may have changed them
            send(self.channel, **reply)
        except BaseException as error:
            send(self.channel, id=key, **self._error(error))

    def keep(self, value: Any) -> list:
        """Keep an object for later calls; how the other side names it."""
        index = self.index_of.setdefault(id(value), len(self.kept))
        if index == len(self.kept):
            self.kept.append(value)
        return ["remote", [index, _nature(value)]]

    def _target(self, kind: str, target: Any) -> Callable[..., Any]:
        if kind == "tool":
            return self._name if target == "name" else _TOOLS[target]
        if kind == "object":
            return self.kept[target]
        if target in self.names:
            return self.names[target]
        return getattr(self.names["Solution"](), target)

    def _name(self, name: str) -> tuple[str, Any]:
        value = self.names[name]
        if isinstance(value, types.ModuleType):
            return "module", value.__name__
        if isinstance(value, type) and issubclass(value, Exception):
            return "exception", _lineage(value)
        return "value", value

    def _other(self, kind: str, content: Any) -> Any:
        if kind == "remote":
            return self.kept[content]
        if kind == "attributed":
            return decode(content[0], self._other)
        if kind == "callback":
            return Callback(self._call_back, content)
        if kind == "builtin":
            return getattr(builtins, content)
        if kind == "instance":
            return self._instance(*content)
        if kind == "standard":
            return standard(content, self._other)
        raise ValueError(f"unexpected value: {kind}")

    def _instance(self, name: str, attributes: list) -> Any:
        """An object of the program's class of that name, for one of the test's class."""
        kind = self.names.get(name)
        if not isinstance(kind, type):
            kind = self.names[name] = type(name, (), {})
        instance: Any = object.__new__(kind)
        instance.__dict__.update({key: decode(value, self._other) for key, value in attributes})
        return instance

    def _call_back(self, index: int, arguments: tuple, options: dict) -> Any:
        send(
            self.channel,
            call=index,
            arguments=encode(arguments, self.keep),
            options=encode(options, self.keep),
        )
        for line in self.requests:
            message = json.loads(line)
            if "target" in message:
                self.answer(message)
            elif "error" in message:
                raise getattr(builtins, message["error"], RuntimeError)(message["detail"])
            else:
                return decode(message["value"], self._other)

    def _error(self, error: BaseException) -> dict[str, Any]:
        try:
            arguments = encode(list(error.args), self.keep)
        except Exception:
            arguments = ["list", [str(error)]]
        names = {"error": type(error).__name__, "lineage": _lineage(type(error))}
        return names | {
            "detail": str(error)[:200],
            "arguments": arguments,
            "object": self.keep(error)[1][0],
        }


def _lineage(kind: type) -> list[str]:
    """Names of an exception's classes up to the first builtin one."""
    names = []
    for each in kind.__mro__:
        names.append(each.__name__)
        if each.__module__ == "builtins":
            break
    return names


def _nature(value: Any) -> str:
    """What the other side must know about an object: how it can be compared, awaited, iterated."""
    if isinstance(value, types.CoroutineType):
        return "coroutine"
    if isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
        return "iterator"
    return "container" if isinstance(value, tuple(_PLAIN)) else "object"


def load_and_serve(channel: socket.socket, requests: BinaryIO, program: str, prelude: str) -> None:
    """Load a program, send its names, and serve calls."""
    try:
        names = run(program, "solution", prelude)
        send(channel, names=list(names))
    except BaseException as error:
        return send(channel, error=type(error).__name__, detail=str(error)[:200])
    Server(channel, requests, names).serve()
