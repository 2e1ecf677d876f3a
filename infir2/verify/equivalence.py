r"""Whether two answers are the same mathematical object.

`notation.py` gives both one spelling, `forms.py` finds their structure, which is compared here, and
`values.py` compares the formulas in it. Runs in worker processes only: a hostile formula may cost
any time or memory, and the worker is killed. docs/answers.md has the rules.
"""

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from infir2.verify.forms import (
    Based,
    Bracketed,
    Collection,
    Dotted,
    Equation,
    Form,
    Interval,
    Matrix,
    Quantity,
    Ratio,
    Relation,
    Union,
    Words,
    all_of,
    any_of,
    as_union,
    is_name,
    parse,
)
from infir2.verify.notation import canonical
from infir2.verify.numbers import braced_fractions
from infir2.verify.units import same_unit
from infir2.verify.values import close, is_integer, same_value, squeezed, values_of

MAX_CHARACTERS = 20_000
_CHOICE = re.compile(r"\(?\s*([A-Ja-j])\s*[).:]?(?:\s+.*)?")
_CHOICES = re.compile(r"\(?[A-H]\)?(?:(?:[,; ]|\band\b|\\text\{ ?and ?\})*\(?[A-H](?![a-z])\)?)+")
_MIXED = re.compile(
    r"([+-]?\d+) ?(?:and|\\text\{ ?and ?\}) ?(?:(\d+)/(\d+)|\\frac\{(\d+)\}\{(\d+)\})(?![\d/])"
)
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def prepare() -> None:
    """Import and warm up the parser: its first use builds tables, which takes seconds."""
    assert equivalent("\\frac{1}{2}", "0.5")
    assert equivalent("\\sqrt{8}", "2\\sqrt{2}")


def equivalent(reference: str, answer: str) -> bool:
    r"""Whether two answers (LaTeX or plain, without `\boxed`) are the same mathematical object.

    An integer reference requires a number: like the DeepScaleR grader, this rejects an unevaluated
    arithmetic expression (`3+4` for 7), which may just repeat the question.
    """
    try:
        reference, answer = canonical(reference), canonical(answer)
        if not reference or not answer or len(answer) > MAX_CHARACTERS:
            return False
        if re.fullmatch(r"\(?[A-J]\)?", reference):
            return _same_choice(reference, answer)
        letters = _choices(reference)
        if letters and letters == _choices(answer):
            return True
        return squeezed(reference) == squeezed(answer) or any(
            same(parse(wanted), parse(given))
            for wanted, given in product(_readings(reference), _readings(answer))
        )
    except (ValueError, RecursionError):  # nested too deep
        return False


def _same_choice(reference: str, answer: str) -> bool:
    letter = reference.strip("()")
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer).strip()
    plain = plain.removeprefix("option ").removeprefix("Option ")
    found = _CHOICE.fullmatch(plain)
    if found is None or (found[1].islower() and len(plain.strip("().")) > 1):
        return False
    if " " in plain and not re.match(r"\(?[A-J]\s*[).:]", plain):
        return False
    return found[1].upper() == letter


def _choices(text: str) -> list[str]:
    """The letters of several choices, `ACD` or `A, C and D`; none for other text."""
    letters = re.findall("[A-H]", text) if _CHOICES.fullmatch(text) else []
    return letters if letters == sorted(set(letters)) else []


def _readings(text: str) -> set[str]:
    """The answer as it stands, and `3 and 1/7` as the mixed number, which may also be a list."""
    found = _MIXED.match(braced_fractions(text))
    top, bottom = (found[2] or found[4], found[3] or found[5]) if found else ("1", "1")
    if found is None or int(top) >= int(bottom):
        return {text}
    return {text, rf"{found[1]}\frac{{{top}}}{{{bottom}}}{found.string[found.end() :]}"}


def same(reference: Form, answer: Form) -> bool:
    """Whether two parsed answers agree."""
    if isinstance(reference, Equation) or isinstance(answer, Equation):
        return _same_equation(reference, answer)
    for form, other in ((reference, answer), (answer, reference)):
        if (conditions := _conditions(form)) and isinstance(as_union(other), Union):
            return any(same(condition, as_union(other) or other) for condition in conditions)
    sets = as_union(reference), as_union(answer)
    points = isinstance(reference, Bracketed) and isinstance(answer, Bracketed)
    if sets[0] is not None and sets[1] is not None and not points:
        return _same_union(sets[0], sets[1])
    if isinstance(answer, Collection) and answer.braces and len(answer.items) == 1:
        answer = answer.items[0]
    if isinstance(reference, Collection) and reference.braces and len(reference.items) == 1:
        reference = reference.items[0]
    if isinstance(reference, Collection | Bracketed) or isinstance(answer, Collection | Bracketed):
        return _same_items(reference, answer)
    return (
        _same_unlike(reference, answer)
        or _same_unlike(answer, reference)
        or (type(reference) is type(answer) and _same_kind(reference, answer))
    )


def _same_unlike(form: Form, other: Form) -> bool:
    """Whether a ratio, a time or digits in a base agree with an answer of another form."""
    if isinstance(form, Ratio) and isinstance(other, Words):  # 18:30 is 6:30 p.m.
        return ":".join(form.parts).zfill(len(other.text)) == other.text
    if isinstance(form, Ratio) and isinstance(other, Quantity):
        quotient = rf"\frac{{{form.parts[0]}}}{{{form.parts[1]}}}"
        return len(form.parts) == 2 and same_value(quotient, other.text)
    if isinstance(form, Based) and isinstance(other, Quantity):
        return not form.prefixed and form.digits == other.text
    return False


