"""Find the final answer in a response, and decide the easy cases without a mathematics library.

Everything here is linear in the length of its input: responses are written by a policy that is rewarded for them.
"""

import re

MAX_ANSWER_CHARACTERS = 2000
MAX_EXPONENT_DEPTH = 3
MAX_FACTORIALS = 4
MAX_OUTER_BRACES = 4

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE, _BRACE_DEPTH = (
    re.compile(r"\\.|[{}]", re.DOTALL),
    {"{": 1, "}": -1},
)  # an escaped one counts for nothing
_INTEGER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\{([^{}\\]*)\}")
_LETTER = re.compile(r"\(([A-Za-z])\)")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
_AROUND_POWER = re.compile(r" ?(?:\^|\*\*) ?")
_SIZE_OR_SPACE = re.compile(r"\\(?:left|right)(?![A-Za-z])|(?<!\\)\\(?= )")
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
    """What follows the thinking: the text after the last `</think>`; None when a think block was never closed.

    A caller that started the assistant's turn with a prefix such as `<think>` passes prefix and response together.
    """
    text = (
        response[response.rfind(_THINK_CLOSE) + len(_THINK_CLOSE) :]
        if _THINK_CLOSE in response
        else response
    )
    return None if _THINK_OPEN in text else text


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` (or `\fbox{...}`) with balanced braces; None without one, or when it never closes.

    Escaped braces (`\{`) do not count; braces around all of it are dropped.
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
    """Place of the brace that closes the group whose content begins at `start`."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += _BRACE_DEPTH.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def extract_answer(response: str) -> str | None:
    """The final answer of a response: the last boxed text after the thinking. None if there is none, or it is empty."""
    text = visible_text(response)
    return (last_boxed(text) or None) if text is not None else None


def reference_text(answer: str) -> str:
    r"""A reference answer as the data gives it: plain, in `$...$`, or inside `\boxed{}`."""
    return (last_boxed(answer) if _BOXED.search(answer) else None) or answer.strip()


def exponent_depth(text: str) -> int:
    """Height of the tallest tower of powers: `2^3` is 1, `5^5^5` and `5^{5^5}` are 2, `x^2y^3` is 1."""
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
    """Why an answer is not worth parsing ("" if it is): the text's length, towers of powers, repeated factorials."""
    if len(text) > MAX_ANSWER_CHARACTERS:
        return f"answer of {len(text)} characters (at most {MAX_ANSWER_CHARACTERS})"
    if exponent_depth(text) > MAX_EXPONENT_DEPTH:
        return f"powers nested more than {MAX_EXPONENT_DEPTH} deep"
    if text.count("!") > MAX_FACTORIALS:
        return f"more than {MAX_FACTORIALS} factorials"
    return ""


def normalise(text: str) -> str:
    r"""One spelling for equal LaTeX: spaces, `$`, `\left`, `\dfrac`, `\text{...}` around all of it, a final full stop."""
    text = text.strip()
    for spelling, replacement in _EQUAL_SPELLINGS.items():
        text = text.replace(spelling, replacement)
    text = _SIZE_OR_SPACE.sub("", text).strip().removesuffix(".").strip("$").strip()
    if whole := _TEXT.fullmatch(text):
        text = whole.group(1).strip()
    if letter := _LETTER.fullmatch(text):
        text = letter.group(1)
    return _LOOSE_SPACE.sub("", text)


def plain_integer(text: str) -> str | None:
    """Canonical digits of a plain integer ("1,234" -> "1234", "-0" -> "0"), None for anything else."""
    text = text.strip().removesuffix(".").strip("$").replace("\\!", "").replace("{,}", ",").strip()
    if not _INTEGER.fullmatch(text) or not text.isascii():
        return None
    digits = text.lstrip("+-").replace(",", "").lstrip("0")
    return ("-" if text.startswith("-") else "") + digits if digits else "0"


def quick_decision(reference: str, answer: str) -> bool | None:
    """Decide without the library: True for equal spellings, False for two different plain integers, else None."""
    whole_reference, whole_answer = plain_integer(reference), plain_integer(answer)
    if whole_reference is not None and whole_answer is not None:
        return whole_reference == whole_answer
    if (whole_reference is None) != (whole_answer is None) and "," in reference + answer:
        return None  # "1,234" is a number, "1, 234" a list
    return True if normalise(reference) == normalise(answer) else None
