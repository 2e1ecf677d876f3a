"""One self-contained HTML page from run directories.

It has a headline, accuracy by stage, FP8 against BF16, runs of one stage in the same charts, the
charts of every run, samples and recipes. The page loads nothing. All text of models and data is
escaped, and the content security policy allows only the page's own script.
"""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np

from infir2.errors import DataError
from infir2.files import write_atomically
from infir2.report.accuracy import accuracy_html
from infir2.report.appendix import SAMPLES_BYTES, environment_html, recipe_html, samples_html
from infir2.report.axes import AXES
from infir2.report.commands import Paths, commands_html
from infir2.report.curves import Drawing
from infir2.report.groups import PAGE_BYTES, groups_html
from infir2.report.headline import chain, headline_html
from infir2.report.overlay import overlay_html, stages
from infir2.report.precision import across_html, precision_section, twins
from infir2.report.read import Run, read_runs
from infir2.report.runs import run_html, runs_table
from infir2.report.stages import StageRow, stage_rows
from infir2.report.text import counted
from infir2.terminal import begin_phase

POINT_BUDGET = 24_000  # vertices on a page, about 30 bytes each
LINES_PER_RUN = 20  # lines that share them
OPTIONAL = ("Groups of responses", "Runs of one stage")  # of some pages only


def write_report(run_dirs: list[Path], out: Path, axis: str = "step") -> Path:
    """Write the page to `out`, replacing an older one, and return `out`.

    `run_dirs` are runs, or directories that contain runs. `axis` is the x axis of the charts (one
    of AXES). Raises DataError for a path without a run, and for a run without the numbers of the
    axis. The page's notes name everything else that a run lacks.
    """
    return write_page(read_runs(run_dirs), out, axis)


def write_page(runs: Sequence[Run], out: Path, axis: str, reload_seconds: float = 0) -> Path:
    """`write_report` of runs that are already read; the page loads itself again if so asked."""
    for run in runs:
        if run.train and axis not in run.clock.axes:
            raise DataError(
                f"{run.path}: its metrics.jsonl has no numbers for --axis {axis}; use --axis step"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    begin_phase(f"drawing {counted(len(runs), 'run')}")
    html = render(runs, axis, reload_seconds)
    write_atomically(out, html.encode("utf-8", errors="replace"))
    return out


def render(runs: Sequence[Run], axis: str = "step", reload_seconds: float = 0) -> str:
    """The page's HTML."""
    rows, pairs = stage_rows(runs), twins(runs)
    is_twin = {id(twin) for twin in pairs.values()}
    trained = [run for run in runs if run.train]
    leaders = [run for run in trained if id(run) not in is_twin]
    title = chain(leaders or runs)
    sections = _sections(runs, leaders, rows, pairs, axis)
    missing = ", ".join(n for n, html in sections.items() if not html and n not in OPTIONAL)
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
    return _document(
        title,
        f'<body{_data(trained, axis, reload_seconds)}><header><p class="brand">InfiR2 training '
        f"report</p>{headline_html(leaders, title, rows, pairs)}"
        f'<nav aria-label="Sections">{nav}</nav></header>'
        f"<main>{_controls(trained)}{body}</main>{_footer(notes, reload_seconds)}",
    )


def _sections(
    runs: Sequence[Run],
    leaders: Sequence[Run],
    rows: Sequence[StageRow],
    pairs: Mapping[str, Run],
    axis: str,
) -> dict[str, str]:
    """HTML by heading."""
    trained, paths = [run for run in runs if run.train], Paths(runs)
    groups = [group for group in stages(trained) if len(_leading(group, leaders)) > 1]
    grouped = {id(run) for group in groups for run in group}
    num_drawn = max(1, len(leaders)) + sum(map(len, groups)) / 2
    drawing = Drawing(int(np.clip(POINT_BUDGET / (LINES_PER_RUN * num_drawn), 30, 400)), axis)
    return {
        "What improved": accuracy_html(rows),
        "FP8 against BF16": _precision(leaders, pairs, drawing, rows),
        "Runs of one stage": "".join(overlay_html(group, drawing) for group in groups),
        "Runs": runs_table(trained)
        + "".join(
            run_html(run, pairs.get(run.name), drawing, id(run) in grouped, paths)
            for run in leaders
        ),
        "Groups of responses": "".join(groups_html(run, PAGE_BYTES // len(runs)) for run in runs),
        "Sample responses": "".join(samples_html(r, SAMPLES_BYTES // len(runs)) for r in runs),
        "Configuration": "".join(recipe_html(run, paths) for run in runs),
        "Environment": environment_html(runs),
        "How to reproduce": commands_html(runs, paths),
    }


def _precision(
    leaders: Sequence[Run], pairs: Mapping[str, Run], drawing: Drawing, rows: Sequence[StageRow]
) -> str:
    html = ""
    for group in stages(leaders):
        own = [(run, pairs[run.name]) for run in group if run.name in pairs]
        html += across_html(own) + "".join(precision_section(*pair, drawing, rows) for pair in own)
    return html


def _leading(group: Sequence[Run], leaders: Sequence[Run]) -> list[Run]:
    return [run for run in group if any(run is leader for leader in leaders)]


def _data(trained: Sequence[Run], axis: str, reload_seconds: float) -> str:
    """Attributes of the body, for the script."""
    clocks = {run.name: run.clock.as_json() for run in trained}
    html = f' data-axis="{axis}" data-clocks="{escape(json.dumps(clocks))}"'
    return html + (f' data-reload="{reload_seconds:g}"' if reload_seconds else "")


def _controls(trained: Sequence[Run]) -> str:
    """The axis and the smoothing of all charts; the script shows them."""
    if not trained:
        return ""
    axes = [axis for axis in AXES if all(axis in run.clock.axes for run in trained)]
    options = "".join(f'<option value="{axis}">{axis}</option>' for axis in axes)
    return (
        f'<div class="controls" hidden><label>x axis <select>{options}</select></label>'
        '<label>Smoothing <input type="range" min="-5" max="100" step="5" value="-5"></label>'
        "<output>as drawn: a mean over a fortieth of the run</output></div>"
    )


def _document(title: str, body: str) -> str:
    """The page around its body, which is not closed yet."""
    style, names = _asset("style.css"), ("charts.js", "filters.js", "page.js")
    script = "\n".join(map(_asset, names))
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
        f"<title>InfiR2 report: {escape(title)}</title><style>{style}</style></head>"
        f"{body}<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("infir2.report").joinpath(name).read_text(encoding="utf-8")


def _footer(notes: Sequence[str], reload_seconds: float) -> str:
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    listed = f"<h2>Notes</h2><ul>{items}</ul>" if items else ""
    live = f" Loads itself again every {reload_seconds:g} s." if reload_seconds else ""
    return f'<footer>{listed}<p class="note">Written {written}.{live}</p></footer>'