def _conditions(form: Form) -> list[Form]:
    """`x < 1, x > 3` as a union, and as what both conditions leave; empty for another list."""
    items = list(form.items) if isinstance(form, Collection) and not form.braces else []
    unions = [item for item in items if isinstance(item, Union)]
    if len(unions) < len(items) or len({union.variable for union in unions}) != 1:
        return []
    return [any_of(unions), all_of(unions)]


def _same_kind(reference: Any, answer: Any) -> bool:
    match reference:
        case Quantity():
            return _same_quantity(reference, answer)
        case Matrix():
            return len(reference.rows) == len(answer.rows) and all(
                map(_pairwise, reference.rows, answer.rows)
            )
        case Relation():
            return _same_relation(reference, answer)
        case Ratio():
            return len(reference.parts) == len(answer.parts) and all(
                map(same_value, reference.parts, answer.parts)
            )
        case Words() | Dotted() | Based():
            return bool(reference == answer)
    raise AssertionError(type(reference))


def _same_quantity(reference: Quantity, answer: Quantity) -> bool:
    if not same_unit(reference.unit, answer.unit):
        return False
    if reference.percent != answer.percent:  # 35 % is 0.35, or 35 if the question asks for percent
        part, other = (answer, reference) if answer.percent else (reference, answer)
        if same_value(rf"\frac{{{part.text}}}{{100}}", other.text):
            return True
    if "." not in reference.text and is_integer(reference.text) and not is_integer(answer.text):
        return False  # 3+4 for 7
    return same_value(reference.text, answer.text)


def _same_equation(reference: Form, answer: Form) -> bool:
    for form in (reference, answer):
        if isinstance(form, Equation) and not all(map(_repeats(form), form.middle)):
            return False
    if isinstance(reference, Equation) and isinstance(answer, Equation):
        if squeezed(reference.left) == squeezed(answer.left):
            return same(reference.right, answer.right)
        if {reference.left, answer.left} == {"y", "f(x)"}:
            return same(reference.right, answer.right)
        zeros = [rf"{form.left}-({form.right_text})" for form in (reference, answer)]
        return _ratio(*zeros) is not None
    if isinstance(reference, Equation):
        return is_name(reference.left) and same(reference.right, answer)
    assert isinstance(answer, Equation)
    return is_name(answer.left) and same(reference, answer.right)


def _repeats(equation: Equation) -> Any:
    """Whether the middle of a chain such as `x = 14/4 = 7/2` is a name or the final value."""
    return lambda middle: is_name(middle) or same_value(middle, equation.right_text)


def _same_relation(reference: Relation, answer: Relation) -> bool:
    differences = [f"{relation.left}-({relation.right})" for relation in (reference, answer)]
    ratio = _ratio(*differences)
    flipped = _FLIPPED.get(reference.sign, reference.sign)
    return ratio is not None and answer.sign == (reference.sign if ratio > 0 else flipped)


def _ratio(first: str, second: str) -> Any | None:
    """The constant ratio of two formulas with variables, None if there is none."""
    pairs = values_of(first, second, variables=True) or []
    if not pairs or any(0 in pair for pair in pairs):
        return None
    ratios = [x / y for x, y in pairs]
    return ratios[0] if all(close(ratio, ratios[0]) for ratio in ratios) else None


def _same_items(reference: Form, answer: Form) -> bool:
    if isinstance(reference, Bracketed) and isinstance(answer, Bracketed):
        brackets = [form.opening + form.closing for form in (reference, answer)]
        return brackets[0] == brackets[1] and _pairwise(reference.items, answer.items)
    if not isinstance(answer, Collection) or len(answer.items) < 2:
        return False
    names = _names(answer.items)
    if isinstance(reference, Bracketed):
        in_order = not answer.braces and names == sorted(names)
        return in_order and _pairwise(reference.items, answer.items)
    if not isinstance(reference, Collection):
        return False
    one_named = bool(names) != bool(_names(reference.items))
    if one_named and len({name[0] for name in names + _names(reference.items)}) > 1:
        return _pairwise(reference.items, answer.items)  # x = 2, y = 4 is not 4, 2
    return _matched(reference.items, answer.items, same)


def _names(items: Sequence[Form]) -> list[str]:
    return [item.left for item in items if isinstance(item, Equation)]


def _pairwise(first: Sequence[Form], second: Sequence[Form]) -> bool:
    return len(first) == len(second) and all(map(same, first, second))


def _matched(first: Sequence[Any], second: Sequence[Any], agree: Any) -> bool:
    """Whether each item of one list has its own equal item in the other, in any order."""
    left = list(second)
    if len(first) != len(left):
        return False
    for item in first:
        index = next((i for i, other in enumerate(left) if agree(item, other)), None)
        if index is None:
            return False
        del left[index]
    return True


def _same_union(reference: Union, answer: Union) -> bool:
    if reference.variable and answer.variable and reference.variable != answer.variable:
        return False
    return _matched(reference.intervals, answer.intervals, _same_interval)


def _same_interval(a: Interval, b: Interval) -> bool:
    open_ends = (a.low_open, a.high_open) == (b.low_open, b.high_open)
    return open_ends and same_value(a.low, b.low) and same_value(a.high, b.high)
