"""Hostile pickles, made from a good one by mutation of its opcodes.

for name, data in itertools.islice(mutants(good, seed=0), 200): ...
"""

import pickle
import pickletools
import random
import struct
from collections.abc import Iterator

LENGTHS = (0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**34, 2**63 - 1, 2**63, 2**64 - 1)
VALUES = (
    *(None, True, -1, 0, 2**31, 2**63, 2**64, 10**9, -(10**18), 1 << 200, 1 << 3000),
    *(float("nan"), float("inf"), -0.0, 1e-320, "", "..", "../../escape", "/etc/passwd", "a\0b"),
    *("\ud800", "x" * 100_000, "\x1b[31m", b"", b"\xff" * 300, (), (1,), [], {}, {"a": {}}, [[]]),
)


def name(module: str, attribute: str) -> bytes:
    """Opcode that looks up a class or function."""
    return f"c{module}\n{attribute}\n".encode()


def value(content: object) -> bytes:
    """Opcodes that push a plain value."""
    return pickletools.optimize(pickle.dumps(content, 2))[2:-1]


POSIX_PATH = name("pathlib", "PosixPath")
# Pushes one value each, so that it can stand in the place of another.
SNIPPETS = {
    "system": name("os", "system") + value(("true",)) + b"R",
    "eval": name("builtins", "eval") + value(("1",)) + b"R",
    "getattr": name("builtins", "getattr") + value(("a", "join")) + b"R",
    "stack-global": value("posix") + value("mkdir") + b"\x93" + value(("escape",)) + b"R",
    "path": POSIX_PATH + value(("/etc", "passwd")) + b"R",
    "path-state": POSIX_PATH + b")\x81" + value({"_str": "../../escape"}) + b"b",
    "class-state": POSIX_PATH + value({"name": "../../escape"}) + b"b",
    "slots-state": POSIX_PATH + b")\x81" + value((None, {"_str": "/etc/passwd"})) + b"b",
    "dict-state": b"}" + value({"keys": 1}) + b"b",
    "new-bytearray": name("builtins", "bytearray") + value((10**12,)) + b"\x81",
    "new-ex": name("argparse", "Namespace") + b")}\x92",
    "instance": b"(iargparse\nNamespace\n",
    "object": b"(" + name("argparse", "Namespace") + b"o",
    "extension-1": b"\x82\x01",
    "extension-2": b"\x83\x01\x00",
    "extension-4": b"\x84\x01\x00\x00\x00",
    "persistent-text": b"P../../escape\n",
    "persistent": value(("storage", None, "../../escape", "cpu", 10**12)) + b"Q",
    "call-of-a-call": name("argparse", "Namespace") + b")R)R",
    "call-of-text": value("text") + b")R",
    "call-with-a-list": name("argparse", "Namespace") + b"]R",
    "memo": b"Nr\xff\xff\xff\xff",
    "memo-text": b"Np99999999999999\n",
    "memo-get": b"j\xff\xff\xff\xff",
    "self": b"]q\xffh\xffa",
    "long": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "long-negative": b"\x8b" + struct.pack("<i", -1),
    "long-digits": b"L" + b"9" * 6000 + b"L\n",
    "integer-digits": b"I" + b"9" * 6000 + b"\n",
    "buffer": b"\x97",
    "bytearray": b"\x96" + struct.pack("<Q", 2**34),
    "deep-list": b"]" * 5_000 + b"a" * 4_999,
    "deep-tuple": b")" + b"\x85" * 5_000,
    "deep-key": b"})" + b"\x85" * 50_000 + b"Ns",
    "wide-key": b"})" + b"q\x01h\x01\x86" * 60 + b"Ns",
    "list-key": b"}]Ns",
    "colliding-keys": b"}("
    + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(3000))
    + b"u",
    "many-lists": b"(" + b"]" * 50_000 + b"t",
    "pop": b"NN0",
    "pop-mark": b"N(NN1",
    "dup": b"N200",
    "mark": b"(",
    "underflow": b"ttt",
    "unknown": b"\xff",
}


