"""Whether a tokenizer needs time in proportion to its text, tried before any row is read.

A regular expression such as `\\p{L}+$` fails at the end of a run of letters, then tries again from
its second letter, and so on: 200,000 letters take minutes, in which the library hears no signal.
Others multiply the text. So runs of the common kinds of characters, and of those that the
tokenizer's own patterns name, are encoded and decoded, each longer than the one before only while
the time grows faster than the text.
"""

import base64
import json
import math
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infir2.data.types import RowError
from infir2.errors import ConfigError

LENGTHS = (8, 64, 512, 4096)  # repetitions
USUAL_LENGTH = 512  # up to which every run is tried
STEEP, VERY_STEEP = 1.25, 4.0  # times the time in proportion to that of a shorter text
# Real tokenizers take 0.2 to 2 microseconds for a character.
BASE_SECONDS, CHARACTER_SECONDS = 0.02, 1e-5
ROW_CHARACTERS, ROW_SECONDS = 2**20, 100.0  # a long row, and its bound if the time is a square
MAX_FRAGMENTS = 1000
MAX_GROWTH = 1000  # real tokenizers replace a character by at most 18
_USUAL = (
    *("a", "A", "é", "я", "字", "あ", "한", "ع", "ก", "1", "_", ".", "-", "(", " ", "\t", "\n"),
    *("\r\n", "😀", "\u0301", "▁", "a ", " a", "a1", "a.", "\n "),
)
_BREAK = "\x01\n\x01"  # what hardly a pattern goes on with
# An escape, the head of a group, or an operator of a regular expression.
_NOT_LITERAL = re.compile(
    r"\\(?:u|x\{?)([0-9a-fA-F]{2,6})\}?|\\[pP]\{\^?\w+\}|\\.|\(\?[\w-]*[:=!<>]+|[()\[\]{}*+?.|^$]"
)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


def check_growth(specification: dict[str, Any], path: Path) -> None:
    """Raise ConfigError if replacements, one after the other, make a text far longer.

    The steps are tried one by one, because 40 that each double a text end the process.
    """
    whole = "".join([*_USUAL, *_fragments(specification)])
    for key in ("normalizer", "decoder"):
        text = whole
        for step in _steps(specification.get(key)):
            text = _apply(key, step, text)
            if len(text) > MAX_GROWTH * len(whole) or _longest_entry(step) > MAX_GROWTH:
                raise ConfigError(
                    f"data.tokenizer: {path}: the replacements of {key} make a text more than "
                    f"{MAX_GROWTH:,} times longer; use another."
                )


def check_speed(use: Callable[[str], object], specification: dict[str, Any], path: Path) -> None:
    """Raise ConfigError if long texts of one kind would take minutes.

    Args:
        use: encodes and decodes a text.
        specification: the content of tokenizer.json.
    """
    fragments = _fragments(specification)
    end = _BREAK + _BREAK.join(fragments) + _BREAK
    for unit in (*_USUAL, *sorted(set(fragments).difference(_USUAL))):
        # Steps back are per repetition, and must stand out from the time per character.
        _check_run(use, unit if len(unit) == 1 else 2 * unit, end, path)


def _check_run(use: Callable[[str], object], unit: str, end: str, path: Path) -> None:
    rate = math.inf  # seconds for a character, so far
    for length in LENGTHS:
        text = unit * length + end + unit * length  # the second run ends the text
        seconds = _seconds(use, text, path)
        if seconds < 1 and (length < USUAL_LENGTH or _is_slow(seconds, rate, text, length)):
            seconds = min(seconds, _seconds(use, text, path))  # the other one was an accident
        if _is_slow(seconds, rate, text, length):
            raise ConfigError(
                f"data.tokenizer: {path} takes {seconds:.2g} s for {len(text):,} characters "
                f"({unit!r} repeated), so that a long row would take minutes; use another."
            )
        if length >= USUAL_LENGTH and seconds < STEEP * rate * len(text):
            return
        rate = min(rate, seconds / len(text))


def _is_slow(seconds: float, rate: float, text: str, length: int) -> bool:
    square = ROW_SECONDS * (len(text) / ROW_CHARACTERS) ** 2
    is_square = seconds > max(VERY_STEEP * rate * len(text), square)
    is_last = length == LENGTHS[-1]
    return (is_last and is_square) or seconds > BASE_SECONDS + CHARACTER_SECONDS * len(text)


def _seconds(use: Callable[[str], object], text: str, path: Path) -> float:
    """Processor time, which does not depend on what else the machine does."""
    started = time.thread_time()
    try:
        use(text)
    except RowError as error:
        raise ConfigError(f"data.tokenizer: {path}: {error}; use another.") from error
    return time.thread_time() - started


def _fragments(specification: dict[str, Any]) -> list[str]:
    """What the patterns of tokenizer.json name: single characters, then short texts."""
    parts = _parts([specification.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")])
    texts = (part.get(key) for part in parts for key in ("Regex", "String"))
    found: set[str] = set()
    for text in texts:
        if isinstance(text, str):
            literal = _NOT_LITERAL.sub(_literal, text).encode(errors="replace").decode()
            found.update(literal, re.findall(r"[^\0]{1,8}", literal))
    return sorted(found - {"\0"}, key=lambda fragment: (len(fragment), fragment))[:MAX_FRAGMENTS]


def _literal(found: re.Match[str]) -> str:
    """The character that an escape stands for; NUL for anything else."""
    if found[1]:
        return chr(min(int(found[1], 16), 0x10FFFF))
    letter = found[0][-1]
    if found[0][0] != "\\" or found[0][1] in "pP":
        return "\0"
    return _ESCAPED.get(letter, "\0") if letter.isalnum() else letter


def _parts(found: list[Any]) -> Iterator[dict[str, Any]]:
    """The JSON objects anywhere in a part of tokenizer.json."""
    while found:
        value = found.pop()
        if isinstance(value, dict):
            yield value
            found += value.values()
        elif isinstance(value, list):
            found += value


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or decoder, in their order."""
    if not isinstance(part, dict):
        return
    members = part.get("normalizers", part.get("decoders"))
    if not isinstance(members, list):
        yield part
        return
    for member in members:
        yield from _steps(member)


def _apply(key: str, step: dict[str, Any], text: str) -> str:
    """The text after one step of the normalizer or of the decoder."""
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, key: step}))
    if key == "normalizer":
        return str(tokenizer.normalizer.normalize_str(text))
    return str(tokenizer.decoder.decode([text]))


def _longest_entry(step: dict[str, Any]) -> int:
    """The longest text in a table of replacements, which no few characters would find.

    The table is in base64: the size of a trie, the trie, and texts that end with NUL.
    """
    try:
        data = base64.b64decode(step["precompiled_charsmap"])
        start = 4 + struct.unpack_from("<I", data)[0]
    except (KeyError, TypeError, ValueError, struct.error):
        return 0
    return max(map(len, data[start:].split(b"\0")))
