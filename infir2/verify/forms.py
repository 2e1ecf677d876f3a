r"""The structure of an answer: number with a unit, list, interval, equation, matrix, words.

`parse(canonical("x<4"))` is a `Union` of one `Interval` from `-\infty` to `4`. Leaves stay LaTeX
text, which `equivalence.py` compares.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from infir2.verify.moments import moment
from infir2.verify.notation import ROW, closing, split_top, without_braces
from infir2.verify.numbers import exact_fraction
from infir2.verify.numerals import digits_of_english
from infir2.verify.units import split_unit


@dataclass(frozen=True)
class Quantity:
    r"""One value. Examples: `12 cm` is `Quantity("12", unit="cm")`, `35\%` has percent=True."""

    text: str
    unit: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Equation:
    """`left = right`, or a chain: `x = a = b` has `a` in `middle`."""

    left: str
    right: "Form"
    right_text: str
    middle: tuple[str, ...] = ()


@dataclass(frozen=True)
class Relation:
    r"""An inequality of several variables: `x + y < 3` is `Relation("<", "x + y", "3")`."""

    sign: str
    left: str
    right: str


@dataclass(frozen=True)
class Bracketed:
    """A tuple, a point or an interval: `(1, 2]` is `Bracketed("(", "]", (1, 2))`."""

    opening: str
    closing: str
    items: "tuple[Form, ...]"


@dataclass(frozen=True)
class Collection:
    """Values in any order: a list without brackets, or a set in braces."""

    items: "tuple[Form, ...]"
    braces: bool = False


@dataclass(frozen=True)
class Interval:
    low: str
    high: str
    low_open: bool = True
    high_open: bool = True


@dataclass(frozen=True)
class Union:
    intervals: tuple[Interval, ...]
    variable: str = ""


@dataclass(frozen=True)
class Matrix:
    rows: "tuple[tuple[Form, ...], ...]"


@dataclass(frozen=True)
class Dotted:
    """A sequence with dots; its terms must be spelled alike."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """`3:4`, or a time of day."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Based:
    """Digits in a base: `1011_2`, or with a prefix `0b1011`."""

    digits: str
    base: str
    prefixed: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Words:
    text: str


Form = (
    Quantity | Equation | Relation | Bracketed | Collection | Union | Matrix | Dotted
    | Ratio | Based | Words
)  # fmt: skip

INFINITY = r"\infty"
_NAME = r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{\w+\}))?'*"
_LABEL = (
    rf"(?:{_NAME}|m?\\(?:angle|triangle|overline|vec) ?(?:[A-Za-z]{{1,4}}|\{{[A-Za-z]{{1,4}}\}})"
    rf"|\|(?:[A-Za-wz]|[A-Za-z]{{2}})\||[A-Za-z]+(?:\^\{{-1\}})?(?:\([^()=]*\))?|\\text\{{[^{{}}]*\}}|{_NAME}\([^()=]*\)"
    rf"|\\frac\{{[A-Za-z]+\}}\{{[A-Za-z]+\}}|\({_NAME}(?:, ?{_NAME})+\))"
)
MAX_NAME_CHARACTERS = 40
_NAMES = re.compile(rf"{_LABEL}(?: ?[+-]? ?{_LABEL}){{0,3}}")
_VARIABLE = re.compile(_NAME)
_SIGNS = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|<|>")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_MATRIX_NAME = r"\{(?:[pb]?matrix|smallmatrix|array)\}"
_MATRIX = re.compile(
    rf"(?:[(\[]\s*)?\\begin{_MATRIX_NAME}(?:\{{[^}}]*\}})?(.*?)\\end{_MATRIX_NAME}\s*[)\]]?"
)
_POINT = re.compile(r"[ABD-Z]'?(?=\()")
_AND = re.compile(r",?\s*(?:\\text\{\s*,?\s*and\s*\}|\band\b)\s*")
_WITHOUT = re.compile(r"\\mathbb\{R\} ?(?:\\(?:setminus|backslash) ?|-)\\\{([^,{}|]+)\\\}")
_OR = re.compile(r",?\s*(?:\\text\{\s*,?\s*or\s*\}|\bor\b)\s*")
_THOUSANDS = re.compile(r"(?:\\?\$ ?)?[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:\D.*)?")
_BASED = re.compile(
    r"\(?([0-9A-F]+|[a-f]*\d[\da-f]*)\)?_(?:\{\(?(\d+)\)?\}|(\d+)|\{?(?:\\text\{)?([a-z]+)\}{0,2})"
)
_PREFIXED = re.compile(r"0(?:[xX]([0-9A-Fa-f]+)|[bB]([01]+)|[oO]([0-7]+))")
_RATIO = re.compile(r"[\d.\\a-z{} ]+(?::[\d.\\a-z{} ]+)+")
_WORDS = re.compile(r"(?:\\text\{[^{}]*\}|[A-Za-z]{2,}+|[ ,.'-])++")


