"""One self-contained HTML page from run directories: headline, accuracy by stage, FP8 against BF16, every run, samples, recipe.

The page loads nothing from anywhere. All text of models and data is escaped, and a content security policy allows the
page's own script only.
"""

import base64
import hashlib
import math
import os
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from infir2.report.chart import IntervalRow, compact, interval_svg, percent, signed_percent
from infir2.report.curves import final_difference, precision_section, run_charts, twins
from infir2.report.read import EVALUATION_PREFIX, Run, SampleResponse, find_runs, read_run
from infir2.report.stages import StageRow, accuracy_text, change_text, stage_rows

POINT_BUDGET = 36_000  # vertices drawn on a page, about 25 bytes each
SAMPLES_PER_RUN, SAMPLE_CHARACTERS, RECIPE_CHARACTERS, EVENTS_SHOWN = 8, 6_000, 30_000, 40


@dataclass(frozen=True)
class Section:
    """A part of the page: the anchor, the heading and the HTML below it."""

    anchor: str
    title: str
    html: str


def write_report(run_dirs: list[Path], out: Path) -> Path:
    """Write the page of these runs (or of a directory of runs) to `out`, replacing an older one. Returns `out`.

    Raises DataError when a path holds no run. Whatever else a run lacks is left out of the page and named in its notes.
    """
    runs = [read_run(path) for path in find_runs(run_dirs)]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(render(runs), encoding="utf-8")
    temporary.replace(out)
    return out


