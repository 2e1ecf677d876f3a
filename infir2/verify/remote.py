"""The test's side of a call: proxies of a program's objects, which a test can use as its own.

The program decides what its objects do, so no expected value may depend on them: a comparison of
an object with a plain value never asks the program. This file imports only the standard library,
because it runs inside jails (jail.py).
"""

import builtins
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from infir2.verify.plain import decode, encode, standard
from infir2.verify.serve import BINARY, ORDER, send

MAX_LINE_BYTES = 4 << 20  # of one message
_PROBES = 8
_PLAIN = (str, int, float, complex, bytes, bytearray, tuple, list, dict, set, frozenset)
# Operators by which a test may ask how far a result is from the expected value.
_DISTANCE = {"sub", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift"}
_DISTANCE |= {f"i{name.strip('_')}" for name in _DISTANCE}


class EndedError(BaseException):
    """The program's jail does not answer; no `except Exception` of a test catches this."""


class Sequence(list):
    """The items of a range or a view of a dict, equal to a list or a range of the same items."""

    def __eq__(self, other: object) -> bool:
        if isinstance(other, set | frozenset):
            return set(self) == other
        return isinstance(other, list | range | deque) and list(self) == list(other)

    __hash__ = None


class Deque(deque):
    """A deque that equals a list of the same items."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | range | deque) and list(self) == list(other)

    __hash__ = None


class Program:
    """The connection to the program's jail."""

    def __init__(self, peer: socket.socket) -> None:
        # The parent's timeout on its descriptor of the same socket made it non-blocking.
        peer.setblocking(True)
        self.peer, self.replies = peer, peer.makefile("rb")
        self.callbacks: list[Callable[..., Any]] = []
        self.exceptions: dict[str, type[Exception]] = {}
        self.ended = ""  # why the program answers no more, even if the test catches the exception
        self.failed = ""  # an assertion that failed in a function that the program called

    def ask(self, target: list, arguments: tuple, options: dict | None = None) -> Any:
        """Call something in the program's jail. Raises its exception, or EndedError."""
        key = os.urandom(8).hex()
        request = {
            "target": target,
            "arguments": encode(list(arguments), self._handle),
            "options": encode(options or {}, self._handle),
        }
        self._send(id=key, **request)
        while "call" in (reply := self._receive()):
            self._send(**self._called_back(reply))
        if reply.get("id") != key:
            raise self._end("the program ended, or sent an unexpected message")
        if "error" in reply:
            raise self._exception(reply)
        value = decode(reply["value"], self.other)
        if value is None and reply.get("arguments", request["arguments"]) != request["arguments"]:
            _update(list(arguments), decode(reply["arguments"], self.other))
        return value

    def tool(self, name: str, *arguments: Any) -> Any:
        """Apply one of the program's jail's own functions."""
        return self.ask(["tool", name], arguments)

    def other(self, kind: str, content: Any) -> Any:
        """What is no plain value, see `plain.decode`."""
        if kind == "remote":
            index, nature = content
            if nature == "coroutine":
                return self._awaited(Remote(self, index, "object"))
            return Remote(self, index, nature)
        if kind == "attributed":
            return _attributed(decode(content[0], self.other), decode(content[1], self.other))
        if kind == "view":
            return Sequence(decode(item, self.other) for item in content)
        if kind == "standard":
            value = standard(content, self.other)
            if type(value) is deque:
                return Deque(value, value.maxlen)
            return Sequence(value) if isinstance(value, range) else value
        raise ValueError(f"unexpected value: {kind}")

    def exception_class(self, lineage: list[str]) -> type[Exception]:
        """The class of an exception: builtin, or a stand-in for a class of the program.

        Never StopIteration, which could end a test's loop; a stand-in is never an AssertionError.
        """
        name, *bases = lineage
        builtin = getattr(builtins, name, None)
        if isinstance(builtin, type):
            usable = issubclass(builtin, Exception) and not issubclass(
                builtin, StopIteration | StopAsyncIteration
            )
            return builtin if usable else RuntimeError
        if name not in self.exceptions:
            base = self.exception_class(bases) if bases else Exception
            base = Exception if issubclass(base, AssertionError) else base
            self.exceptions[name] = type(name, (base,), {"__getattr__": _attribute_of_error})
        return self.exceptions[name]

    def _end(self, detail: str) -> EndedError:
        self.ended = self.ended or detail
        return EndedError(detail)

    def _send(self, **message: Any) -> None:
        try:
            send(self.peer, **message)
        except OSError as error:
            raise self._end("the program ended") from error

    def _receive(self) -> dict[str, Any]:
        try:
            reply = json.loads(self.replies.readline(MAX_LINE_BYTES) or "{}")
        except (OSError, ValueError):
            reply = {}
        return reply if isinstance(reply, dict) else {}

    def _handle(self, value: Any) -> list | None:
        """How the program names an object, a function of the test, or an object of its classes."""
        kind = type(value)
        if kind is Remote:
            return ["remote", value._index]
        if kind is Deque:
            return encode(deque(value, value.maxlen), self._handle)
        if isinstance(value, _PLAIN):
            return None
        name = getattr(value, "__name__", "")
        if isinstance(name, str) and name and getattr(builtins, name, None) is value:
            return ["builtin", name]
        if callable(value):
            self.callbacks.append(value)
            return ["callback", len(self.callbacks) - 1]
        if kind.__module__ == "examiner":
            attributes = [[key, encode(item, self._handle)] for key, item in vars(value).items()]
            return ["instance", [kind.__name__, attributes]]
        raise ValueError(f"a {kind.__name__} cannot be passed to the program")

    def _called_back(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            function = self.callbacks[message["call"]]
            arguments = decode(message["arguments"], self.other)
            options = decode(message["options"], self.other)
            return {"value": encode(function(*arguments, **options), self._handle)}
        except AssertionError as error:
            self.failed = self.failed or f"AssertionError: {error}"
            return {"error": "AssertionError", "detail": ""}
        except Exception as error:
            return {"error": type(error).__name__, "detail": str(error)[:200]}

    def _exception(self, reply: dict[str, Any]) -> Exception:
        kind = self.exception_class(reply.get("lineage") or [str(reply["error"])])
        try:
            error = kind(*decode(reply["arguments"], self.other))
        except Exception:
            error = RuntimeError(reply.get("detail"))
        if "object" in reply:
            error.__dict__["_remote"] = Remote(self, reply["object"], "object")
        return error

    async def _awaited(self, coroutine: "Remote") -> Any:
        return self.tool("await", coroutine)


class Remote:
    """A proxy of an object in the program's jail."""

    def __init__(self, program: Program, index: int, nature: str, derived: bool = False) -> None:
        # derived: the program computed it from a value of the test, perhaps an expected one
        self.__dict__.update(_program=program, _index=index, _nature=nature, _derived=derived)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._program.ask(["object", self._index], arguments, options)

    def _tool(self, name: str, *arguments: Any) -> Any:
        return self._program.tool(name, self, *arguments)

    def _plain(self) -> Any:
        """The content of an iterator or of a container, as plain values."""
        if self._nature == "container":
            return self._tool("plain")
        return list(self) if self._nature == "iterator" else None

    def __getattr__(self, name: str) -> Any:
        return self._tool("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._tool("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._tool("delattr", name)

    def __iter__(self) -> Any:
        return self if self._nature == "iterator" else _Items(self._tool("iter"))

    def __next__(self) -> Any:
        more, value = self._tool("next")
        if not more:
            raise StopIteration
        return value

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote):
            return self._index == other._index or bool(self._tool("equal", other))
        plain = self._plain() if isinstance(other, list | dict | set | deque) else None
        return plain is not None and plain == other

    def __hash__(self) -> int:
        return int(self._tool("hash"))

    def __contains__(self, item: Any) -> bool:
        if not self._tool("contains", item):
            return False
        # What contains everything of a kind says nothing about this item.
        probes = _probes(item)
        return not probes or not all(self._tool("contains", probe) for probe in probes)

    def __enter__(self) -> Any:
        return self._tool("enter")

    def __exit__(self, kind: Any, error: Any, trace: TracebackType | None) -> bool:
        if kind is None:
            self._tool("exit", None)
            return False
        name = kind.__name__
        known = name if getattr(builtins, name, None) is kind else "RuntimeError"
        suppressed = self._tool("exit", getattr(builtins, known), str(error))
        # Only what the test raised itself: else a program could skip the assertions that follow.
        honored = not isinstance(error, AssertionError) and _is_raised_by_test(trace)
        return honored and bool(suppressed)

    def __instancecheck__(self, instance: Any) -> bool:
        remote = instance if isinstance(instance, Remote) else getattr(instance, "_remote", None)
        return remote is not None and bool(self._program.tool("isinstance", remote, self))

    def __copy__(self) -> Any:
        return self._tool("copy")

    def __deepcopy__(self, memo: Any) -> Any:
        return self._tool("deepcopy")

    def _binary(self, name: str, left: Any, right: Any) -> Any:
        own = isinstance(left, Remote) and isinstance(right, Remote)
        derived = not own or left._derived or right._derived
        other = right if left is self else left
        if name in _DISTANCE and not (own or isinstance(other, int | float)):
            return NotImplemented
        result = self._program.tool(name, left, right)
        if derived and isinstance(result, Remote):
            return Remote(self._program, result._index, result._nature, derived=True)
        if derived and (name in _DISTANCE or own or self._derived):
            raise TypeError(f"{name} of an object and a value of the test gives no plain value")
        return result

    def _number(self, name: str, *rest: Any) -> Any:
        """A number or truth of this object, which must not come from an expected value."""
        if self._derived:
            raise TypeError(f"{name} of what a program computed from a value of the test")
        return self._tool(name, *rest)

    def _order(self, name: str, other: Any) -> Any:
        if not isinstance(other, Remote):
            plain = self._plain()
            return NotImplemented if plain is None else getattr(plain, f"__{name}__")(other)
        if self._derived or other._derived:
            return NotImplemented
        holds = bool(self._tool(name, other))
        if holds and name in ("lt", "gt") and self._program.tool(name, other, self):
            raise TypeError(f"each of two objects is {name} the other")
        return holds


class _Items:
    """The iterator of a remote object."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator if isinstance(iterator, Remote) else iter(iterator)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)


def _define_operators() -> None:
    """Python finds operators on the class only."""
    for name in BINARY:
        plain = name.strip("_")
        setattr(Remote, f"__{plain}__", lambda a, b, name=name: a._binary(name, a, b))
        setattr(Remote, f"__r{plain}__", lambda a, b, name=name: a._binary(name, b, a))
        setattr(Remote, f"__i{plain}__", lambda a, b, name=plain: a._binary(f"i{name}", a, b))
    for name in ORDER:
        setattr(Remote, f"__{name}__", lambda a, b, name=name: a._order(name, b))
    for name in ("neg", "pos", "abs", "invert", "index", "int", "float", "complex", "round"):
        setattr(Remote, f"__{name}__", lambda a, *rest, name=name: a._number(name, *rest))
    for name in ("bool", "len"):
        setattr(Remote, f"__{name}__", lambda a, name=name: a._number(name))
    for name in ("str", "repr", "format", "reversed", "getitem", "setitem", "delitem", "dir"):
        setattr(Remote, f"__{name}__", lambda a, *rest, name=name: a._tool(name, *rest))


_define_operators()


def _probes(item: Any) -> list[Any]:
    """Random values of the kind of `item`; none if it is no number, string or tuple."""
    numbers = [int.from_bytes(os.urandom(7), "big") for _ in range(_PROBES)]
    if isinstance(item, str):
        return [f"{number:x}" for number in numbers]
    if isinstance(item, tuple):
        return [(number,) * len(item) for number in numbers]
    return numbers if isinstance(item, int | float) else []


def _attributed(plain: Any, remote: Any) -> Any:
    """A plain value with the attributes of the program's object, such as a named tuple."""
    base = type(plain)
    members = {"__getattr__": lambda _, name: getattr(remote, name), "_remote": remote}
    kind = type(base.__name__, (base,), members)
    return kind(plain)


def _attribute_of_error(error: Exception, name: str) -> Any:
    if name.startswith("__") or "_remote" not in error.__dict__:
        raise AttributeError(name)
    return getattr(error.__dict__["_remote"], name)


def _update(old: Any, new: Any) -> Any:
    """Give a container of the test the content that the program left in its copy."""
    if isinstance(new, Remote) and old is not None:
        return old  # an object or a function of the test, as the program saw it
    if type(old) is not type(new) or not isinstance(old, list | dict | set):
        return new
    if isinstance(old, list):
        merged = [_update(*pair) for pair in zip(old, new, strict=False)] + new[len(old) :]
        old[:] = merged
    elif isinstance(old, dict):
        merged = {key: _update(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(merged)
    else:
        old.clear()
        old.update(new)
    return old


def _is_raised_by_test(trace: TracebackType | None) -> bool:
    """Whether a `raise` of the test's own text raised an exception."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code if trace is not None else None
    return (
        code is not None
        and code.co_filename == "<test>"
        and trace is not None
        and (trace.tb_lineno in trace.tb_frame.f_globals.get("__raise_lines__", ()))
    )
