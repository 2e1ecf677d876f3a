"""Accuracy by stage: a table with a plot, and by difficulty."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from infir2.evaluate.statistics import Evaluation
from infir2.report.stages import CHANGE, HEADINGS, StageRow
from infir2.report.text import html_table, percent


def accuracy_html(rows: Sequence[StageRow]) -> str:
    """HTML: accuracy by stage, as a table with a plot, and by difficulty."""
    if not rows:
        return ""
    keys = (
        '<p class="keys"><span class="key points k0">avg@k with 95 % interval</span>'
        '<span class="key ring k0">pass@k</span></p>'
    )
    body = []
    for row in rows:
        cells = [escape(cell) for cell in row.cells]
        cells[CHANGE] = f"<b>{cells[CHANGE]}</b>" if row.change.is_sure else cells[CHANGE]
        cells[CHANGE] += (
            f" <small>from {escape(row.compared_with)}</small>" if row.compared_with else ""
        )
        body.append([cells[0], interval_plot(row.evaluation), *cells[1:]])
    axis = '<div class="axis"><span>0</span><span>50</span><span>100 %</span></div>'
    return (
        f"{keys}{html_table((HEADINGS[0], axis, *HEADINGS[1:]), body, stack=True)}"
        '<p class="note">± is half the length of the 95 % interval that the bar shows. '
        f"A change in bold is larger than its interval. {_pairing(rows)}</p>"
        f"{_difficulty(rows)}"
    )


def _pairing(rows: Sequence[StageRow]) -> str:
    """How the intervals of the changes were made."""
    counts = {row.change.num_paired for row in rows if row.compared_with}
    if counts == {0}:
        return "Its interval is that of independent questions."
    if 0 in counts:
        return "Its interval is paired by question where both stages answered the same ones."
    return "Its interval is paired by question: both stages answered the same ones." * bool(counts)


def interval_plot(evaluation: Evaluation) -> str:
    """A table cell that plots avg@k, its interval and pass@k from 0 to 100 %."""
    low, high = np.clip((evaluation.low, evaluation.high), 0, 1)
    marks = (
        ("bar", low, high - low),
        ("ring", evaluation.pass_at_k, 0),
        ("dot", evaluation.avg_at_k, 0),
    )
    drawn = (
        f'<i class="{kind}" style="left:{at:.1%};width:{width:.1%}"></i>'
        for kind, at, width in marks
        if math.isfinite(at)
    )
    return f'<td class="plot"><div>{"".join(drawn)}</div></td>'


def _difficulty(rows: Sequence[StageRow]) -> str:
    levels = sorted(
        {level for row in rows for level in row.evaluation.by_difficulty},
        key=lambda level: (len(level), level),
    )
    body = []
    for row in rows:
        values = [row.evaluation.by_difficulty.get(level, math.nan) for level in levels]
        cells = [
            f'<td class="num heat" style="--v:{np.nan_to_num(value):.3f}">{percent(value, 0)}</td>'
            for value in values
        ]
        body.append([escape(row.stage), *cells])
    return (
        f"<h3>avg@k by difficulty</h3>{html_table(['stage', *map(escape, levels)], body)}"
        if levels
        else ""
    )
