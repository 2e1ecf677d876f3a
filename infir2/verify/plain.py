"""Plain values as JSON, the only data that jails and the parent exchange.

This file imports only the standard library, because it runs inside jails (jail.py).
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from numbers import Number
from typing import Any

_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset)
_BUILD: dict[str, Any] = {kind.__name__: kind for kind in _CONTAINERS}
_TYPES = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, dict, *_CONTAINERS)
}
_IMMUTABLE = (str, float, int, complex, bytes, tuple, frozenset)
_SMALL_INTEGER = 1 << 4096
Keep = Callable[[Any], list | None]

# Values of the standard library that cross by value between a test and a program: how each is
# written, and the function of its module that reads it.
_STANDARD: dict[tuple[str, str], tuple[Callable[[Any], Any], str]] = {
    ("fractions", "Fraction"): (str, "Fraction"),
    ("decimal", "Decimal"): (str, "Decimal"),
    ("datetime", "date"): (lambda value: value.isoformat(), "date.fromisoformat"),
    ("datetime", "time"): (lambda value: value.isoformat(), "time.fromisoformat"),
    ("datetime", "datetime"): (lambda value: value.isoformat(), "datetime.fromisoformat"),
    ("datetime", "timedelta"): (lambda t: [t.days, t.seconds, t.microseconds], "timedelta"),
    ("collections", "Counter"): (dict, "Counter"),
    ("collections", "OrderedDict"): (dict, "OrderedDict"),
    ("collections", "deque"): (lambda value: [list(value), value.maxlen], "deque"),
    ("builtins", "range"): (lambda value: [value.start, value.stop, value.step], "range"),
}
_VIEWS = {"dict_keys", "dict_values", "dict_items"}


def encode(value: Any, keep: Keep | None = None) -> Any:
    """`value` as JSON: scalars unchanged, others as [kind, content].

    Other objects become what `keep` returns. A subclass loses its methods, `__eq__` included; with
    `keep` an object of an immutable one crosses as ["attributed", [value, kept]], of another as
    kept (keep may return None to strip it). Without `keep`, numbers become int or float, mappings
    dicts and other iterables lists; what is left raises ValueError.
    """
    kind = type(value)
    if value is None or kind in (bool, float, str) or (kind is int and abs(value) < _SMALL_INTEGER):
        return value
    if keep is not None and (crossing := _standard_value(value, keep)):
        return crossing
    base = next((base for base in _BASES if issubclass(kind, base)), None)
    if base is not None:
        kept = keep(value) if keep is not None and _is_own(kind) else None
        if kept is None or base in _IMMUTABLE:
            plain = _BASES[base](value, keep)
            return plain if kept is None else ["attributed", [plain, kept]]
        return kept
    if kind is type and value in _TYPES.values():
        return ["type", value.__name__]
    return keep(value) if keep is not None else _converted(value)


def _items(name: str, base: Any) -> Callable[[Any, Any], Any]:
    return lambda value, keep: [name, [encode(item, keep) for item in base.__iter__(value)]]


_BASES: dict[Any, Callable[[Any, Any], Any]] = {
    str: lambda value, _: str.__str__(value),
    float: lambda value, _: float.__float__(value),
    int: lambda value, _: ["int", hex(int.__index__(value))],
    dict: lambda value, keep: [
        "dict", [[encode(key, keep), encode(item, keep)] for key, item in dict.items(value)]
    ],
    complex: lambda value, _: ["complex", [value.real, value.imag]],
    bytes: lambda value, _: ["bytes", bytes(value).hex()],
    bytearray: lambda value, _: ["bytes", bytes(value).hex()],
    **{base: _items(base.__name__, base) for base in _CONTAINERS},
}  # fmt: skip


def _is_own(kind: type) -> bool:
    """Whether a subclass of a plain type is not one of the standard library's containers."""
    return kind.__module__ not in ("builtins", "collections")


def _standard_value(value: Any, keep: Keep) -> list | None:
    name = (type(value).__module__, type(value).__name__)
    if name in _STANDARD:
        return ["standard", [*name, encode(_STANDARD[name][0](value), keep)]]
    if name[0] == "builtins" and name[1] in _VIEWS:
        return ["view", [encode(item, keep) for item in value]]
    return None


def _converted(value: Any) -> Any:
    if isinstance(value, Number) and not isinstance(value, complex):
        return encode(int(value) if value == int(value) else float(value))  # type: ignore[call-overload, arg-type]
    if isinstance(value, Mapping):
        return encode({key: value[key] for key in value})
    if isinstance(value, Iterable):
        return encode(list(value))
    raise ValueError(f"a {type(value).__name__} is no plain value")


def decode(
    data: Any,
    other: Callable[[str, Any], Any] | None = None,
    build: Mapping[str, Callable[[list], Any]] | None = None,
) -> Any:
    """The value that `encode` wrote. Raises ValueError for other data: jails are untrusted.

    `build` replaces the constructors of containers, where a dict's gets a list of (key, value)
    pairs. `other(kind, content)` builds what is no plain value.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    build = build or {}
    try:
        kind, content = data
        if kind in _BUILD:
            items = [decode(item, other, build) for item in content]
            return build.get(kind, _BUILD[kind])(items)
        if kind == "dict":
            pairs = [
                (decode(key, other, build), decode(item, other, build)) for key, item in content
            ]
            return build.get(kind, dict)(pairs)
        if kind in _SCALARS:
            return _SCALARS[kind](content)
        if other is not None:
            return other(kind, content)
        raise ValueError(f"no plain value: {kind}")
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"no plain value: {type(error).__name__}") from error


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "complex": lambda content: complex(*content),
    "bytes": bytes.fromhex,
    "type": _TYPES.__getitem__,
}


def standard(content: Any, other: Callable[[str, Any], Any]) -> Any:
    """A value of the standard library, from the content of ["standard", content]."""
    module, name, data = content
    path = _STANDARD[module, name][1]
    read: Any = importlib.import_module(module)
    for part in path.split("."):
        read = getattr(read, part)
    value = decode(data, other)
    return read(*value) if isinstance(value, list) else read(value)
