"""Times of day and dates in one spelling: `3:45 p.m.` is `15:45`, `14th of March` is `-3-14`."""

import re

MAX_CHARACTERS = 60
_MONTHS = """january february march april may june july august september october november
    december"""
_MONTH = {short: n for n, month in enumerate(_MONTHS.split(), 1) for short in (month, month[:3])}
_NAMED_TIMES = {"noon": "12:00", "midnight": "00:00"}
_TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))?((?::[0-5]\d)?) ?([ap])\.? ?m\.?")
_NUMBERED = re.compile(r"(?:(\d{4})年)?(\d{1,2})月(\d{1,2})[日号]|(\d{4})-(\d\d)-(\d\d)")


def moment(text: str) -> str | None:
    """A time of day with a.m. or p.m., or a date with its day; None for any other answer."""
    if len(text) > MAX_CHARACTERS:
        return None
    plain = re.sub(r"\\text ?\{([^{}]*)\}", r" \1", text).casefold().strip()
    plain = " ".join(plain.split())
    if found := _TIME.fullmatch(plain):
        hour = int(found[1])
        in_day = hour % 12 + (12 if found[4] == "p" else 0)
        return f"{in_day:02}:{found[2] or '00'}{found[3]}" if 1 <= hour <= 12 else None
    if found := _NUMBERED.fullmatch(plain):
        year, month, day = (found[n] or found[n + 3] for n in (1, 2, 3))
        return _date(year or "", int(month), int(day))
    return _NAMED_TIMES.get(plain) or _written_date(plain)


def _written_date(text: str) -> str | None:
    """`14th of March, 2021` and `Mar. 14 2021`, without a weekday."""
    words = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|[.,]", " ", text).split()
    words = [word for word in words if word not in ("of", "the")]
    month = next((_MONTH[word] for word in words[:2] if word in _MONTH), 0)
    day, *year = [word for word in words if word not in _MONTH] or [""]
    numbers = [day, *year]
    if len(words) != len(numbers) + 1 or not all(map(str.isdecimal, numbers)):
        return None
    if len(day) > 2 or any(len(number) != 4 for number in year):
        return None
    return _date("".join(year), month, int(day))


def _date(year: str, month: int, day: int) -> str | None:
    return f"{year}-{month}-{day}" if 1 <= month <= 12 and 1 <= day <= 31 else None