def is_name(text: str) -> bool:
    """Whether a value may be the value of this: a name, or a sum or product of names."""
    if len(text) > MAX_NAME_CHARACTERS or text.startswith((r"\log", r"\ln")):
        return False
    return _NAMES.fullmatch(text) is not None


def parse(text: str) -> Form:
    """The structure of a `canonical` answer; a `Quantity` where nothing else fits."""
    text = without_braces(text.strip())
    for rule in _RULES:
        form = rule(text)
        if form is not None:
            return form
    value, unit = split_unit(text)
    percent = unit == "percent"
    return Quantity(value, "" if percent else unit, percent)


def _dotted(text: str) -> Form | None:
    if r"\ldots" not in text or re.fullmatch(r"-?\d*\.\d+ *\\ldots", text):
        return None
    if text.startswith((r"\{", "(", "[")) and text.endswith(("}", ")", "]")):
        text = text[1:-1].strip("{\\")
    items = split_top(text, ",")
    return Dotted(tuple(re.sub(r"\s|(?<=[\^_])\{(\w)\}", r"\1", item) for item in items))


def _matrix(text: str) -> Form | None:
    found = _MATRIX.fullmatch(text)
    if found is None:
        return None
    rows = [row.split("&") for row in found[1].replace(r"\hline", "").split(ROW) if row.strip()]
    return Matrix(tuple(tuple(parse(cell) for cell in row) for row in rows))


def _alternatives(text: str) -> Form | None:
    """Conditions or values joined by "or" or "and"."""
    for pattern, join in ((_OR, any_of), (_AND, all_of)):
        parts = [part for part in pattern.split(text) if part.strip()]
        if len(parts) > 1 and (pattern is _OR or not _WORDS.fullmatch(text)):
            forms = [parse(part) for part in parts]
            if all(isinstance(form, Union) for form in forms):
                return join([form for form in forms if isinstance(form, Union)])
            return Collection(tuple(_flattened(forms)))
    return None


def any_of(conditions: list[Union]) -> Union:
    """The union of conditions on one variable."""
    intervals = tuple(interval for condition in conditions for interval in condition.intervals)
    return Union(intervals, conditions[0].variable)


def all_of(conditions: list[Union]) -> Form:
    """Two half lines as one interval; anything harder stays a list of conditions."""
    intervals = [interval for condition in conditions for interval in condition.intervals]
    lows = [i for i in intervals if i.high == INFINITY]
    highs = [i for i in intervals if i.low == "-" + INFINITY]
    if len(intervals) == 2 and len(lows) == len(highs) == 1:
        both = Interval(lows[0].low, highs[0].high, lows[0].low_open, highs[0].high_open)
        return Union((both,), conditions[0].variable)
    return Collection(tuple(conditions))


def _flattened(forms: Iterable[Form]) -> list[Form]:
    items = [form.items if isinstance(form, Collection) else (form,) for form in forms]
    return [item for group in items for item in group]


