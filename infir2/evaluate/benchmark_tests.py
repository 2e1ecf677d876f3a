"""The tests of LiveCodeBench's problems: decoded without running what they contain.

Private tests are JSON, or base64 of zlib of JSON, or base64 of zlib of a pickled text of JSON.
Unpickling runs what a pickle names; `read_pickle` knows no class.
"""

import base64
import binascii
import json
import zlib
from typing import Any

from infir2.errors import first_line
from infir2.pickles import read_pickle

# The largest of LiveCodeBench v6 unpacks to about 90 MB; only a file made to fill memory has more.
MAX_TEST_BYTES = 1 << 28


def decode_tests(value: Any) -> list[dict[str, str]]:
    """[{"input", "output", "testtype"}, ...] of `public_test_cases` or `private_test_cases`.

    `value` is the list itself or a text in one of the three encodings. Raises ValueError; its text
    continues a sentence: "asks for 'os.system', which no such file needs".
    """
    if isinstance(value, str):
        value = _parse(value) if value.lstrip()[:1] in ("[", "") else _parse(_unpacked(value))
    if not isinstance(value, list):
        raise ValueError("is no list of tests")
    return [_checked(test, number) for number, test in enumerate(value, 1)]


def _unpacked(text: str) -> Any:
    try:
        packed = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is neither JSON nor base64") from None
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(packed, MAX_TEST_BYTES)
    except zlib.error as error:
        raise ValueError(f"is not zlib data after base64 ({first_line(error)})") from None
    if unpacker.unconsumed_tail:
        raise ValueError(f"unpacks to more than {MAX_TEST_BYTES:,} bytes")
    if not unpacker.eof:
        raise ValueError("is cut off")
    if data[:1] == b"\x80":  # no JSON begins so
        return read_pickle(data)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("unpacks to neither JSON nor a pickled text") from None


def _parse(text: Any) -> Any:
    """The value of JSON text; a pickle may also have the list itself."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({first_line(error)})") from None


def _checked(test: Any, number: int) -> dict[str, str]:
    texts = [test.get(key) for key in ("input", "output")] if isinstance(test, dict) else []
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"has a test without the texts `input` and `output` (test {number})")
    kind = test.get("testtype", "stdin")
    if kind not in ("stdin", "functional"):
        raise ValueError(f"has a test of the unknown type {str(kind)[:40]!r} (test {number})")
    return {"input": texts[0], "output": texts[1], "testtype": kind}
