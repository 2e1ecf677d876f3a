"""One self-contained HTML page from run directories: headline, accuracy by stage, FP8 against BF16, every run, samples, recipe.

The page loads nothing from anywhere. All text of models and data is escaped, and its content security policy lets only
the page's own script run.
"""

import base64
import hashlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from infir2.convert.weights import parameter_shapes
from infir2.errors import CheckpointError
from infir2.evaluate.statistics import Evaluation
from infir2.report.appendix import commands_html, environment_html, recipe_html, samples_html
from infir2.report.curves import final_difference, precision_section, run_charts, twins
from infir2.report.read import Run, read_runs
from infir2.report.stages import CHANGE, HEADINGS, StageRow, accuracy_text, stage_rows
from infir2.report.text import compact, counted, duration, html_table, percent

POINT_BUDGET, LINES_PER_RUN = (
    30_000,
    20,
)  # vertices on a page, about 25 bytes each, and drawn lines that share them
EVENTS_SHOWN = 40


def write_report(run_dirs: list[Path], out: Path) -> Path:
    """Write the page of these runs (or of the runs just inside a directory) to `out`, replacing an older one. Returns `out`.

    Raises DataError when a path holds no run. What else a run lacks is left out of the page and named in its notes.
    """
    html = render(read_runs(run_dirs))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.write_text(html, encoding="utf-8", errors="replace")
    temporary.replace(out)
    return out