def _set(text: str) -> Form | None:
    r"""`\{1, 2\}`, `\{x | x > 0\}`."""
    if not (text.startswith(r"\{") and text.endswith(r"\}")):
        return None
    content = text[2:-2].strip()
    for mark in ("|", ":"):
        head, *condition = split_top(content, mark)
        if condition and _VARIABLE.match(head.strip()):
            inner = parse(mark.join(condition))
            return inner if isinstance(inner, Union | Collection | Bracketed) else None
    return Collection(tuple(_flattened(map(parse, split_top(content, ",")))), braces=True)


def _member(text: str) -> Form | None:
    r"""`x \in [0, 1]` is the interval."""
    name, *rest = re.split(r"\\in(?![A-Za-z])", text, maxsplit=1)
    return parse(rest[0]) if rest and _VARIABLE.fullmatch(name.strip()) else None


def _inequality(text: str) -> Form | None:
    signs = [sign.strip() for sign in _SIGNS.findall(text)]
    if not signs or len(split_top(text, ",")) > 1:
        return None
    parts = [part.strip() for part in _SIGNS.split(text)]
    if len(signs) == 1 and all(parts):
        left, right = parts
        if _VARIABLE.fullmatch(left) and left != r"\pi" and not _variables(right):
            return Union(_half_line(signs[0], right), left)
        if _VARIABLE.fullmatch(right) and not _variables(left):
            return Union(_half_line(_FLIPPED[signs[0]], left), right)
        return Relation(signs[0], left, right)
    if len(signs) == 2 and all(parts) and _VARIABLE.fullmatch(parts[1]):
        if all(sign in ("<", r"\le") for sign in signs):
            low, high = 0, 1
        elif all(sign in (">", r"\ge") for sign in signs):
            low, high = 1, 0
        else:
            return None
        ends = (parts[0], parts[2])
        interval = Interval(ends[low], ends[high], signs[low] in "<>", signs[high] in "<>")
        return Union((interval,), parts[1])
    return None


def _half_line(sign: str, end: str) -> tuple[Interval, ...]:
    if sign == r"\ne":
        return (Interval("-" + INFINITY, end), Interval(end, INFINITY))
    if sign in ("<", r"\le"):
        return (Interval("-" + INFINITY, end, True, sign == "<"),)
    return (Interval(end, INFINITY, sign == ">", True),)


def _variables(text: str) -> bool:
    """Whether letters other than those of commands and constants stand in the text."""
    return bool(re.search(r"[A-Za-df-hj-z]", re.sub(r"\\[A-Za-z]+", "", text)))


def _union(text: str) -> Form | None:
    parts = re.split(r"\\cup(?![A-Za-z])", text)
    if len(parts) < 2:
        return None
    unions = [union for union in map(as_union, map(parse, parts)) if union is not None]
    if len(unions) < len(parts):
        return None
    return Union(tuple(interval for union in unions for interval in union.intervals))


def _reals_without(text: str) -> Form | None:
    r"""`\mathbb{R} \setminus \{1\}`."""
    found = _WITHOUT.fullmatch(text)
    return Union(_half_line(r"\ne", found[1].strip())) if found else None


def as_union(form: Form) -> Union | None:
    r"""A form as a set of reals: brackets of two values, `\mathbb{R}`, or a union as it stands."""
    if isinstance(form, Union):
        return form
    if (
        isinstance(form, Bracketed)
        and len(form.items) == 2
        and form.opening in "(["
        and form.closing in ")]"
    ):
        ends = [item.text for item in form.items if isinstance(item, Quantity)]
        if len(ends) < 2:
            return None
        low, high = ends
        return Union((Interval(low, high, form.opening == "(", form.closing == ")"),))
    if form in (Quantity(r"\mathbb{R}"), Words("all real numbers"), Words("all reals")):
        return Union((Interval("-" + INFINITY, INFINITY),))
    return None


