r"""Numbers in words and parts, as digits: `三分之二` is `\frac{2}{3}`, `twenty-one` is `21`."""

import re
from fractions import Fraction

from infir2.verify.units import CHINESE_UNIT

MAX_CHARACTERS = 100
_CHINESE_DIGITS = "零〇 一壹 二两贰 三叁 四肆 五伍 六陆 七柒 八捌 九玖"
_DIGITS = {
    character: value for value, group in enumerate(_CHINESE_DIGITS.split()) for character in group
}
_PLACES = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_MYRIADS = {"万": 10**4, "亿": 10**8}
_NUMERAL = f"[{''.join([*_DIGITS, *_PLACES, *_MYRIADS])}]"
_CHINESE = re.compile(
    rf"(?:(?<![\d\u4e00-\u9fff])|(?<=[为是有共得于]))(?P<sign>负?)(?:(?P<whole>{_NUMERAL}+)又)?"
    rf"(?:(?P<bottom>{_NUMERAL}+)分之)?(?P<top>{_NUMERAL}+)(?:点(?P<part>[{''.join(_DIGITS)}]+))?"
    rf"(?=$|[^\u4e00-\u9fff]|{CHINESE_UNIT})"
)
_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ENGLISH = {word: value for value, word in enumerate(_SMALL.split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), 2)
}
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12
}  # fmt: skip
_DENOMINATORS = "half third fourth fifth sixth seventh eighth ninth tenth"
_PARTS = {"halves": 2, "quarter": 4, "quarters": 4} | {
    word + plural: value
    for value, word in enumerate(_DENOMINATORS.split(), 2)
    for plural in ("", "s")
}
_MINUTE, _SECOND = r"(?:'|\^ ?\{?\\prime\}?)", r"(?:''|\"|\^ ?\{?\\prime ?\\prime\}?)"
_ANGLE = re.compile(
    rf"(\d+) ?\^\\circ ?([0-5]?\d(?:\.\d+)?) ?{_MINUTE}(?: ?([0-5]?\d(?:\.\d+)?) ?{_SECOND})?"
    r"|(\d+)度([0-5]?\d)分(?:([0-5]?\d)秒)?"
)
_SCALED = re.compile(
    r"(?<=\d)(?: |\\text ?\{)* ?(hundred|thousand|million|billion|trillion)(?![A-Za-z]) ?(.*)"
)


def written_numbers(text: str) -> str:
    r"""`30^\circ 30'` as `\frac{61}{2}^\circ`, `2 million` as `2\times10^{6}`."""
    text = _ANGLE.sub(_degrees, text)
    if found := _SCALED.search(text):
        zeros = len(str(_SCALES[found[1]])) - 1
        rest = found[2].removeprefix("}") if found[2][:1] == "}" else rf"\text{{{found[2]}"
        return rf"{text[: found.start()]}\times10^{{{zeros}}}{rest if found[2] else ''}"
    return text


def _degrees(found: re.Match[str]) -> str:
    degrees, minutes, seconds = (found[n] or found[n + 3] or "0" for n in (1, 2, 3))
    value = Fraction(degrees) + Fraction(minutes) / 60 + Fraction(seconds) / 3600
    whole = value.denominator == 1
    number = str(value) if whole else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return rf"{number}^\circ "


def digits_of_chinese(text: str) -> str:
    """Each Chinese numeral that is not part of a longer word as LaTeX: `十二厘米` is `12厘米`."""
    return _CHINESE.sub(_chinese_latex, text)


def _chinese_latex(found: re.Match[str]) -> str:
    sign = "-" if found["sign"] else ""
    part = "".join(str(_DIGITS[character]) for character in found["part"] or "")
    of_hundred = found["bottom"] == "百"
    top, bottom, whole = (
        100 if of_hundred and numeral == "百" else _chinese_integer(numeral or "零")
        for numeral in (found["top"], found["bottom"], found["whole"])
    )
    if found["bottom"] in _PLACES:
        bottom = _PLACES[found["bottom"]]
    if None in (top, bottom, whole) or len(found[0]) > MAX_CHARACTERS:
        return found[0]
    value = f"{top}.{part}" if part else str(top)
    if found["bottom"] is None or of_hundred:
        return found[0] if whole else sign + value + (r"\%" if of_hundred else "")
    return found[0] if part or not bottom else rf"{sign}{whole or ''}\frac{{{top}}}{{{bottom}}}"


def _chinese_integer(text: str) -> int | None:
    """The value of `一百零五`, `二〇二六` or `两万五` (25,000); None for other characters."""
    if all(character in _DIGITS for character in text):
        return int("".join(str(_DIGITS[character]) for character in text))
    total, section, digit, place = 0, 0, None, 1
    for character in text:
        if character in _DIGITS:
            if digit:
                return None
            digit, place = _DIGITS[character], place if _DIGITS[character] else 1
        elif character in _PLACES:
            if digit is None and character not in "十拾":
                return None
            place = _PLACES[character]
            section, digit = section + (1 if digit is None else digit) * place, None
        else:
            place = _MYRIADS[character]
            section += digit or 0
            if not total + section:
                return None
            total = (total + section) * place if total < place else total + section * place
            section, digit = 0, None
    return total + section + (digit or 0) * max(place // 10, 1)


def digits_of_english(text: str) -> str | None:
    """A number in words as LaTeX: `two thirds`, `one hundred and five`; None for other text."""
    words = re.sub("[-,]", " ", text.casefold()).split()
    if not words or len(text) > MAX_CHARACTERS:
        return None
    sign = "-" if words[0] in ("minus", "negative") else ""
    words = words[1:] if sign else words
    if len(words) > 1 and words[-1] in _PARTS:
        top = 1 if words[:-1] == ["a"] else _english_integer(words[:-1])
        return None if top is None else rf"{sign}\frac{{{top}}}{{{_PARTS[words[-1]]}}}"
    value = _english_integer(words)
    return None if value is None else f"{sign}{value}"


def _english_integer(words: list[str]) -> int | None:
    total, section, last = 0, 0, 0  # last: the smallest number that may not follow
    for index, word in enumerate(words):
        if word in _ENGLISH and (last == 0 or _ENGLISH[word] < last):
            section += _ENGLISH[word]
            last = 10 if _ENGLISH[word] >= 20 else 1
        elif word == "hundred" and 0 < section < 10 and last == 1:
            section, last = 100 * section, 100
        elif (
            word in _SCALES
            and word != "hundred"
            and section
            and (total == 0 or section * _SCALES[word] < total)
        ):
            total, section, last = total + section * _SCALES[word], 0, 0
        elif word != "and" or index in (0, len(words) - 1) or words[index - 1] in _ENGLISH:
            return None
    return total + section if words else None
