r"""Whether two formulas have one value: exactly if both are rational, else by sympy's evaluation.

Variables get four fixed values. The precision grows with the powers and factorials in the formulas,
so that 1 - 1/2030! differs from 1 - 1/2031!.
"""

import re
from functools import lru_cache
from typing import Any

from infir2.verify.notation import ROW
from infir2.verify.numbers import (
    ExactNumber,
    braced_fractions,
    exact_fraction,
    exact_latex,
    is_literal,
    rounds_to,
)

DIGITS = 60
MAX_DIGITS = 20_000
_POINTS = ((0.7310, 1.3173), (-1.2911, 0.6173), (2.1931, -0.5179), (-0.4133, -2.3719))
_LOOSE_SPACE = re.compile(
    r"(?<![0-9A-Za-z,])\s+|(?<=[A-Za-z,])\s+(?=[^\s0-9A-Za-z])|(?<=\d)\s+(?!\w)"
)
_INDEX = re.compile(r"(?<=[\^_])\{(\w)\}(?!\w)")
_UNEVALUATED = re.compile(r"\\(?:int|sum|prod|lim)(?![A-Za-z])")
_TWO_NUMBERS = re.compile(r"(?:^|\W)\d+\s+\d")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")


def squeezed(text: str) -> str:
    r"""One spelling of spaces and braces. `1, 234` keeps its space: it is not `1,234`."""
    return _INDEX.sub(r"\1", _LOOSE_SPACE.sub("", braced_fractions(text)))


def is_integer(text: str) -> bool:
    """Whether a formula is an integer that is written out."""
    value = exact_fraction(text)
    return value is not None and value.denominator == 1 and is_literal(text)


def same_value(reference: str, answer: str) -> bool:
    """Whether two formulas have one value."""
    if squeezed(reference) == squeezed(answer):
        return True
    if set(_UNEVALUATED.findall(answer)) - set(_UNEVALUATED.findall(reference)):
        return False  # it may repeat the question
    numbers = exact_fraction(reference), exact_fraction(answer)
    if None not in numbers:
        return numbers[0] == numbers[1] or rounds_to(reference, answer)
    pairs = values_of(reference, answer)
    return bool(pairs) and all(close(x, y) for x, y in pairs or ())


def values_of(first: str, second: str, variables: bool = False) -> list[tuple[Any, Any]] | None:
    """The values of two formulas at each point; None where one has no value.

    `variables` requires that both have the same, at least one.
    """
    from sympy import Basic

    try:
        a, b = expression(first), expression(second)
        if not (isinstance(a, Basic) and isinstance(b, Basic)):
            return None
        if variables and (not a.free_symbols or a.free_symbols != b.free_symbols):
            return None
        return [(1, 1)] if a == b else _evaluated(a, b)
    except MemoryError:
        raise
    except Exception:  # whatever the parser raises on text that is no formula
        return None


@lru_cache(maxsize=1024)
def expression(text: str) -> Any:
    """The sympy expression of a formula; decimals are exact. Raises on text that is no formula."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import I, Symbol

    exact = exact_latex(text)
    if isinstance(exact, ExactNumber):
        return exact.value
    exact = _DEGREES.sub(r"(\\frac{\1 \\pi}{180})", exact.replace(ROW, r"\\"))
    spelling = NormalizationConfig(
        basic_latex=True,
        units=False,
        malformed_operators=True,
        nits=True,
        boxed="none",
        equations=False,
    )
    reading = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    if r"\text" in exact or _TWO_NUMBERS.search(exact):
        raise ValueError("no formula")
    parsed = latex2sympy(exact, normalization_config=spelling, conversion_config=reading)
    return parsed.subs(Symbol("i"), I) if hasattr(parsed, "subs") else parsed


def _evaluated(a: Any, b: Any) -> list[tuple[Any, Any]] | None:
    """Both expressions at each point."""
    from sympy import Float

    digits = DIGITS + _digits(a) + _digits(b)
    if digits > MAX_DIGITS:
        return None
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    values = []
    for first, step in _POINTS if symbols else _POINTS[:1]:
        point = {
            symbol: Float(first + step * (1 + n) ** 0.5, digits) for n, symbol in enumerate(symbols)
        }
        pair = tuple(each.subs(point).doit().evalf(digits) for each in (a, b))
        if not all(getattr(value, "is_number", False) for value in pair):
            return None
        if not any(value.is_finite is False for value in pair):
            values.append(pair)
        elif pair[0] != pair[1]:
            return None
        elif not symbols:
            return [(1, 1)]
    return values or None


def _digits(expression: Any) -> int:
    """Digits beyond DIGITS that tell the integers, powers and factorials of an expression apart."""
    from sympy import Integer, Pow, factorial, preorder_traversal

    total = 0
    for node in preorder_traversal(expression):
        if isinstance(node, Integer):
            total += int(node.p.bit_length() * 0.302)
        elif isinstance(node, Pow) and node.exp.is_Integer and node.base.is_Integer:
            total += int(abs(int(node.exp)) * int(node.base).bit_length() * 0.302)
        elif isinstance(node, factorial) and node.args[0].is_Integer:
            number = abs(int(node.args[0]))
            total += int(number * number.bit_length() * 0.302)
        if total > MAX_DIGITS:
            break
    return total


def close(x: Any, y: Any) -> bool:
    """Whether two values agree in all but the last digits of their precision."""
    larger = max(abs(x), abs(y))
    if x == y:
        return True
    if x == 0 or y == 0:
        return False
    digits = min((int(v._prec * 0.3) for v in (x, y) if hasattr(v, "_prec")), default=DIGITS)
    return bool(abs(x - y) * 10 ** (max(digits, DIGITS) - DIGITS // 2) <= larger)