def _bracketed(text: str) -> Form | None:
    r"""`(1, 2)`, `[1, 2)`, `\langle 1, 2 \rangle`; parentheses around one value are dropped."""
    if text.startswith(r"\langle") and text.endswith(r"\rangle"):
        text = f"({text[len(chr(92) + 'langle') : -len(chr(92) + 'rangle')]})"
    point = _POINT.match(text)
    if point:
        text = text[point.end() :]
    if not text or text[0] not in "([" or closing(text, 1) != len(text) - 1:
        return None
    items = split_top(text[1:-1].replace(";", ","), ",")
    if len(items) == 1 and text[0] + text[-1] not in ("()", "[]"):
        return Words(text)  # half an interval is no number
    if len(items) == 1:
        inside = "" if point else text[1:-1].strip()
        return parse(inside.strip('"')) if inside else None
    forms = tuple(map(parse, items))
    rows = tuple(f.items for f in forms if isinstance(f, Bracketed) and f.closing == "]")
    is_matrix = text[-1] == "]" and len(rows) == len(forms)  # [[1, 2], [3, 4]]
    return Matrix(rows) if is_matrix else Bracketed(text[0], text[-1], forms)


def _list(text: str) -> Form | None:
    """Values between commas; `1,250` is a number and `1, 250` is not."""
    if _THOUSANDS.fullmatch(text) and ", " not in text:
        return None
    items = [item for item in split_top(text.replace(";", ","), ",") if item.strip()]
    if len(items) < 2:
        return None
    return Collection(tuple(_flattened(map(parse, items))))


def _plus_minus(text: str) -> Form | None:
    """Both values; numbers are added, so that `1\\pm2` is `3, -1`."""
    left, *right = re.split(r"\\(?:pm|mp)(?![A-Za-z])", text)
    if len(right) != 1:
        return None
    name, equal, middle = left.rpartition("=")
    numbers = exact_fraction(middle.strip() or "0"), exact_fraction(right[0])
    if numbers[0] is None or numbers[1] is None:
        return Collection(tuple(parse(f"{left}{sign}{right[0]}") for sign in "+-"))
    values = numbers[0] + numbers[1], numbers[0] - numbers[1]
    return Collection(tuple(parse(f"{name}{equal}{value}") for value in values))


def _equation(text: str) -> Form | None:
    exact, about, rounded = text.partition(r"\approx")
    if about:  # x = 1/3 \approx 0.33 is exact, x \approx 0.33 is not
        text = f"{exact}={rounded}" if is_name(exact.strip()) else exact.strip()
        if "=" not in text:
            return parse(text) if text else None
    sides = split_top(text, "=")
    if len(sides) < 2 or not all(side.strip() for side in sides):
        return None
    left, *middle, right = (side.strip() for side in sides)
    if not middle and _VARIABLE.fullmatch(right) and not is_name(left):
        left, right = right, left  # 3 = x
    form = parse(right)
    if isinstance(form, Ratio) and left.count(":") == len(form.parts) - 1:  # x:y = 1:2
        return form if all(map(is_name, map(str.strip, left.split(":")))) else None
    return Equation(left, form, right, tuple(middle))


def _ratio(text: str) -> Form | None:
    return Ratio(tuple(map(str.strip, text.split(":")))) if _RATIO.fullmatch(text) else None


def _based(text: str) -> Form | None:
    if prefixed := _PREFIXED.fullmatch(text):
        base = {"x": "16", "o": "8", "b": "2"}[text[1].lower()]
        return Based(prefixed[prefixed.lastindex or 1].upper(), base, prefixed=True)
    found = _BASED.fullmatch(text)
    base = (found[2] or found[3] or digits_of_english(found[4]) or "") if found else ""
    return Based(found[1].upper(), base) if found and base else None


def _moment(text: str) -> Form | None:
    return Words(spelling) if (spelling := moment(text)) else None


def _words(text: str) -> Form | None:
    if not _WORDS.fullmatch(text):
        return None
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if number := digits_of_english(plain):
        return Quantity(number)
    if re.fullmatch(r"[a-z]{2,3}", text) and text not in ("yes", "no"):
        return None  # a product of variables
    return Words(" ".join(plain.casefold().split()).strip(" .,"))


_RULES: tuple[Callable[[str], Form | None], ...] = (
    _dotted, _matrix, _moment, _words, _alternatives, _set, _member, _inequality, _union,
    _reals_without, _bracketed, _list, _plus_minus, _equation, _ratio, _based,
)  # fmt: skip
