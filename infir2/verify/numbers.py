r"""Exact values of numbers: decimals, repeating decimals, scientific notation, mixed numbers."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

MAX_POWER_OF_TEN = 5000
MIN_ROUNDED_DIGITS = 6  # decimals from which a rounded value stands for an exact one

_SIGN = r"(?P<sign>[+-]?)\s*"
_POWER = (
    r"(?:\s*(?:(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*(?P<power>[+-]?\d+)\s*\}?"
    r"|[eE]\s*(?P<e>[+-]?\d+)))?"
)
_POWER_OF_TEN = re.compile(r"10\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|(\d))")
_DECIMAL = re.compile(_SIGN + r"(?P<whole>\d*)(?:\.(?P<part>\d*))?" + _POWER)
_REPEATING = re.compile(
    _SIGN + r"(?P<whole>\d*)\.(?P<part>\d*)(?:"
    r"\\(?:overline|bar|dot|overset\{\\cdot\})\s*\{?(?P<line>\d+)\}?|\((?P<round>\d+)\))"
)
_DOT = r"\\dot\s*\{?\s*(\d)\s*\}?\s*"
_DOTTED_ENDS = re.compile(rf"([+-]?\s*\d*\.\d*){_DOT}(\d*)\s*{_DOT}")
_DOTS = re.compile(
    _SIGN + r"(?P<whole>\d*)\.(?P<part>\d*?)(?P<period>\d{1,6}?)(?P=period)+(?P<rest>\d*) *\\ldots"
)
MAX_DOTS_CHARACTERS = 60
_TOP_BOTTOM = r"\\frac\s*\{{\s*({sign}\d+)\s*\}}\s*\{{\s*({sign}\d+)\s*\}}"
_MIXED = re.compile(
    _SIGN + rf"(?P<whole>\d+)\s*(?:{_TOP_BOTTOM.format(sign='')}|[ +](\d+)\s*/\s*(\d+))"
)
_FRACTION = re.compile(_SIGN + rf"(?:{_TOP_BOTTOM.format(sign='[+-]?')}|(\d+)\s*/\s*(\d+))")
_GROUPS = re.compile(r"[+-]?\d{1,3}(?:([, ])\d{3})(?:\1\d{3})*(?:\.\d+)?")
_SHORT_FRACTION = re.compile(
    r"(\\frac|\\binom)\s*(?:(\d)\s*(\d)|(\d)\s*(?=\{)|(\{[^{}]*\})\s*(\d))"
)
_ROOT_OF_FRACTION = re.compile(r"\\sqrt\s*(\\frac\{[^{}]*\}\{[^{}]*\})")
_INNER_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_INNER_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)")


@dataclass(frozen=True)
class ExactNumber:
    """A rational number, as sympy has it."""

    value: Any


def exact_latex(text: str) -> ExactNumber | str:
    """The number that `text` spells, or `text` with its decimals as fractions."""
    text = _ROOT_OF_FRACTION.sub(r"\\sqrt{\1}", braced_fractions(text.strip()))
    value = exact_fraction(text)
    if value is not None:
        from sympy import Rational

        return ExactNumber(Rational(value.numerator, value.denominator))
    return _INNER_DECIMAL.sub(_decimal_latex, _INNER_COMMA.sub("", text))


def _decimal_latex(found: re.Match[str]) -> str:
    top = (found[1] + found[2]).lstrip("0") or "0"
    return rf"{{\frac{{{top}}}{{{10 ** len(found[2])}}}}}"


def exact_fraction(text: str) -> Fraction | None:
    """The rational number that a text spells, None for anything else."""
    text = braced_fractions(text.strip()).replace("\\,", "")
    if _GROUPS.fullmatch(text):
        text = re.sub("[, ]", "", text)
    text = _DOTTED_ENDS.sub(r"\1\\overline{\2\3\4}", text)
    if found := _REPEATING.fullmatch(text):
        return _repeating(found)
    if len(text) <= MAX_DOTS_CHARACTERS and (found := _DOTS.fullmatch(text)):
        return _repeating(found)
    if found := _POWER_OF_TEN.fullmatch(text):
        return Fraction(10) ** int(found[1] or found[2])
    if (found := _DECIMAL.fullmatch(text)) and (found["whole"] or found["part"]):
        return _decimal(found)
    if found := _MIXED.fullmatch(text):
        top, bottom = int(found[3] or found[5]), int(found[4] or found[6])
        return _signed(found, int(found["whole"]) + Fraction(top, bottom)) if bottom else None
    if found := _FRACTION.fullmatch(text):
        top, bottom = int(found[2] or found[4]), int(found[3] or found[5])
        return _signed(found, Fraction(top, bottom)) if bottom else None
    return None


def braced_fractions(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`."""

    def braced(found: re.Match[str]) -> str:
        if found[2]:
            return rf"{found[1]}{{{found[2]}}}{{{found[3]}}}"
        rest = f"{{{found[4]}}}" if found[4] else f"{found[5]}{{{found[6]}}}"
        return found[1] + rest

    return _SHORT_FRACTION.sub(braced, text)


def is_literal(text: str) -> bool:
    """Whether a text is a number that is written out: no quotient, no power, no sum."""
    plain = braced_fractions(text.strip())
    return exact_fraction(plain) is not None and not _FRACTION.fullmatch(plain)


def rounds_to(reference: str, answer: str) -> bool:
    """Whether one is a fraction and the other its value rounded to at least six decimals."""
    exact, rounded = exact_fraction(reference), exact_fraction(answer)
    for value, other, text in ((exact, rounded, answer), (rounded, exact, reference)):
        found = _DECIMAL.fullmatch(text.strip())
        if value is None or other is None or found is None or found["power"] or found["e"]:
            continue
        digits = len(found["part"] or "")
        terminating = _is_terminating(value)
        if (
            digits >= MIN_ROUNDED_DIGITS
            and not terminating
            and abs(value - other) <= Fraction(1, 10**digits)
        ):
            return True
    return False


def _is_terminating(value: Fraction) -> bool:
    bottom = value.denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    return bottom == 1


def _signed(found: re.Match[str], value: Fraction) -> Fraction:
    return -value if found["sign"] == "-" else value


def _decimal(found: re.Match[str]) -> Fraction | None:
    part = found["part"] or ""
    digits = found["power"] or found["e"] or "0"
    if len(digits) > 6 or len(found["whole"]) + len(part) > MAX_POWER_OF_TEN // 2:
        return None
    power = int(digits)
    if abs(power) > MAX_POWER_OF_TEN:
        return None
    return _signed(
        found, Fraction(int((found["whole"] + part) or "0")) * Fraction(10) ** (power - len(part))
    )


def _repeating(found: re.Match[str]) -> Fraction | None:
    groups = found.groupdict()
    period = groups.get("line") or groups.get("round") or groups.get("period") or ""
    rest = groups.get("rest")
    if rest and not period.startswith(rest):
        return None
    part, whole = found["part"], found["whole"] or "0"
    fixed = Fraction(int(whole + part), 10 ** len(part))
    return _signed(found, fixed + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(part)))
