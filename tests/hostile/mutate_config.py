"""Hostile JSON files, made from a good one by mutation of its values and bytes.

for name, data in itertools.islice(mutants(good, seed=0), 100): ...
"""

import json
import random
from collections.abc import Iterator
from typing import Any

NUMBERS = (0, -1, 1, 3, 7, 1.0, 0.5, 20_000, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**18))
VALUES = (
    *(*NUMBERS, 10**400, 1e308, float("nan"), float("inf"), -0.0, 1e-320, None, True, False),
    *("", "1", "yarn", "../..", "a\0b", "\ud800", "x" * 100_000, "\x1b[31m", [], [[]], {}),
    *([None], [1, "a"], [10**9] * 3, ["x"] * 1000, {"": 1}, {"rope_type": "default"}),
)


def mutants(good: dict[str, Any], seed: int) -> Iterator[tuple[str, bytes]]:
    """Endless (name of the mutation, JSON file), each different from `good`.

    Most have one or two other values, some are no JSON. The files of one seed are always the same.
    """
    random_ = random.Random(seed)
    encoded = json.dumps(good).encode()
    while True:
        if random_.random() < 0.15:
            kind = random_.choice(list(_BYTES))
            yield kind, _BYTES[kind](encoded, random_)
            continue
        content = json.loads(encoded)
        changes = [_change(content, random_) for _ in range(random_.choice((1, 1, 1, 2)))]
        yield ", ".join(changes), json.dumps(content).encode()


def _change(content: dict[str, Any], random_: random.Random) -> str:
    """Replace or remove one value, or nest it; some changes go one level deeper."""
    key = random_.choice(list(content))
    if isinstance(content[key], dict) and content[key] and random_.random() < 0.7:
        return f"{key}.{_change(content[key], random_)}"
    kind = random_.random()
    if kind < 0.1:
        del content[key]
        content["removed"] = key
        return f"{key} removed"
    if kind < 0.2:
        content[key] = nested(random_.choice((2, 50)), content[key])
        return f"{key} nested"
    value = random_.choice(VALUES)
    content[key] = value
    return f"{key} = {str(value)[:30]!r}"


def nested(depth: int, value: Any) -> Any:
    """`value` in `depth` lists."""
    for _ in range(depth):
        value = [value]
    return value


def _flip(encoded: bytes, random_: random.Random) -> bytes:
    position = random_.randrange(len(encoded))
    changed = encoded[position] ^ 1 << random_.randrange(8)
    return encoded[:position] + bytes([changed]) + encoded[position + 1 :]


_BYTES = {
    "cut": lambda encoded, random_: encoded[: random_.randrange(len(encoded))],
    "flip": _flip,
    "deep": lambda encoded, _: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": lambda encoded, _: b'{"hidden_size":' + b"9" * 6000 + b"," + encoded[1:],
    "list": lambda encoded, _: b"[" + encoded + b"]",
    "number": lambda _, random_: str(random_.choice(NUMBERS)).encode(),
    "utf-16": lambda encoded, _: encoded.decode().encode("utf-16"),
    "not utf-8": lambda encoded, _: b'{"\xff":1,' + encoded[1:],
    "zeros": lambda encoded, _: bytes(len(encoded)),
    "twice": lambda encoded, _: encoded[:-1] + b"," + encoded[1:],
}
