"""Plain values as JSON, the only data that jails and the parent exchange.

This file imports only the standard library, because it runs inside jails (jail.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset)
_BUILD: dict[str, Any] = {kind.__name__: kind for kind in _CONTAINERS}
_TYPES = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, dict, *_CONTAINERS)
}


def encode(value: Any, keep: Callable[[Any], int] | None = None) -> Any:
    """`value` as JSON: scalars unchanged, others as [kind, content].

    Subclasses lose their methods, `__eq__` included. Other objects become ["remote", keep(value)];
    without `keep` they raise ValueError.
    """
    kind = type(value)
    if value is None or kind in (bool, float, str) or (kind is int and abs(value) < 1 << 4096):
        return value
    for plain in (str, float):
        if issubclass(kind, plain):
            return plain.__str__(value) if plain is str else float.__float__(value)
    if issubclass(kind, int):
        return ["int", hex(int.__index__(value))]
    for container in _CONTAINERS:
        if issubclass(kind, container):
            return [container.__name__, [encode(item, keep) for item in container.__iter__(value)]]
    if issubclass(kind, dict):
        return [
            "dict",
            [[encode(key, keep), encode(item, keep)] for key, item in dict.items(value)],
        ]
    if issubclass(kind, complex):
        return ["complex", [value.real, value.imag]]
    if issubclass(kind, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if kind is type and value in _TYPES.values():
        return ["type", value.__name__]
    if keep is None:
        raise ValueError(f"a {kind.__name__} is no plain value")
    return ["remote", keep(value)]


def decode(
    data: Any,
    remote: Callable[[int], Any] | None = None,
    build: Mapping[str, Callable[[list], Any]] | None = None,
) -> Any:
    """The value that `encode` wrote. Raises ValueError for other data: jails are untrusted.

    `build` replaces the constructors of containers; a dict's gets a list of (key, value) pairs.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    build = build or {}
    try:
        kind, content = data
        if kind in _BUILD:
            items = [decode(item, remote, build) for item in content]
            return build.get(kind, _BUILD[kind])(items)
        if kind == "dict":
            pairs = [
                (decode(key, remote, build), decode(item, remote, build)) for key, item in content
            ]
            return build.get(kind, dict)(pairs)
        if kind == "remote" and remote is not None:
            return remote(int(content))
        if kind == "type":
            return _TYPES[content]
        return {
            "int": lambda: int(content, 16),
            "complex": lambda: complex(*content),
            "bytes": lambda: bytes.fromhex(content),
        }[kind]()
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"no plain value: {type(error).__name__}") from error
