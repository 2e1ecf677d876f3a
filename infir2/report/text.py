"""Numbers and tables as text, for the page and for the terminal."""

import math
from collections.abc import Iterable, Sequence


def compact(value: float) -> str:
    """At most four digits, three below 1: 0.123, 1.234, 1,234, 12.34 k, 2e−5; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    for limit, unit, suffix in (
        (1e12, 1e12, "T"),
        (1e9, 1e9, "B"),
        (1e6, 1e6, "M"),
        (1e4, 1e3, "k"),
    ):
        if size >= limit:
            return minus(f"{value / unit:.4g} {suffix}")
    if size >= 1000:
        return minus(f"{value:,.0f}")
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return minus(f"{float(mantissa):g}e{int(exponent)}")
    return minus(f"{value:.4g}" if size >= 1 else f"{value:.3g}")


def minus(text: str) -> str:
    return text.replace("-", "−")


def percent(value: float, digits: int = 1) -> str:
    return minus(f"{100 * value:.{digits}f} %") if math.isfinite(value) else "–"


def counted(count: int, noun: str) -> str:
    """'1 step', '1,234 steps'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """'2 h 05 min', '12 min', '40 s'."""
    if seconds >= 360_000:
        return f"{seconds / 86_400:.1f} days"
    if seconds >= 5_970:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def html_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    text_columns: int = 1,
    stack: bool = False,
) -> str:
    """A table that scrolls in its own box.

    Args:
        head: HTML of the column titles.
        rows: HTML of the cells, or whole `<td>` elements; the first cell is the title of its row.
        text_columns: the columns from this one on are numbers.
        stack: on a phone, each row is a list of titles and cells.
    """

    def cell(index: int, html: str) -> str:
        if index == 0:
            return f'<th scope="row">{html}</th>'
        if html.startswith("<td"):
            return html
        title = f' data-title="{head[index]}"' if stack else ""
        kinds = ["num"] * (index >= text_columns) + ["none"] * (stack and html == "–")
        names = f' class="{" ".join(kinds)}"' if kinds else ""
        html = f"<span>{html}</span>" if stack else html
        return f"<td{names}{title}>{html}</td>"

    names = (
        f'<th scope="col"{" class=num" if index >= text_columns else ""}>{name}</th>'
        for index, name in enumerate(head)
    )
    body = (
        f"<tr>{''.join(cell(index, html) for index, html in enumerate(row))}</tr>" for row in rows
    )
    kinds = ["text"] * (text_columns > 1) + ["stack"] * stack
    style = f' class="{" ".join(kinds)}"' if kinds else ""
    header = f"<thead><tr>{''.join(names)}</tr></thead>"
    table = f"<table{style}>{header}<tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'
