"""What each run did: a table of all, and the charts and events of one."""

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from infir2.convert.weights import parameter_shapes
from infir2.errors import CheckpointError
from infir2.report.commands import Paths
from infir2.report.curves import Drawing, run_charts
from infir2.report.loop_change import loop_change
from infir2.report.read import Run
from infir2.report.text import compact, counted, duration, html_table

EVENTS_SHOWN, NAN = 40, math.nan
_TABLE_NOTE = (
    "Training loss: mean over the last fortieth of the steps, on training data. Validation loss: "
    "of the last validation, on data that is not trained on. TFLOP/s: 6 x parameters of the "
    "matrices x tokens/s, without attention, all processes together. Peak memory: of rank 0, its "
    "GPU's where there is one."
)


def parameter_count(config: Mapping[str, Any]) -> int:
    """The number of parameters of a Hugging Face configuration; 0 for an impossible one."""
    try:
        return sum(math.prod(shape) for shape in parameter_shapes(config).values())
    except (CheckpointError, ArithmeticError, RuntimeError, TypeError, ValueError):
        return 0


def flops_per_token(config: Mapping[str, Any]) -> int:
    """Of forward and backward: 6 per parameter of a matrix, the head among them; 0 if unknown.

    Attention's own products are left out: they depend on the lengths of the documents.
    """
    try:
        shapes = parameter_shapes(config)
    except (CheckpointError, ArithmeticError, RuntimeError, TypeError, ValueError):
        return 0
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    is_tied = not any(name.startswith("lm_head") for name in matrices)
    return 6 * sum(n for name, n in matrices.items() if is_tied or "embed_tokens" not in name)


def tera_flops(run: Run) -> float:
    """TFLOP/s of all processes together, at the median throughput; NaN if unknown, and for RL,
    where most of a step is sampling."""
    flops = 0 if run.is_rl else flops_per_token(run.state.get("model_config") or {})
    speed = run.train["tokens_per_second"]
    return flops * float(np.nanmedian(speed)) / 1e12 if flops and np.isfinite(speed).any() else NAN


def started_text(run: Run) -> str:
    """'2026-11-30 20:28 UTC', or a dash."""
    if not math.isfinite(run.started):
        return "–"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.started))


def peak_memory(run: Run) -> float:
    """Bytes of GPU memory, without a GPU of the process; NaN if the run did not record them."""
    values = run.train["peak_memory_bytes"]
    return float(np.nanmax(values)) if np.isfinite(values).any() else NAN


def precision_text(run: Run) -> str:
    if run.fp8 is None:
        return "–"
    scales = run.recipe.get("fp8", {}).get("scale_format", "pow2")
    return f"FP8, {scales} scales" if run.fp8 else "BF16"


def runs_table(runs: Sequence[Run]) -> str:
    """HTML: one row for each run; training and validation numbers in columns of their own."""
    if not runs:
        return ""
    columns = [_columns(run) for run in runs]
    names = [name for name in columns[0] if any(row[name] != "–" for row in columns)]
    rows = [
        [escape(run.name), *(escape(row[name]) for name in names)]
        for run, row in zip(runs, columns, strict=True)
    ]
    table = html_table(["run", *map(escape, names)], rows, stack=True)
    return f'{table}<p class="note">{_TABLE_NOTE}</p>'


def _columns(run: Run) -> dict[str, str]:
    loss, checked = run.train["loss"], run.validation["validation_loss"]
    last = loss[np.isfinite(loss)][-max(1, len(run.train) // 40) :]
    checked = checked[np.isfinite(checked)]
    seconds, memory = run.total("seconds"), peak_memory(run)
    speed = run.train["tokens_per_second"]
    return {
        "precision": precision_text(run),
        "started": started_text(run),
        "steps": f"{run.num_steps:,}",
        "trained tokens": compact(run.total("trained_tokens") or NAN),
        "training time": duration(seconds) if seconds else "–",
        "training loss": compact(float(last.mean())) if len(last) and not run.is_rl else "–",
        "validation loss": compact(float(checked[-1])) if len(checked) else "–",
        "tokens/s": compact(float(np.nanmedian(speed))) if np.isfinite(speed).any() else "–",
        "TFLOP/s": compact(tera_flops(run)),
        "peak memory": f"{compact(memory / 1e9)} GB" if math.isfinite(memory) else "–",
    }


def run_html(run: Run, twin: Run | None, drawing: Drawing, is_folded: bool, paths: Paths) -> str:
    """HTML: charts and events of a run, folded where its curves are already in an overlay."""
    facts = [counted(run.num_steps, "step"), precision_text(run)]
    facts += [f"from {paths.portable(run.base)}"] if run.base else []
    num_skipped = int(np.nansum(run.train["skipped"]))
    facts += [f"{counted(num_skipped, 'step')} skipped"] if num_skipped else []
    text = f'<p class="facts">{escape(" · ".join(fact for fact in facts if fact != "–"))}</p>'
    html = text + _loop_html(run) + run_charts(run, twin, drawing) + _events(run)
    if not is_folded:
        return f"<h3>{escape(run.name)}</h3>{html}"
    return f"<details><summary>Charts of {escape(run.name)}</summary>{html}</details>"


def _loop_html(run: Run) -> str:
    """What the run's own evaluations say of it."""
    loop = loop_change(run)
    if not loop:
        return ""
    count = loop.change.num_paired
    how = f"paired over {counted(count, 'question')}" if count else "as of independent questions"
    return (
        f'<p class="facts">Evaluation in the loop, held-out problems: <b>{escape(loop.text)}</b> '
        f"(95 % interval, {how}).</p>"
    )


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