def render(runs: Sequence[Run]) -> str:
    """The page's HTML."""
    rows = stage_rows(runs)
    pairs = twins(runs)
    leaders = [run for run in runs if len(run.train) and run not in pairs.values()]
    points = int(np.clip(POINT_BUDGET / (25 * max(1, len(leaders))), 40, 400))
    sections = [
        Section("accuracy", "What improved", _accuracy(rows)),
        Section(
            "precision", "FP8 against BF16", "".join(precision_section(fp8, pairs[fp8.name], points) for fp8 in runs if fp8.name in pairs)
        ),
        Section("runs", "Runs", "".join(_run(run, pairs.get(run.name), points, alone=len(runs) == 1) for run in leaders)),
        Section("samples", "Sample responses", "".join(_samples(run) for run in runs)),
        Section("recipe", "Configuration", "".join(_recipe(run) for run in runs)),
        Section("environment", "Environment", _environment(runs)),
        Section("reproduce", "How to reproduce", _reproduce(runs)),
    ]
    shown = [section for section in sections if section.html]
    missing = [section.title.lower() for section in sections if not section.html]
    title = " · ".join(run.name for run in runs[:6]) + (" …" if len(runs) > 6 else "")
    nav = "".join(f'<a href="#{section.anchor}">{section.title}</a>' for section in shown)
    body = "".join(f'<section id="{part.anchor}"><h2>{part.title}</h2>{part.html}</section>' for part in shown)
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    if missing:
        notes.insert(0, f"Nothing recorded for: {', '.join(missing)}")
    script = _asset("hover.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>InfiR2 report: {escape(title)}</title><style>{_asset('style.css')}</style></head><body>"
        f'<header><p class="brand">InfiR2 training report</p>{_headline(runs, leaders, rows, pairs)}<nav aria-label="Sections">{nav}</nav></header>'
        f"<main>{body}{_notes(notes)}</main><script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("infir2.report").joinpath(name).read_text(encoding="utf-8")


def parameter_count(config: dict[str, Any]) -> int:
    """Parameters of a Qwen2, Qwen3 or Llama model from its Hugging Face configuration; 0 when a size is missing."""
    try:
        width, ffn, layers, heads = (
            int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        )
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head = int(config.get("head_dim") or width // heads)
        embedding = int(config["vocab_size"]) * width * (1 if config.get("tie_word_embeddings") else 2)
    except (KeyError, TypeError, ValueError):
        return 0
    attention = 2 * width * head * (heads + kv_heads)
    if config.get("model_type") == "qwen2":
        attention += head * (heads + 2 * kv_heads)
    if config.get("model_type") == "qwen3":
        attention += 2 * head
    return embedding + width + layers * (attention + 3 * width * ffn + 2 * width)


def _headline(runs: Sequence[Run], leaders: Sequence[Run], rows: Sequence[StageRow], pairs: dict[str, Run]) -> str:
    sizes = [parameter_count(run.state.get("model_config") or {}) for run in runs]
    kinds = {str(run.state["model_config"].get("model_type", "")) for run, size in zip(runs, sizes, strict=True) if size}
    seconds = sum(run.total("seconds") for run in runs)
    tiles = [
        (
            "model",
            compact(max(sizes)) if sizes and max(sizes) else "",
            f"parameters, {', '.join(sorted(kinds))}" if kinds - {""} else "parameters",
        ),
        (
            "steps",
            f"{sum(_steps(run) for run in leaders):,}" if leaders else "",
            f"optimizer steps in {len(leaders)} {'run' if len(leaders) == 1 else 'stages'}",
        ),
        ("tokens", compact(sum(run.total("trained_tokens") for run in leaders)) if leaders else "", "trained tokens"),
        ("time", duration(seconds) if seconds else "", "wall time of all steps" + (", BF16 twins included" if pairs else "")),
    ]
    scored = [row for row in rows if math.isfinite(row.evaluation.avg_at_k)]
    if scored:
        tiles.append(("accuracy", accuracy_text(scored[-1].evaluation), f"avg@{scored[-1].evaluation.k} after {scored[-1].stage}"))
    html = "".join(
        f'<div class="tile t-{name}"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for name, value, text in tiles if value
    )
    return f"<h1>{escape(_sentence(leaders, scored, pairs, runs))}</h1>" + (f'<div class="tiles">{html}</div>' if html else "")


def _sentence(leaders: Sequence[Run], scored: Sequence[StageRow], pairs: dict[str, Run], runs: Sequence[Run]) -> str:
    """What was trained and what came of it."""
    names = " → ".join(run.name for run in leaders) or ", ".join(run.name for run in runs)
    precision = {run.fp8 for run in leaders} - {None}
    start = f"{names}{' in FP8' if precision == {True} else ' in BF16' if precision == {False} else ''}"
    parts = []
    if len(scored) > 1:
        first, last = scored[0], scored[-1]
        parts.append(
            f"accuracy {percent(first.evaluation.avg_at_k)} after {first.stage}, {percent(last.evaluation.avg_at_k)} after {last.stage}"
        )
    for fp8 in (run for run in leaders if run.name in pairs):
        difference = final_difference(fp8, pairs[fp8.name])
        if difference:
            parts.append(f"{difference.what} {signed_percent(difference.relative)} from BF16")
    return start + (": " + "; ".join(parts) if parts else "")


def duration(seconds: float) -> str:
    """'2 h 05 min', '12 min', '40 s'."""
    if seconds >= 5940:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min" if hours < 100 else f"{hours / 24:.1f} days"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _steps(run: Run) -> int:
    return int(run.train.steps[-1] - run.train.steps[0]) + 1


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table that scrolls in its own box; cells are HTML, the first column names the row, later ones are numbers."""
    cells = "".join(f'<th scope="col"{"" if index < text_columns else " class=num"}>{name}</th>' for index, name in enumerate(head))
    body = []
    for row in rows:
        rest = "".join(
            value if value.startswith("<td") else f"<td{'' if index < text_columns else ' class=num'}>{value}</td>"
            for index, value in enumerate(row[1:], 1)
        )
        body.append(f'<tr><th scope="row">{row[0]}</th>{rest}</tr>')
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _accuracy(rows: Sequence[StageRow]) -> str:
    if not rows:
        return ""
    dots = [IntervalRow(row.stage, row.evaluation.avg_at_k, row.evaluation.interval, row.evaluation.pass_at_k) for row in rows]
    charts = "".join(
        f'<div class="{name}">{interval_svg(dots, "avg@k by stage", "pass@k", width)}</div>'
        for name, width in (("wide", 1080), ("narrow", 360))
    )
    keys = '<p class="keys"><span class="key points k0">avg@k with 95 % interval</span><span class="key ring k0">pass@k</span></p>'
    head = ("stage", "avg@k", "change", "pass@k", "truncated", "k", "problems", "step")
    body = []
    for row in rows:
        result = row.evaluation
        sure = math.isfinite(row.change_interval) and abs(row.change) > row.change_interval
        change = f"<b>{change_text(row)}</b>" if sure else change_text(row)
        against = f" <small>from {escape(row.compared_with)}</small>" if row.compared_with else ""
        counts = [str(value or "–") for value in (result.k, result.num_problems, result.step)]
        body.append(
            [
                escape(row.stage),
                accuracy_text(result),
                change + against,
                percent(result.pass_at_k),
                percent(result.truncated_fraction),
                *counts,
            ]
        )
    note = '<p class="note">± is the half-width of a 95 % interval. A change in bold is larger than its own interval.</p>'
    return f'<figure class="card"><figcaption><h4>Accuracy on held-out problems</h4>{keys}</figcaption>{charts}</figure>{table(head, body)}{note}{_difficulty(rows)}'


def _difficulty(rows: Sequence[StageRow]) -> str:
    levels = sorted({level for row in rows for level in row.evaluation.by_difficulty}, key=lambda level: (len(level), level))
    if not levels:
        return ""
    body = []
    for row in rows:
        values = [row.evaluation.by_difficulty.get(level, math.nan) for level in levels]
        body.append(
            [
                escape(row.stage),
                *(
                    f'<td class="num heat" style="--v:{value if math.isfinite(value) else 0:.3f}">{percent(value, 0)}</td>'
                    for value in values
                ),
            ]
        )
    return f"<h3>By difficulty</h3>{table(['stage', *(escape(level) for level in levels)], body)}"


def _run(run: Run, twin: Run | None, points: int, alone: bool) -> str:
    facts = [f"{_steps(run):,} steps", f"{compact(run.total('trained_tokens'))} trained tokens", duration(run.total("seconds"))]
    if run.fp8 is not None:
        facts.append(f"FP8 ({run.recipe.get('fp8', {}).get('scale_format', 'pow2')} scales)" if run.fp8 else "BF16")
    if run.base:
        facts.append(f"from {run.base}")
    if twin:
        facts.append(f"dashed: {twin.name}")
    heading = "" if alone else f'<h3 id="run-{escape(run.name)}">{escape(run.name)}</h3>'
    return f'{heading}<p class="facts">{escape(" · ".join(facts))}</p><div class="grid-3">{"".join(run_charts(run, twin, points))}</div>{_events(run)}'


def _events(run: Run) -> str:
    skipped = int(np.nansum(run.train["skipped"])) if run.train.has("skipped") else 0
    if not run.events:
        return f'<p class="note">{skipped} skipped steps, no events.</p>'
    rows = [
        [str(event.get("step", "–")), escape(str(event.get("event", ""))), escape(str(event.get("detail", ""))[:400])]
        for event in run.events[-EVENTS_SHOWN:]
    ]
    more = f", the last {EVENTS_SHOWN} shown" if len(run.events) > EVENTS_SHOWN else ""
    summary = (
        f"{skipped} skipped {'step' if skipped == 1 else 'steps'}, {len(run.events)} {'event' if len(run.events) == 1 else 'events'}{more}"
    )
    return f"<details><summary>{summary}</summary>{table(('step', 'event', 'detail'), rows, text_columns=3)}</details>"


def pick_samples(samples: Sequence[SampleResponse], count: int) -> list[SampleResponse]:
    """Some of the first step and more of the last; within a step rewards and prompts take turns."""
    steps = sorted({sample.step for sample in samples})
    quotas = [(steps[0], count // 4), (steps[-1], count - count // 4)] if len(steps) > 1 else [(step, count) for step in steps]
    picked: list[SampleResponse] = []
    for step, quota in quotas:
        left = [sample for sample in samples if sample.step == step]
        taken: list[SampleResponse] = []
        while left and len(taken) < quota:
            best = min(
                left,
                key=lambda item: (
                    sum((item.reward > 0) == (old.reward > 0) for old in taken) + 2 * sum(item.prompt == old.prompt for old in taken)
                ),
            )
            left.remove(best)
            taken.append(best)
        picked += taken
    return picked


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    items = []
    for sample in pick_samples(run.samples, SAMPLES_PER_RUN):
        reward = f"reward {compact(sample.reward)}"
        badges = f'<span class="badge {"good" if sample.reward > 0 else "bad"}">{reward}</span>' + (
            '<span class="badge">truncated</span>' if sample.truncated else ""
        )
        question = " ".join(sample.prompt.split())
        items.append(
            f'<details class="sample"><summary><span class="step">step {sample.step}</span>{badges}<span class="question">{escape(question[:160])}</span></summary>'
            f"<dl><dt>Prompt</dt><dd><pre>{_long(sample.prompt)}</pre></dd><dt>Response</dt><dd><pre>{_long(sample.response)}</pre></dd>"
            f"<dt>Expected answer</dt><dd><pre>{_long(sample.answer)}</pre></dd></dl></details>"
        )
    return f"<h3>{escape(run.name)}</h3>{''.join(items)}"


def _long(text: str) -> str:
    """Escaped text, with the middle of a very long one left out."""
    if len(text) <= SAMPLE_CHARACTERS:
        return escape(text) or "–"
    half = SAMPLE_CHARACTERS // 2
    return f"{escape(text[:half])}\n<i>[… {len(text) - 2 * half:,} characters left out …]</i>\n{escape(text[-half:])}"


def _recipe(run: Run) -> str:
    if not run.recipe_text:
        return ""
    text = run.recipe_text[:RECIPE_CHARACTERS]
    more = "\n# … cut here; the run directory has all of it" if len(run.recipe_text) > len(text) else ""
    return f"<details><summary>{escape(run.name)}/recipe.toml</summary><pre>{escape(text)}{more}</pre></details>"


def _environment(runs: Sequence[Run]) -> str:
    """One column for the runs that agree, else one column for each run."""
    flat = {run.name: dict(_flatten(run.environment)) for run in runs if run.environment}
    for values in flat.values():
        values.pop("command", None)
    if not flat:
        return ""
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    same = all(values == next(iter(flat.values())) for values in flat.values())
    columns = {"all runs" if len(flat) > 1 else next(iter(flat)): next(iter(flat.values()))} if same else flat
    rows = [[escape(key), *(escape(values.get(key, "–")) for values in columns.values())] for key in keys]
    return table(["", *(escape(name) for name in columns)], rows, text_columns=len(columns) + 1)


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, item)) if isinstance(item, list) else str(item)


def _reproduce(runs: Sequence[Run]) -> str:
    """The commands as they were given; the resolved recipe serves where a command was not recorded."""
    lines = []
    for run in runs:
        command = run.environment.get("command")
        if isinstance(command, list) and command:
            lines.append(shlex.join([Path(str(command[0])).name, *map(str, command[1:])]))
        elif isinstance(command, str) and command:
            lines.append(command)
        elif run.recipe and run.state.get("kind"):
            lines.append(f"infir2 {run.state['kind']} {shlex.quote(f'{run.path}/recipe.toml')}")
    if not lines:
        return ""
    commits = sorted({str(run.environment["commit"]) for run in runs if run.environment.get("commit")})
    note = f"Commit {', '.join(commits)}. " if commits else ""
    note += "Data order, initial weights and sampling follow from run.seed; each run directory's recipe.toml has every value used."
    return f"<pre>{escape(chr(10).join(dict.fromkeys(lines)))}</pre><p class=note>{escape(note)}</p>"


def _notes(notes: Sequence[str]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<footer>{f"<h2>Notes</h2><ul>{items}</ul>" if items else ""}<p class="note">Written {written}.</p></footer>'


__all__ = ["EVALUATION_PREFIX", "render", "write_report"]
