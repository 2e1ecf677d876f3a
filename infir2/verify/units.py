r"""Units behind a value: `12\text{ cm}`, `15 days`, `72^\circ`, `12厘米`.

Units are compared if both answers have one.
"""

import re

_SYNONYMS = {
    "degree": "degree degrees deg ° 度", "percent": r"percent % \%",
    "dollar": r"dollar dollars usd bucks $ 元 euro euros yuan rupees",
    "cent": "cent cents ¢ 分", "mm": "mm millimeter millimeters millimetre millimetres 毫米",
    "cm": "cm centimeter centimeters centimetre centimetres 厘米",
    "m": "m meter meters metre metres 米", "in": "inch inches", "ft": "ft foot feet",
    "km": "km kilometer kilometers kilometre kilometres 千米 公里", "yd": "yard yards yd",
    "mi": "mi mile miles", "g": "g gram grams 克", "kg": "kg kilogram kilograms 千克 公斤",
    "lb": "lb lbs pound pounds", "oz": "oz ounce ounces", "s": "s sec second seconds secs 秒",
    "min": "min minute minutes mins 分钟", "h": "h hr hrs hour hours 小时", "day": "day days 天",
    "week": "week weeks 周", "month": "month months 个月", "year": "year years 年", "mph": "mph",
    "l": "l L liter liters litre litres 升", "ml": "ml mL milliliter milliliters 毫升",
    "radian": "rad radian radians", "unit": "unit units", "person": "people persons 人",
    "piece": "piece pieces 个 只 本 件 块 张 条 枚 颗 支 种",
}  # fmt: skip
_SCALES = {"celsius": "C", "fahrenheit": "F"}
_UNITS = {name: unit for unit, names in _SYNONYMS.items() for name in names.split()}
_CHINESE = "|".join(
    sorted((name for name in _UNITS if ord(name[0]) > 0x2E80), key=len, reverse=True)
)
CHINESE_UNIT = rf"(?:平方|立方)?(?:{_CHINESE})"
_PREFIXES = {"平方": "2", "立方": "3", "square": "2", "sq": "2", "cubic": "3", "cu": "3"}
# Words behind a number that make it another number, or another answer.
_NUMBER_WORDS = """
    hundred hundreds thousand thousands million millions billion billions trillion trillions k
    dozen dozens score gross half halves third thirds fourth fourths quarter quarters fifth fifths
    sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths
    thousandth thousandths millionth millionths st nd rd th percentile
    and or nor not than more less least most about approximately around between to from until over
    under above below negative positive plus minus times fold squared cubed factorial root base mod
    modulo remainder divided by out if when for except only none any all every some other each
    pairs choose is are was zero one two three four five six seven eight nine ten twenty pi e i x
"""
_NOT_A_UNIT = frozenset(_NUMBER_WORDS.split())
_POWER = r"(?:\s*\^\{?(?P<power>[23])\}?)?"
_TEXT_UNIT = re.compile(
    rf"(?P<value>[^\\].*?|\\.*?\S)\s*\\text\s*\{{(?P<unit>[^{{}}\d]+(?:\^[23])?)\}}{_POWER}"
)
_PLAIN_UNIT = re.compile(
    rf"(?P<value>[^A-Za-z]*\d|.*?\}})\s*"
    rf"(?P<unit>{CHINESE_UNIT}(?:[/每](?:{_CHINESE}))?"
    rf"|[A-Za-z]++(?:[ /][A-Za-z]++){{0,4}}){_POWER}"
)
_DEGREE = re.compile(r"(?P<value>.*?)\s*\^\\circ\s*(?P<scale>[CF]?)")
_PERCENT = re.compile(r"(?P<value>.*?)\s*\\?%")
_MONEY = re.compile(r"(?P<sign>[+-]?)\s*\\?\$\s*(?P<value>[+-]?[\d.,].*)|(?P<before>.*\d)\s*\\\$")
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit) of a `canonical` answer: `12\text{ cm}` is ("12", "cm"), `12` ("12", "")."""
    if found := _MONEY.fullmatch(text):
        if found["before"]:
            return found["before"], "dollar"
        return found["sign"] + split_unit(found["value"])[0], "dollar"
    if found := _PERCENT.fullmatch(text):
        return found["value"], "percent"
    if (found := _DEGREE.fullmatch(text)) and not _ANGLE.search(text):
        return found["value"], f"degree {found['scale']}".strip()
    if found := _TEXT_UNIT.fullmatch(text):
        words = _words(found["unit"])
        if words and r"\text" not in found["value"]:
            return found["value"], _unit_name(words, found["power"])
    if (found := _PLAIN_UNIT.fullmatch(text)) and _is_number(found["value"]):
        words = _words(found["unit"])
        attached = text[len(found["value"])] != " " and len(found["unit"]) == 1
        known = words and (words[0] in _UNITS or words[0] in _PREFIXES)
        nouns = words and all(len(word) > 3 and word.isascii() for word in words)
        if (known or nouns) and not (attached and found["unit"].isascii()):  # 3m may be 3 times m
            return found["value"], _unit_name(words, found["power"])
    return text, ""


def same_unit(reference: str, answer: str) -> bool:
    """Whether two units are equal, or one is missing; degrees of no scale equal those of any."""
    units = {reference, answer}
    any_scale = "degree" in units and all(unit.startswith("degree") for unit in units)
    return len(units) == 1 or "" in units or any_scale


def _words(unit: str) -> list[str]:
    """Words of a unit; none if one of them may change the number, as in `3 million`."""
    for prefix in ("平方", "立方"):
        unit = unit.replace(prefix, prefix + " ")
    words = re.sub(r"[.,]", " ", re.sub("[/每]", " per ", unit)).split()
    # Short units have one spelling: m is a meter, M may be a million.
    words = [word.casefold() if len(word) > 2 else word for word in words]
    wrong = any(
        word.casefold() in _NOT_A_UNIT or not re.fullmatch(r"[\w°'%$¢^-]+", word) for word in words
    )
    chinese = any(ord(word[0]) > 0x2E80 and word not in {**_UNITS, **_PREFIXES} for word in words)
    return [] if wrong or chinese else words


def _unit_name(words: list[str], power: str | None) -> str:
    """One spelling of a unit: "square feet" and "ft^2" are "ft^2"."""
    if words[0] in _PREFIXES and len(words) > 1:
        power, words = _PREFIXES[words[0]], words[1:]
    words = [_SCALES.get(word, word) for word in words]
    if words == ["mi", "per", "h"] or words == ["miles", "per", "hour"]:
        words = ["mph"]
    name = " ".join(_UNITS.get(word, word.removesuffix("s")) for word in words)
    return f"{name}^{power}" if power else name


def _is_number(text: str) -> bool:
    number = (
        r"[+-]?(?:\\\$)?[\d.,/ ]*+(?:\\frac\{\d+\}\{\d+\}|\\sqrt\{\d+\})?"
        r"|.*\\times ?10\^\{?-?\d+\}?"
    )
    return re.fullmatch(number, text) is not None
