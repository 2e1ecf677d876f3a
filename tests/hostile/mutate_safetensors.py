"""Hostile safetensors files, made from a good one by mutation of its header."""

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

LENGTHS = (0, 1, 7, 2**20, 2**31, 2**32, 100_000_001, 2**62, 2**63, 2**64 - 1)
VALUES = (
    *(None, True, -1, 0, 1, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, 1e308),
    *("", "F32", "F99", "\0", "x" * 100_000, [], [0], [0, 0], [2**62, 2**62], [1] * 1000),
    *([-1, 4], [4, 0], [0, 2**63], {}, {"dtype": "F32"}, [[[]]]),
)
FIELDS = ("dtype", "shape", "data_offsets")


def mutants(good: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (name, file) without end; the first ones set each field to each unusual value."""
    generator = random.Random(seed)
    size = struct.unpack("<Q", good[:8])[0]
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]
    chosen = [*_headers(header, data), *_lengths(good), *_values(header, data, generator)]
    generator.shuffle(chosen)
    yield from chosen
    while True:
        yield "bits", _changed_bytes(good, size, generator)
        yield "truncated", good[: generator.randrange(len(good))]


def _file(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _lengths(good: bytes) -> Iterator[tuple[str, bytes]]:
    for length in LENGTHS:
        yield f"length-{length}", struct.pack("<Q", length) + good[8:]
    yield "empty", b""
    yield "seven-bytes", good[:7]


def _values(
    header: dict[str, Any], data: bytes, generator: random.Random
) -> Iterator[tuple[str, bytes]]:
    for field in FIELDS:
        for value in VALUES:
            name = generator.choice([name for name in header if name != "__metadata__"])
            changed = header | {name: header[name] | {field: value}}
            yield f"{field}-{str(value)[:20]}", _file(changed, data)


def _headers(header: dict[str, Any], data: bytes) -> Iterator[tuple[str, bytes]]:
    names = [name for name in header if name != "__metadata__"]
    one, other = names[:2]
    start, end = header[one]["data_offsets"]
    overlapping = header | {other: header[one]}
    shifted = header | {one: header[one] | {"data_offsets": [start + 1, end + 1]}}
    yield "overlapping", _file(overlapping, data)
    yield "shifted", _file(shifted, data)
    yield "reversed", _file(header | {one: header[one] | {"data_offsets": [end, start]}}, data)
    yield "missing", _file({name: header[name] for name in names[1:]}, data)
    yield "all-missing", _file({}, data)
    yield "no-field", _file(header | {one: {}}, data)
    yield "longer-data", _file(header, data + bytes(64))
    yield "shorter-data", _file(header, data[:-1])
    yield "metadata", _file(header | {"__metadata__": {"format": 1}}, data)
    yield "metadata-list", _file(header | {"__metadata__": []}, data)
    yield "renamed", _file({f"{name}\x00../../x": header[name] for name in names}, data)
    yield "no-json", _file(b"\xff" * 100, data)
    yield "deep-json", _file(b"[" * 100_000, data)
    yield "list", _file([header], data)
    twice = json.dumps(header)[:-1] + ", " + json.dumps({one: header[one]})[1:]
    yield "name-twice", _file(twice.encode(), data)
    yield "spaces", _file(json.dumps(header).encode() + b" " * 10**6, data)
    yield "many", _file(header | {f"t{n}": header[one] for n in range(20_000)}, data)


def _changed_bytes(good: bytes, size: int, generator: random.Random) -> bytes:
    changed = bytearray(good)
    for _ in range(generator.randint(1, 6)):
        changed[generator.randrange(8 + size)] = generator.randrange(256)
    return bytes(changed)
