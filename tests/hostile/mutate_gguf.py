"""Hostile GGUF files, made from a good one by mutation of its header."""

import random
import struct
from collections.abc import Iterator

from mutate_data import mutate_bytes

COUNTS = (0, 2, 2**16, 2**20 + 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
HEADER_BYTES = 24  # magic, version, number of tensors, number of settings


def good_gguf() -> bytes:
    """A model without tensors, of two settings: a text, and an array of three bytes."""
    text, array = _string(b"llama"), struct.pack("<IQ3B", 0, 3, 7, 8, 9)
    settings = _string(b"general.architecture") + struct.pack("<I", 8) + text
    settings += _string(b"llama.numbers") + struct.pack("<I", 9) + array
    tensor = _string(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + settings + tensor + bytes(128)


def mutants(good: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (name, file) without end; the first ones set each eight bytes to each count."""
    generator, others = random.Random(seed), mutate_bytes(good, seed)
    places = [8, 16, *range(HEADER_BYTES, len(good) - 128)]
    chosen = [(place, count) for place in places for count in COUNTS]
    generator.shuffle(chosen)
    for place, count in chosen:
        yield f"count-{place}-{count}", good[:place] + struct.pack("<Q", count) + good[place + 8 :]
    yield from others


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text
