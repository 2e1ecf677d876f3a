"""Compare what a program returned or printed with what a test expects.

A program chooses its values, and values of one hash make a set or a dict take quadratic time. So
sets and dicts of an answer are never built here: `unhashed` keeps them as lists, and they are
compared by sorting.
"""

from decimal import Decimal, InvalidOperation
from math import isclose
from typing import Any

from infir2.verify.plain import decode

_LONG_WORD = 400  # characters
_SMALL_INTEGER = 1 << 64


class Members(list):
    """The members of a set, in any order."""


class Pairs(list):
    """The (key, value) pairs of a dict, in any order."""


def unhashed(data: Any) -> Any:
    """The value that `plain.encode` wrote, with Members and Pairs for sets and dicts."""
    return decode(data, build={"set": Members, "frozenset": Members, "dict": Pairs})


def same_value(value: Any, expected: Any) -> bool:
    """Equality of plain values: floats to 1e-9; tuples equal lists, since JSON has no tuples.

    Where all keys of an expected dict are strings, as in JSON, other keys equal their spelling.
    """
    if isinstance(expected, set | frozenset):
        return isinstance(value, set | frozenset | Members) and _same_members(value, expected)
    if isinstance(expected, dict):
        pairs = list(value.items()) if isinstance(value, dict) else value
        return isinstance(value, dict | Pairs) and _same_pairs(pairs, list(expected.items()))
    if isinstance(expected, list | tuple):
        return (
            isinstance(value, list | tuple)
            and not isinstance(value, Members | Pairs)
            and len(value) == len(expected)
            and all(map(same_value, value, expected))
        )
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, float) and isinstance(expected, float):
        return value == expected or isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    return bool(value == expected)


def _same_members(members: Any, expected: Any) -> bool:
    return len(members) == len(expected) and (
        sorted(map(_sort_key, members)) == sorted(map(_sort_key, expected))
    )


def _same_pairs(pairs: list[Any], expected: list[Any]) -> bool:
    if len(pairs) != len(expected):
        return False
    wanted = sorted(((_sort_key(key), value) for key, value in expected), key=_first)
    found = sorted(((_sort_key(key), value) for key, value in pairs), key=_first)
    if list(map(_first, found)) != list(map(_first, wanted)):
        if not all(isinstance(key, str) for key, _ in expected):
            return False
        found = sorted(((_sort_key(_spelling(key)), value) for key, value in pairs), key=_first)
    return all(
        key == wanted_key and same_value(value, wanted_value)
        for (key, value), (wanted_key, wanted_value) in zip(found, wanted, strict=True)
    )


def _first(pair: tuple[str, Any]) -> str:
    return pair[0]


def _sort_key(value: Any) -> str:
    """Text that is equal for equal values, and only for them: 1, 1.0 and True are equal."""
    if isinstance(value, complex) and value.imag == 0:
        value = value.real
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return hex(value)
    if isinstance(value, set | frozenset | Members):
        return "{" + ",".join(sorted(map(_sort_key, value))) + "}"
    if isinstance(value, list | tuple):
        return type(value).__name__ + "(" + ",".join(map(_sort_key, value)) + ")"
    return repr(value)


def _spelling(key: Any) -> Any:
    """The key of a JSON object for a key of a dict."""
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, float) or (isinstance(key, int) and abs(key) < _SMALL_INTEGER):
        return repr(key)
    return key


def contest_value(data: Any) -> Any:
    """The value that a program returned under LiveCodeBench's rules; a tuple becomes a list."""
    value = decode(data, _foreign, {"set": Members, "frozenset": Members, "dict": Pairs})
    return list(value) if isinstance(value, tuple) else value


def _foreign(kind: str, content: Any) -> Any:
    if kind == "plain" and isinstance(content, bool | int | float | str):
        return content
    if kind == "attributed":
        return decode(content[0], _foreign, {"dict": Pairs})
    if kind == "standard" and content[1] in ("Counter", "OrderedDict"):
        return decode(content[2], _foreign, {"dict": Pairs})
    return object()  # equals no JSON


def same_contest_value(value: Any, expected: Any) -> bool:
    """Python's `==` with a value of JSON: True is 1, floats exact, an inner tuple is no list."""
    if isinstance(expected, list):
        return (
            type(value) is list
            and len(value) == len(expected)
            and all(map(same_contest_value, value, expected))
        )
    if isinstance(expected, dict):
        return (
            isinstance(value, Pairs)
            and len(value) == len(expected)
            and all(
                isinstance(key, str) and key in expected and same_contest_value(item, expected[key])
                for key, item in value
            )
        )
    return bool(value == expected)


def same_contest_output(output: str, expected: str) -> bool:
    """Equality of stripped lines, or of all their words as exact decimal numbers."""
    lines, wanted = (
        [line.strip() for line in text.strip().split("\n")] for text in (output, expected)
    )
    return len(lines) == len(wanted) and all(
        line == other or _decimals(line) == _decimals(other) is not None
        for line, other in zip(lines, wanted, strict=True)
    )


def _decimals(line: str) -> list[Decimal] | None:
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None


def same_output(output: str, expected: str) -> bool:
    """Equality of printed text, ignoring trailing space and blank last lines; numbers by value."""
    lines, expected_lines = (
        [line.split() for line in text.rstrip().splitlines()] for text in (output, expected)
    )
    return len(lines) == len(expected_lines) and all(
        len(a) == len(b) and all(map(_same_word, a, b))
        for a, b in zip(lines, expected_lines, strict=True)
    )


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if len(word) > _LONG_WORD or len(expected) > _LONG_WORD:
        return False
    try:
        return Decimal(word) == Decimal(expected)
    except InvalidOperation:
        return False