def render(runs: Sequence[Run]) -> str:
    """The page's HTML."""
    rows, pairs = stage_rows(runs), twins(runs)
    leaders = [run for run in runs if run.train and all(run is not twin for twin in pairs.values())]
    points = int(np.clip(POINT_BUDGET / (LINES_PER_RUN * max(1, len(leaders))), 40, 400))
    sections = {
        "What improved": _accuracy(rows),
        "FP8 against BF16": "".join(
            precision_section(run, pairs[run.name], points) for run in leaders if run.name in pairs
        ),
        "Runs": "".join(_run(run, pairs.get(run.name), points) for run in leaders),
        "Sample responses": "".join(map(samples_html, runs)),
        "Configuration": "".join(map(recipe_html, runs)),
        "Environment": environment_html(runs),
        "How to reproduce": commands_html(runs),
    }
    missing = ", ".join(title for title, html in sections.items() if not html)
    notes = ([f"Nothing recorded for: {missing}."] if missing else []) + [
        f"{run.name}: {note}." for run in runs for note in run.notes
    ]
    shown = [
        (title.lower().replace(" ", "-"), title, html) for title, html in sections.items() if html
    ]
    nav = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in shown)
    body = "".join(
        f'<section id="{anchor}"><h2>{title}</h2>{html}</section>' for anchor, title, html in shown
    )
    style, script = (
        resources.files("infir2.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("style.css", "hover.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>InfiR2 report: {escape(_chain(leaders or runs))}</title><style>{style}</style></head><body>"
        f'<header><p class="brand">InfiR2 training report</p>{_headline(runs, leaders, rows, pairs)}'
        f'<nav aria-label="Sections">{nav}</nav></header><main>{body}</main>{_footer(notes)}<script>{script}</script></body></html>\n'
    )


def parameter_count(config: Mapping[str, Any]) -> int:
    """Parameters of the model that a Hugging Face configuration describes; 0 for one that describes none of ours."""
    try:
        return sum(math.prod(shape) for shape in parameter_shapes(config).values())
    except CheckpointError:
        return 0


def _chain(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    return " → ".join(names if len(names) <= 7 else [*names[:3], "…", *names[-3:]])


def _headline(
    runs: Sequence[Run], leaders: Sequence[Run], rows: Sequence[StageRow], pairs: Mapping[str, Run]
) -> str:
    """What was trained and what came of it, in one sentence and a few figures."""
    scored = [row for row in rows if math.isfinite(row.evaluation.avg_at_k)]
    found = []
    if len(scored) > 1:
        found.append(
            "accuracy "
            + ", ".join(
                f"{percent(row.evaluation.avg_at_k)} after {row.stage}"
                for row in (scored[0], scored[-1])
            )
        )
    differences = [
        (run, final_difference(run, pairs[run.name])) for run in leaders if run.name in pairs
    ]
    found += [
        f"{difference.what} of {run.name} {difference.text}"
        for run, difference in differences
        if difference
    ]
    precision = {run.fp8 for run in leaders}
    title = _chain(leaders or runs) + (
        " in FP8" if precision == {True} else " in BF16" if precision == {False} else ""
    )
    title += f": {'; '.join(found)}" if found else ""
    configs = [run.state.get("model_config") or {} for run in leaders]
    largest = max(configs, key=parameter_count, default={})
    num_parameters = parameter_count(largest)
    seconds, tokens = (
        sum(run.total(column) for run in leaders) for column in ("seconds", "trained_tokens")
    )
    tiles = [
        (compact(num_parameters), f"parameters, {largest.get('model_type', '')}", num_parameters),
        (
            f"{sum(run.num_steps for run in leaders):,}",
            f"optimizer steps in {counted(len(leaders), 'run')}",
            leaders,
        ),
        (compact(tokens), "trained tokens", tokens),
        (
            duration(seconds),
            "in training steps" + (", without the BF16 comparison" if pairs else ""),
            seconds,
        ),
    ]
    if scored:
        last = scored[-1]
        tiles.append(
            (accuracy_text(last.evaluation), f"avg@{last.evaluation.k} after {last.stage}", True)
        )
    html = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text, known in tiles
        if known
    )
    return f"<h1>{escape(title)}</h1>" + (f'<div class="tiles">{html}</div>' if html else "")


def _accuracy(rows: Sequence[StageRow]) -> str:
    """A table with a plot in it, and accuracy by difficulty."""
    if not rows:
        return ""
    keys = '<p class="keys"><span class="key points k0">avg@k with 95 % interval</span><span class="key ring k0">pass@k</span></p>'
    body = []
    for row in rows:
        cells = [escape(cell) for cell in row.cells]
        cells[CHANGE] = f"<b>{cells[CHANGE]}</b>" if row.is_sure else cells[CHANGE]
        cells[CHANGE] += (
            f" <small>from {escape(row.compared_with)}</small>" if row.compared_with else ""
        )
        body.append([cells[0], interval_plot(row.evaluation), *cells[1:]])
    axis = '<div class="axis"><span>0</span><span>50</span><span>100 %</span></div>'
    return (
        f"{keys}{html_table((HEADINGS[0], axis, *HEADINGS[1:]), body)}"
        '<p class="note">± is the half-width of a 95 % interval. A change in bold is larger than its interval.</p>'
        f"{_difficulty(rows)}"
    )


def interval_plot(evaluation: Evaluation) -> str:
    """A table's cell with avg@k, its interval and pass@k on an axis from 0 to 100 %, drawn by style.css."""
    low, high = np.clip(
        [evaluation.avg_at_k - evaluation.interval, evaluation.avg_at_k + evaluation.interval], 0, 1
    )
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


def _run(run: Run, twin: Run | None, points: int) -> str:
    facts = [
        counted(run.num_steps, "step"),
        f"{compact(run.total('trained_tokens'))} trained tokens",
        duration(run.total("seconds")),
    ]
    if run.fp8 is not None:
        facts.append(
            f"FP8, {run.recipe.get('fp8', {}).get('scale_format', 'pow2')} scales"
            if run.fp8
            else "BF16"
        )
    facts += [f"from {run.base}"] if run.base else []
    num_skipped = int(np.nansum(run.train["skipped"]))
    facts += [f"{counted(num_skipped, 'step')} skipped"] if num_skipped else []
    head = f'<h3>{escape(run.name)}</h3><p class="facts">{escape(" · ".join(facts))}</p>'
    return head + run_charts(run, twin, points) + _events(run)


def _events(run: Run) -> str:
    events = run.events[-EVENTS_SHOWN:]
    if not events:
        return ""
    rows = [
        [escape(str(event.get(name, "–"))[:400]) for name in ("step", "event", "detail")]
        for event in events
    ]
    summary = counted(len(run.events), "event") + (
        f", the last {len(events)}" if len(events) < len(run.events) else ""
    )
    return f"<details><summary>{summary}</summary>{html_table(('step', 'event', 'detail'), rows, text_columns=3)}</details>"


def _footer(notes: Sequence[str]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<footer>{f"<h2>Notes</h2><ul>{items}</ul>" if items else ""}<p class="note">Written {written}.</p></footer>'