def mutants(good: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (name, pickle) without end; the first ones replace values with each attack once."""
    generator = random.Random(seed)
    operations = _operations(good)
    for label, snippet in SNIPPETS.items():
        yield f"whole-{label}", b"\x80\x04" + snippet + b"."
        yield f"value-{label}", _replace_value(operations, snippet, generator)
    for length in LENGTHS:
        yield f"text-{length}", b"\x80\x04\x8d" + struct.pack("<Q", length) + b"text."
        yield f"bytes-{length}", b"\x80\x04\x8e" + struct.pack("<Q", length) + b"text."
        yield f"frame-{length}", b"\x80\x04\x95" + struct.pack("<Q", length) + b"N."
    while True:
        kind = generator.choice(_KINDS)
        yield kind.__name__.removeprefix("_"), kind(operations, generator)


def _operations(data: bytes) -> list[bytes]:
    """The bytes of each operation."""
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


_PUSHING = {b"K", b"M", b"J", b"\x8a", b"G", b"X", b"\x8c", b"\x8d", b"N", b"\x88", b"\x89", b")"}


def _value_position(operations: list[bytes], generator: random.Random) -> int:
    pushing = [number for number, item in enumerate(operations) if item[:1] in _PUSHING]
    return generator.choice(pushing)


def _replace_value(operations: list[bytes], snippet: bytes, generator: random.Random) -> bytes:
    position = _value_position(operations, generator)
    return b"".join([*operations[:position], snippet, *operations[position + 1 :]])


def _value(operations: list[bytes], generator: random.Random) -> bytes:
    return _replace_value(operations, value(generator.choice(VALUES)), generator)


def _attack(operations: list[bytes], generator: random.Random) -> bytes:
    return _replace_value(operations, generator.choice(list(SNIPPETS.values())), generator)


def _insert(operations: list[bytes], generator: random.Random) -> bytes:
    position = generator.randrange(1, len(operations))
    snippet = generator.choice(list(SNIPPETS.values()))
    return b"".join([*operations[:position], snippet, *operations[position:]])


def _delete(operations: list[bytes], generator: random.Random) -> bytes:
    position = generator.randrange(len(operations))
    return b"".join(operations[:position] + operations[position + 1 :])


def _repeat(operations: list[bytes], generator: random.Random) -> bytes:
    position = generator.randrange(len(operations))
    return b"".join([*operations[: position + 1], *operations[position:]])


def _swap(operations: list[bytes], generator: random.Random) -> bytes:
    changed = list(operations)
    one, other = (generator.randrange(len(changed)) for _ in range(2))
    changed[one], changed[other] = changed[other], changed[one]
    return b"".join(changed)


def _opcode(operations: list[bytes], generator: random.Random) -> bytes:
    position = generator.randrange(len(operations))
    other = generator.choice(pickletools.opcodes).code.encode("latin-1")
    return b"".join(
        [*operations[:position], other + operations[position][1:], *operations[position + 1 :]]
    )


def _length(operations: list[bytes], generator: random.Random) -> bytes:
    """A text's length of eight bytes."""
    position = _value_position(operations, generator)
    text = b"\x8d" + struct.pack("<Q", generator.choice(LENGTHS)) + b"text"
    return b"".join([*operations[:position], text, *operations[position + 1 :]])


def _bits(operations: list[bytes], generator: random.Random) -> bytes:
    data = bytearray(b"".join(operations))
    for _ in range(generator.randint(1, 4)):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(data)


def _truncate(operations: list[bytes], generator: random.Random) -> bytes:
    data = b"".join(operations)
    return data[: generator.randrange(len(data))]


_KINDS = (
    *(_value, _value, _value, _attack, _insert, _delete, _repeat),
    *(_swap, _opcode, _length, _bits, _truncate),
)
