"""Find the final answer in a response, and decide the easy cases without a mathematics library.

All functions run in linear time, because a policy that is rewarded for its responses writes them.
"""

import re
from typing import Literal, NamedTuple

AnswerFormat = Literal["boxed", "answer_line"]

MAX_ANSWER_CHARACTERS = 2000
MAX_EXPONENT_DEPTH = 3
MAX_FACTORIALS = 4
MAX_UNBALANCED_SIZES = 3
MAX_OUTER_BRACES = 4

_NO_DELIMITER = re.compile(r"\\(?:left|right)\s*\.")

# How JSON, Python, pandas and spreadsheets write a value that is missing or overflowed.
_NO_LABEL = ("", "nan", "null", "none", "nil", "inf", "infinity", "nat", "<na>", "n/a", "#n/a")

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Matching escaped characters too keeps `\{` from counting as a brace.
_BRACE, _BRACE_DEPTH = re.compile(r"\\.|[{}]", re.DOTALL), {"{": 1, "}": -1}
_ANSWER_LINE = re.compile(r"^[ \t>*#_]*(?:Final )?Answer[*_ ]*:[ \t*_]*", re.MULTILINE)
_INTEGER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\{([^{}\\]*)\}")
_LETTER = re.compile(r"\(([A-Za-z])\)")
# The space in "1, 234" stays: without it, this list is a number.
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z])(?<!\d,)\s+|\s+(?![0-9A-Za-z])")
_AROUND_POWER = re.compile(r" ?(?:\^|\*\*) ?")
_SIZE_OR_SPACE = re.compile(r"\\(?:left|right)\s*(?=[^\w\s])|(?<!\\)\\(?= )")
_EQUAL_SPELLINGS = {
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\!": "",
    "{,}": ",",
    "\\,": " ",
    "\\;": " ",
    "~": " ",
    "−": "-",
}


def visible_text(response: str) -> str | None:
    """The text after the last `</think>`; None if a think block was never closed.

    A caller that starts the assistant's turn with a prefix such as `<think>` must pass the prefix
    and the response together.
    """
    text = response.rpartition(_THINK_CLOSE)[2]
    return None if _THINK_OPEN in text else text


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}`; None if there is none or it never closes.

    Escaped braces (`\{`) are ignored; braces around the entire content are removed.
    """
    start = max((found.end() for found in _BOXED.finditer(text)), default=None)
    end = _closing_brace(text, start) if start is not None else None
    if end is None:
        return None
    content = text[start:end].strip()
    for _ in range(MAX_OUTER_BRACES):
        if not content.startswith("{") or _closing_brace(content, 1) != len(content) - 1:
            break
        content = content[1:-1].strip()
    return content


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the group whose content starts at `start`."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += _BRACE_DEPTH.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


class AnswerLine(NamedTuple):
    """A line `Answer: 34`: content "34", and the position in the text after it."""

    content: str
    end: int


def last_answer_line(text: str) -> AnswerLine | None:
    """The last line `Answer: ...` without Markdown, or the box in it; None if there is none."""
    found = max(_ANSWER_LINE.finditer(text), key=re.Match.start, default=None)
    if found is None:
        return None
    line = text[found.end() :].partition("\n")[0]
    content = (last_boxed(line) or "") if _BOXED.search(line) else line.strip().rstrip("*_ ")
    return AnswerLine(content, found.end() + len(line))


def extract_answer(response: str, answer_format: AnswerFormat = "boxed") -> str | None:
    """The final answer after the thinking; None if it is absent or empty.

    boxed: the last boxed text. answer_line: the last line `Answer: ...`, or a box that follows it.
    """
    text = visible_text(response)
    if text is None:
        return None
    line = last_answer_line(text) if answer_format == "answer_line" else None
    if line is not None and not _BOXED.search(text, line.end):
        return line.content or None
    return last_boxed(text) or None


def reference_text(answer: str) -> str:
    r"""The text of a reference answer, which may be plain, in `$...$`, or inside `\boxed{}`."""
    return (last_boxed(answer) if _BOXED.search(answer) else None) or answer.strip()


def is_missing_label(answer: str) -> bool:
    """Whether a reference answer stands for a missing value, as `NaN`, `null` and `-inf` do."""
    text = reference_text(answer).strip("$ .").removeprefix(r"\text{").removesuffix("}").strip()
    return text.lower().lstrip("+-") in _NO_LABEL


def exponent_depth(text: str) -> int:
    """Height of the tallest tower of powers: 1 in `2^3` and `x^2y^3`, 2 in `5^5^5`, `5^{5^5}`."""
    deepest, depth, previous = 0, 0, ""
    enclosing: list[int] = []
    for character in _AROUND_POWER.sub("^", " ".join(text.split())):
        if character == "^":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "{([":
            enclosing.append(depth)
        elif character in "})]":
            depth = enclosing.pop() if enclosing else 0
        elif previous != "^" and not (character.isdigit() and previous.isdigit()):
            depth = enclosing[-1] if enclosing else 0
        previous = character
    return deepest


def too_hard(text: str) -> str:
    """Why an answer is too expensive to parse ("" if it is not): length, powers, sizes."""
    if len(text) > MAX_ANSWER_CHARACTERS:
        return f"answer of {len(text)} characters (at most {MAX_ANSWER_CHARACTERS})"
    if exponent_depth(text) > MAX_EXPONENT_DEPTH:
        return f"powers nested more than {MAX_EXPONENT_DEPTH} deep"
    num_open = text.count("\\left") - text.count("\\right")
    if abs(num_open) > MAX_UNBALANCED_SIZES or (num_open and _NO_DELIMITER.search(text)):
        return "\\left without \\right"
    if text.count("!") > MAX_FACTORIALS:
        return f"more than {MAX_FACTORIALS} factorials"
    return ""


def normalize(text: str) -> str:
    r"""One spelling for equal LaTeX.

    Unifies spaces, `$`, `\left`, `\dfrac`, `\text{...}` around the entire text and a final period.
    """
    text = text.strip()
    for spelling, replacement in _EQUAL_SPELLINGS.items():
        text = text.replace(spelling, replacement)
    text = _SIZE_OR_SPACE.sub("", text).strip().removesuffix(".").strip("$").strip()
    if wrapped := _TEXT.fullmatch(text):
        text = wrapped.group(1).strip()
    if letter := _LETTER.fullmatch(text):
        text = letter.group(1)
    return _LOOSE_SPACE.sub("", text)


def plain_integer(text: str) -> str | None:
    """Canonical digits of a plain integer ("1,234" -> "1234", "-0" -> "0"), None for other text."""
    text = text.strip().removesuffix(".").strip("$").replace("\\!", "").replace("{,}", ",").strip()
    if not _INTEGER.fullmatch(text) or not text.isascii():
        return None
    digits = text.lstrip("+-").replace(",", "").lstrip("0")
    return ("-" if text.startswith("-") else "") + digits if digits else "0"


def quick_decision(reference: str, answer: str) -> bool | None:
    """True for equal spellings, False for two different plain integers, else None."""
    reference_digits, answer_digits = plain_integer(reference), plain_integer(answer)
    if reference_digits is not None and answer_digits is not None:
        return reference_digits == answer_digits
    if (reference_digits is None) != (answer_digits is None) and "," in reference + answer:
        return None  # "1,234" is a number, "1, 234" a list
    spelling = normalize(reference)
    return True if spelling and spelling == normalize(answer) else None
