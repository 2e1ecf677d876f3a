"""Hostile recipes and files of data, made from good ones by mutation.

for name, data in itertools.islice(mutate_recipe(good, seed=0), 200): ...

Every function yields the same endless sequence for the same file and seed.
"""

import gzip
import random
import re
import struct
from collections.abc import Callable, Iterator, Sequence

Mutants = Iterator[tuple[str, bytes]]
INTEGERS = (0, 1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
TOML_VALUES = (
    *("", "[", "]", "{}", "[]", "true", "nan", "-inf", "1e999", "''", "'\x7f'", "1979-05-27", "0x"),
    *("9" * 30, "9" * 6000, "0x" + "F" * 6000, "[" * 3000, "[" * 12 + "]" * 12, "{a = " * 400),
    *('"' + "x" * 100_000 + '"', '"a\\u0000b"', '"\\ud800"', "'/dev/zero'", "'../../..'", "'.'"),
    *("-1", "0", "1", "9223372036854775807", "-9223372036854775808", "[1, 'a', {b = 2}]", "'''"),
)
TOML_LINES = (
    *("extends = 'recipe.toml'", "extends = '/dev/zero'", "extends = '.'", "[[data.sources]]"),
    *(
        "a." * 60_000 + "b = 1",
        "[" + "a." * 60_000 + "b]",
        "[data.sources.7]",
        "\0",
        "\ufeff",
        "==",
    ),
    *(
        "k" * 100_000 + " = 1",
        "x = {" + "'a'." * 9000 + "b = 1}",
        "[data.sources." + "9" * 5000 + "]",
    ),
)
JSON_VALUES = (
    *(
        "null",
        "true",
        "-0",
        "1e999",
        "NaN",
        "-Infinity",
        "[]",
        "{}",
        '""',
        '"\\ud800"',
        '"a\\u0000b"',
    ),
    *("9" * 6000, "[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 3000),
    '"' + "x" * 100_000 + '"',
    *('[{"role": "user"}]', '[["user", "a"]]', '{"role": "user", "content": {}}', "\0", "'a'", '"'),
)
JSON_FILES = (
    *(
        b"[",
        b"]",
        b"[]",
        b"[[[",
        b"{\n",
        b"{\n}\n" * 99,
        b"[" * 100_000,
        b"\\" * 100_000,
        b'"' * 99_999,
    ),
    *(b"[" + b"\\" * 100_001 + b'"]', b"\n" * 100_000, b" \n" * 9999, b"\r" * 9999, b"\0" * 9999),
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\x1f\x8b\x08",
        b"\x28\xb5\x2f\xfd",
        gzip.compress(b"\0" * 10**6),
    ),
    *(b"[" + b"1," * 50_000 + b"1]", b'["' + b"\\n" * 50_000 + b'"]'),
)


def mutate_bytes(good: bytes, seed: int) -> Mutants:
    """Flip bits, overwrite integers, cut, repeat and insert; of no format in particular."""
    chance = random.Random(seed)
    changes: Sequence[Callable[[bytearray, int], None]] = (
        lambda data, at: data.__setitem__(at, data[at] ^ 1 << chance.randrange(8)),
        lambda data, at: data.__setitem__(at, chance.randrange(256)),
        lambda data, at: data.__delitem__(slice(at, None)),
        lambda data, at: data.__delitem__(slice(at, at + chance.randrange(1, 64))),
        lambda data, at: data.__setitem__(slice(at, at), data[at : at + chance.randrange(1, 200)]),
        lambda data, at: data.__setitem__(slice(at, at), chance.randbytes(chance.randrange(1, 9))),
        lambda data, at: data.__setitem__(slice(at, at + 8), _integer(chance, "<Q")),
        lambda data, at: data.__setitem__(slice(at, at + 4), _integer(chance, "<I")),
        lambda data, at: data.__setitem__(slice(at, at + 16), b"\xff" * 16),
        lambda data, at: data.__setitem__(slice(at, at + 16), bytes(16)),
    )
    number = 0
    while True:
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            if data:
                chance.choice(changes)(data, chance.randrange(len(data)))
        number += 1
        yield f"bytes-{number}", bytes(data)


def mutate_recipe(good: bytes, seed: int) -> Mutants:
    """TOML in which values and lines are replaced, and bytes."""
    chance, others = random.Random(seed), mutate_bytes(good, seed)
    while True:
        lines = good.decode().splitlines()
        at = chance.randrange(len(lines))
        value = chance.choice(TOML_VALUES)
        lines[at] = re.sub(r"=.*", lambda _, value=value: f"= {value}", lines[at])  # type: ignore[misc]
        yield f"line-{at}-{value[:20]!r}", "\n".join(lines).encode("utf-8", "surrogatepass")
        line = chance.choice(TOML_LINES)
        lines = good.decode().splitlines()
        lines.insert(chance.randrange(len(lines) + 1), line)
        yield f"insert-{line[:20]!r}", "\n".join(lines).encode()
        yield next(others)


def mutate_json(good: bytes, seed: int) -> Mutants:
    """JSON text in which values are replaced, and other files."""
    chance, others = random.Random(seed), mutate_bytes(good, seed)
    values = list(re.finditer(rb'"(?:[^"\\]|\\.)*"|\d+|\[|\{', good))
    while True:
        match, value = chance.choice(values), chance.choice(JSON_VALUES).encode()
        yield f"value-{value[:20]!r}", good[: match.start()] + value + good[match.end() :]
        other = chance.choice(JSON_FILES)
        yield f"begin-{other[:20]!r}", other + chance.choice((b"", b"\n")) + good
        yield f"end-{other[:20]!r}", good + other
        yield next(others)


def mutate_parquet(good: bytes, seed: int) -> Mutants:
    """Parquet whose footer (metadata in Thrift), pages or last eight bytes are damaged."""
    chance = random.Random(seed)
    size = int.from_bytes(good[-8:-4], "little")
    pages, footer, end = good[: -8 - size], good[-8 - size : -8], good[-8:]
    of_footer, of_pages = mutate_bytes(footer, seed), mutate_bytes(pages, seed)
    while True:
        name, data = next(of_footer)
        yield f"footer-{name}", pages + data + len(data).to_bytes(4, "little") + b"PAR1"
        name, data = next(of_pages)
        yield f"pages-{name}", data[: len(pages)].ljust(len(pages), b"\0") + footer + end
        yield "length", good[:-8] + _integer(chance, "<I") + b"PAR1"
        yield "cut", good[: chance.randrange(len(good))]


def mutate_index(good: bytes, seed: int) -> Mutants:
    """A Megatron index whose numbers are replaced, and bytes."""
    chance, others = random.Random(seed), mutate_bytes(good, seed)
    header = (9, 17, 18, 26)  # version, dtype, sequences, bounds
    while True:
        data = bytearray(good)
        at = chance.choice(header)
        data[at : at + (1 if at == 17 else 8)] = _integer(chance, "<Q")[: 1 if at == 17 else 8]
        yield f"header-{at}", bytes(data)
        data = bytearray(good)
        at = chance.randrange(34, len(good) - 8)
        data[at : at + 8] = _integer(chance, "<Q")
        yield f"offset-{at}", bytes(data)
        yield next(others)


def _integer(chance: random.Random, form: str) -> bytes:
    size = struct.calcsize(form)
    return (chance.choice(INTEGERS) & (1 << 8 * size) - 1).to_bytes(size, "little")
