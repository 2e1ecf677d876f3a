"""Runs of one stage in the same charts, and the keys in which their recipes differ."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from typing import Any, Literal, NamedTuple

from infir2.report.chart import Chart, Series
from infir2.report.curves import Drawing, curve, figures, wide_figure
from infir2.report.read import Run
from infir2.report.text import html_table

COLORS = 8  # of style.css
FAINT_RUNS = 3  # with more, single steps would hide the lines
KEYS_OPEN, KEYS_SHOWN, VALUE_CHARACTERS = 12, 200, 60
OWN_KEYS = ("run.dir",)  # of each run in any case


class Quantity(NamedTuple):
    """A column of the train lines (`table` "train") or of others, and how it is charted."""

    table: str
    column: str
    title: str
    unit: str = ""
    percent: bool = False
    from_zero: bool = False
    auto: bool = False
    smooth: bool = True


LOSS = Quantity("train", "loss", "Training loss", "nats per token", auto=True)
QUANTITIES = (
    Quantity("validation", "validation_loss", "Validation loss", "nats per token", auto=True),
    Quantity("train", "learning_rate", "Learning rate", from_zero=True, smooth=False),
    Quantity("train", "gradient_norm", "Gradient norm", "before clipping", auto=True),
    Quantity("train", "tokens_per_second", "Throughput", "tokens/s", from_zero=True),
    Quantity("train", "peak_memory_bytes", "Peak memory", "bytes", from_zero=True, smooth=False),
)
REWARD = Quantity("train", "reward", "Reward", "training prompts", from_zero=True)
RL_QUANTITIES = (
    Quantity("evaluations", "avg_at_k", "Evaluation in the loop", "held-out problems, avg@k", True),
    Quantity("train", "accuracy", "Accuracy", "training prompts", True, True),
    Quantity("train", "response_tokens", "Response length", "tokens, mean", from_zero=True),
    Quantity("train", "truncated_fraction", "Truncated", "of responses", True, True),
    Quantity("train", "entropy", "Entropy", "nats per token", from_zero=True),
    Quantity("train", "mismatch_kl", "Rollout against trainer", "KL", auto=True),
    Quantity("train", "seconds", "Time of a step", "seconds", from_zero=True),
)


def stages(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that are the same stage: of one kind, and as many stages after the first of a chain.

    Example: [cpt, a/sft, b/sft, b/rl] -> [[cpt], [a/sft, b/sft], [b/rl]].
    """
    found: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        found.setdefault((run.kind, _depth(run, runs)), []).append(run)
    return list(found.values())


def _depth(run: Run, runs: Sequence[Run]) -> int:
    seen = {run.name}
    while parent := next((r for r in runs if run.starts_from(r) and r.name not in seen), None):
        seen.add(parent.name)
        run = parent
    return len(seen) - 1


def overlay_html(runs: Sequence[Run], drawing: Drawing) -> str:
    """HTML: two or more runs of one stage in the same charts, and what their recipes differ in."""
    is_rl = any(run.is_rl for run in runs)
    first, others = (REWARD, (*RL_QUANTITIES, LOSS, *QUANTITIES)) if is_rl else (LOSS, QUANTITIES)
    html = f"<h3>{escape(', '.join(run.name for run in runs))}</h3>{differing_keys_html(runs)}"
    html += wide_figure(_chart(first, runs), drawing, 300)
    return html + figures([_chart(each, runs) for each in others], drawing)


def _chart(quantity: Quantity, runs: Sequence[Run]) -> Chart:
    unit = "policy loss" if quantity is LOSS and any(r.is_rl for r in runs) else quantity.unit
    return Chart(
        quantity.title,
        tuple(line for index in range(len(runs)) for line in _lines(quantity, index, runs)),
        unit,
        "auto" if quantity.auto else "linear",
        quantity.percent,
        quantity.from_zero,
        short_labels=True,
    )


def _lines(quantity: Quantity, index: int, runs: Sequence[Run]) -> Iterator[Series]:
    run = runs[index]
    table = getattr(run, quantity.table)
    if not table.has(quantity.column):
        return
    color, is_dashed = index % COLORS, index >= COLORS
    if quantity.table == "train":
        lines = curve(run, quantity.column, run.name, color, quantity.smooth, is_dashed)
        yield from lines if len(runs) <= FAINT_RUNS else lines[-1:]
        return
    style: Literal["line", "dashed"] = "dashed" if is_dashed else "line"
    line = Series(run.name, table.steps, table[quantity.column], color, style, clock=run.clock)
    if quantity.table == "evaluations":
        line = replace(line, low=table["low"], high=table["high"])
    yield line


def flat_keys(value: Any, prefix: str = "") -> dict[str, str]:
    """A recipe's values as text, by dotted key.

    Example: {"data": {"sources": [{"path": "a"}]}} -> {"data.sources.0.path": "a"}.
    """
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        items = list(enumerate(value))
    else:
        return {prefix: str(value).lower() if isinstance(value, bool) else str(value)}
    return {
        key: text
        for name, each in items
        for key, text in flat_keys(each, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def differing_keys(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{key: its value in each run, "–" where it is not set}, for keys that differ."""
    recipes = [flat_keys(run.recipe) for run in runs]
    keys = [key for key in dict.fromkeys(k for recipe in recipes for k in recipe)]
    values = {key: [recipe.get(key, "–") for recipe in recipes] for key in keys}
    return {k: row for k, row in values.items() if len(set(row)) > 1 and k not in OWN_KEYS}


def differing_keys_html(runs: Sequence[Run]) -> str:
    """A table of the keys that differ between the recipes, or a sentence."""
    if not all(run.recipe for run in runs):
        return '<p class="note">A run without recipe.toml: recipes are not compared.</p>'
    different = differing_keys(runs)
    if not different:
        return '<p class="note">The recipes differ in nothing but run.dir.</p>'
    rows = [
        [escape(key), *(escape(_short(value)) for value in values)]
        for key, values in list(different.items())[:KEYS_SHOWN]
    ]
    head = ["key that differs", *(escape(run.name) for run in runs)]
    left_out = len(different) - len(rows)
    note = f'<p class="note">{left_out} more keys differ.</p>' if left_out else ""
    html = html_table(head, rows, text_columns=len(head), stack=len(runs) > 2) + note
    if len(rows) <= KEYS_OPEN:
        return html
    return f"<details><summary>{len(different)} keys differ</summary>{html}</details>"


def _short(text: str) -> str:
    return text if len(text) <= VALUE_CHARACTERS else f"{text[: VALUE_CHARACTERS - 1]}…"
