"""One self-contained HTML page from run directories.

It has a headline, accuracy by stage, FP8 against BF16, the charts of every run, samples and
recipes. The page loads nothing. All text of models and data is escaped, and the content security
policy allows only the page's own script.
"""

import base64
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from infir2.convert.weights import parameter_shapes
from infir2.errors import CheckpointError
from infir2.evaluate.statistics import Evaluation
from infir2.files import write_atomically
from infir2.report.appendix import commands_html, environment_html, recipe_html, samples_html
from infir2.report.curves import final_difference, precision_section, run_charts, twins
from infir2.report.groups import PAGE_BYTES, groups_html
from infir2.report.read import Run, read_runs
from infir2.report.stages import CHANGE, HEADINGS, StageRow, accuracy_text, stage_rows
from infir2.report.text import compact, counted, duration, html_table, percent

POINT_BUDGET = 30_000  # vertices on a page, about 25 bytes each
LINES_PER_RUN = 20  # lines that share them
EVENTS_SHOWN = 40


def write_report(run_dirs: list[Path], out: Path) -> Path:
    """Write the page to `out`, replacing an older one, and return `out`.

    `run_dirs` are runs, or directories that contain runs. Raises DataError for a path without a
    run. The page's notes name everything else that a run lacks.
    """
    html = render(read_runs(run_dirs))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, html.encode("utf-8", errors="replace"))
    return out


def render(runs: Sequence[Run]) -> str:
    """The page's HTML."""
    rows, pairs = stage_rows(runs), twins(runs)
    is_twin = {id(twin) for twin in pairs.values()}
    leaders = [run for run in runs if run.train and id(run) not in is_twin]
    title = _chain(leaders or runs)
    points = int(np.clip(POINT_BUDGET / (LINES_PER_RUN * max(1, len(leaders))), 40, 400))
    sections = {
        "What improved": _accuracy(rows),
        "FP8 against BF16": "".join(
            precision_section(run, pairs[run.name], points) for run in leaders if run.name in pairs
        ),
        "Runs": "".join(_run(run, pairs.get(run.name), points) for run in leaders),
        "Groups of responses": "".join(groups_html(run, PAGE_BYTES // len(runs)) for run in runs),
        "Sample responses": "".join(map(samples_html, runs)),
        "Configuration": "".join(map(recipe_html, runs)),
        "Environment": environment_html(runs),
        "How to reproduce": commands_html(runs),
    }
    optional = {"Groups of responses"}  # of RL, and only if it keeps them
    missing = ", ".join(n for n, html in sections.items() if not html and n not in optional)
    notes = ([f"Nothing recorded for: {missing}."] if missing else []) + [
        f"{run.name}: {note}." for run in runs for note in run.notes
    ]
    shown = [
        (name.lower().replace(" ", "-"), name, html) for name, html in sections.items() if html
    ]
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in shown)
    body = "".join(
        f'<section id="{anchor}"><h2>{name}</h2>{html}</section>' for anchor, name, html in shown
    )
    style, script = _asset("style.css"), _asset("hover.js") + "\n" + _asset("groups.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>InfiR2 report: {escape(title)}</title><style>{style}</style></head><body>"
        '<header><p class="brand">InfiR2 training report</p>'
        f"{_headline(leaders, title, rows, pairs)}"
        f'<nav aria-label="Sections">{nav}</nav></header><main>{body}</main>{_footer(notes)}'
        f"<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("infir2.report").joinpath(name).read_text(encoding="utf-8")


def parameter_count(config: Mapping[str, Any]) -> int:
    """The number of parameters of a Hugging Face configuration; 0 for an impossible one."""
    try:
        return sum(math.prod(shape) for shape in parameter_shapes(config).values())
    except (CheckpointError, ArithmeticError, RuntimeError, TypeError, ValueError):
        return 0


def _chain(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    return " → ".join(names if len(names) <= 7 else [*names[:3], "…", *names[-3:]])


def _headline(
    leaders: Sequence[Run], chain: str, rows: Sequence[StageRow], pairs: Mapping[str, Run]
) -> str:
    """HTML: what was trained and with which result, in one sentence and a few numbers."""
    scored = [row for row in rows if math.isfinite(row.evaluation.avg_at_k)]
    precision = {run.fp8 for run in leaders}
    suffix = " in FP8" if precision == {True} else " in BF16" if precision == {False} else ""
    results = _results(leaders, scored, pairs)
    title = chain + suffix + (f": {'; '.join(results)}" if results else "")
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text in _tiles(leaders, scored, bool(pairs))
    )
    return f"<h1>{escape(title)}</h1>" + (f'<div class="tiles">{tiles}</div>' if tiles else "")


def _results(
    leaders: Sequence[Run], scored: Sequence[StageRow], pairs: Mapping[str, Run]
) -> list[str]:
    """Sentences: accuracy before and after, and the loss of FP8 against BF16."""
    results = []
    if len(scored) > 1:
        first, last = (
            f"{percent(row.evaluation.avg_at_k)} after {row.stage}"
            for row in (scored[0], scored[-1])
        )
        results.append(f"accuracy {first}, {last}")
    for run in leaders:
        twin = pairs.get(run.name)
        if twin and (difference := final_difference(run, twin)):
            results.append(f"{difference.name} of {run.name} {difference.text}")
    return results


def _tiles(
    leaders: Sequence[Run], scored: Sequence[StageRow], has_twins: bool
) -> Iterator[tuple[str, str]]:
    """(number, text) of each known total."""
    configs = [run.state.get("model_config") or {} for run in leaders]
    largest = max(configs, key=parameter_count, default={})
    if num_parameters := parameter_count(largest):
        yield compact(num_parameters), f"parameters, {largest.get('model_type', '')}"
    if leaders:
        num_steps = sum(run.num_steps for run in leaders)
        yield f"{num_steps:,}", f"optimizer steps in {counted(len(leaders), 'run')}"
    if tokens := sum(run.total("trained_tokens") for run in leaders):
        yield compact(tokens), "trained tokens"
    if seconds := sum(run.total("seconds") for run in leaders):
        without = ", without the BF16 comparison" if has_twins else ""
        yield duration(seconds), f"in training steps{without}"
    if scored:
        evaluation = scored[-1].evaluation
        yield accuracy_text(evaluation), f"avg@{evaluation.k} after {scored[-1].stage}"


def _accuracy(rows: Sequence[StageRow]) -> str:
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
        cells[CHANGE] = f"<b>{cells[CHANGE]}</b>" if row.is_sure else cells[CHANGE]
        cells[CHANGE] += (
            f" <small>from {escape(row.compared_with)}</small>" if row.compared_with else ""
        )
        body.append([cells[0], interval_plot(row.evaluation), *cells[1:]])
    axis = '<div class="axis"><span>0</span><span>50</span><span>100 %</span></div>'
    return (
        f"{keys}{html_table((HEADINGS[0], axis, *HEADINGS[1:]), body)}"
        '<p class="note">± is half the length of the 95 % interval that the bar shows. '
        "A change in bold is larger than its interval.</p>"
        f"{_difficulty(rows)}"
    )


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
    table = html_table(("step", "event", "detail"), rows, text_columns=3)
    return f"<details><summary>{summary}</summary>{table}</details>"


def _footer(notes: Sequence[str]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    listed = f"<h2>Notes</h2><ul>{items}</ul>" if items else ""
    return f'<footer>{listed}<p class="note">Written {written}.</p></footer>'
