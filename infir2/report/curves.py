"""The charts of a run."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Literal, NamedTuple

from infir2.report.chart import Chart, Series, figure, smooth
from infir2.report.read import Run, Table
from infir2.report.text import counted

FP8, BF16, VALIDATION = 0, 1, 2  # colors
STEP_PARTS = ("generate", "update", "publish", "wait")  # the longest of an RL step
MISMATCH = (("kl", "KL"), ("mean", "mean"), ("p999", "99.9 %"), ("max", "max"))
UNANSWERED = (
    ("truncated_fraction", "truncated"),
    ("no_answer_fraction", "no answer"),
    ("verifier_timeout_fraction", "check timed out"),
    ("verifier_error_fraction", "check failed"),
)
GROUPS = (
    ("groups_sampled", "all"),
    ("groups_all_right", "all right"),
    ("groups_all_wrong", "all wrong"),
)


class Drawing(NamedTuple):
    """How a page's charts are drawn: vertices of a line, and the x axis (one of AXES)."""

    points: int
    axis: str = "step"


def window(table: Table) -> int:
    """The number of steps to smooth over: a fortieth of the run, odd."""
    return len(table) // 40 | 1


def curve(
    run: Run, column: str, label: str, color: int = 0, raw: bool = True, dashed: bool = False
) -> list[Series]:
    """The smoothed column, over a faint line of the single steps.

    Only the single steps if not `raw`, or if the run is too short to smooth.
    """
    style: Literal["line", "dashed"] = "dashed" if dashed else "line"
    x, y, width, clock = run.train.steps, run.train[column], window(run.train), run.clock
    if not raw or width < 3:
        return [Series(label, x, y, color, style, raw=y if raw else None, clock=clock)]
    return [
        Series(f"{label}, single steps", x, y, color, "faint", clock=clock),
        Series(label, x, smooth(y, width), color, style, raw=y, clock=clock),
    ]


def figures(charts: Sequence[Chart], drawing: Drawing) -> str:
    """HTML of the charts that have values, in a grid; those whose lines are flat are folded."""
    drawn = [replace(chart, axis=drawing.axis) for chart in charts if chart.drawable]
    steep, flat = (
        [figure(chart, drawing.points) for chart in drawn if chart.is_flat is wanted]
        for wanted in (False, True)
    )
    html = f'<div class="grid-3">{"".join(steep)}</div>' if steep else ""
    if flat:
        values = "; ".join(escape(chart.summary) for chart in drawn if chart.is_flat)
        summary = f"{counted(len(flat), 'flat chart')}: {values}"
        html += f'<details class="flat"><summary>{summary}</summary>'
        html += f'<div class="grid-3">{"".join(flat)}</div></details>'
    return html


def wide_figure(chart: Chart, drawing: Drawing, height: int) -> str:
    """HTML of a chart as wide as the page; "" without values."""
    if not chart.drawable:
        return ""
    return figure(replace(chart, axis=drawing.axis), 2 * drawing.points, height)


def loss_series(run: Run, twin: Run | None) -> tuple[Series, ...]:
    names = ("FP8", "BF16") if twin else ("training", "")
    series = curve(run, "loss", names[0], FP8) + (
        curve(twin, "loss", names[1], BF16, dashed=True) if twin else []
    )
    points = (
        [(twin, "BF16 validation", BF16), (run, "FP8 validation", FP8)]
        if twin
        else [(run, "validation", VALIDATION)]
    )
    for source, label, color in points:
        if source and source.validation.has("validation_loss"):
            series.append(
                Series(
                    label,
                    source.validation.steps,
                    source.validation["validation_loss"],
                    color,
                    "points",
                    clock=source.clock,
                )
            )
    return tuple(series)


def marks(run: Run) -> tuple[tuple[float, str], ...]:
    return tuple(
        (float(step), f"step {step:.0f} skipped")
        for step in run.train.steps[run.train["skipped"] == 1]
    )


def run_charts(run: Run, twin: Run | None, drawing: Drawing) -> str:
    """HTML of every chart that the run has data for.

    A BF16 twin's curves are in the same charts, except for the loss (`precision_section`).
    """
    loss = Chart(
        "Loss",
        loss_series(run, None),
        "policy loss" if run.is_rl else "nats per token",
        "auto",
        marks=marks(run),
    )
    rate = Chart(
        "Learning rate",
        tuple(curve(run, "learning_rate", "learning rate", raw=False)),
        from_zero=True,
    )
    charts = [*_rl_charts(run), loss, rate] if run.is_rl else [rate]
    for column, title, unit in (
        ("gradient_norm", "Gradient norm", "before clipping"),
        ("tokens_per_second", "Throughput", "tokens/s"),
    ):
        series = curve(run, column, "FP8" if twin else title.lower(), FP8)
        series += curve(twin, column, "BF16", BF16, dashed=True) if twin else []
        speed = column == "tokens_per_second"
        charts.append(
            Chart(title, tuple(series), unit, "linear" if speed else "auto", from_zero=speed)
        )
    is_first = not run.is_rl and not twin
    return (wide_figure(loss, drawing, 250) if is_first else "") + figures(charts, drawing)


def _rl_charts(run: Run) -> list[Chart]:
    table = run.train

    def lines(*columns: tuple[str, str], raw: bool = True) -> tuple[Series, ...]:
        present = [(column, label) for column, label in columns if table.has(column)]
        return tuple(
            series
            for color, (column, label) in enumerate(present)
            for series in curve(run, column, label, color, raw, dashed=color == 1)
        )

    capped = lines(("clip_fraction", "clip"), ("capped_fraction", "importance capped"))
    unanswered = lines(*UNANSWERED)
    mismatch = lines(*((f"mismatch_{name}", label) for name, label in MISMATCH), raw=False)
    scores = run.evaluations
    ends = (scores["low"], scores["high"])
    average = Series("avg@k", scores.steps, scores["avg_at_k"], 0, "line", *ends, clock=run.clock)
    best = Series("pass@k", scores.steps, scores["pass_at_k"], 2, clock=run.clock)
    return [
        Chart("Reward", lines(("reward", "reward")), "training prompts", from_zero=True),
        Chart(
            "Accuracy", lines(("accuracy", "accuracy")), "training prompts", "linear", True, True
        ),
        Chart("Evaluation in the loop", (average, best), "held-out problems", percent=True),
        Chart(
            "Response length", lines(("response_tokens", "length")), "tokens, mean", from_zero=True
        ),
        Chart(
            "Truncated, without answer", unanswered, "of responses", percent=True, from_zero=True
        ),
        Chart("Entropy", lines(("entropy", "entropy")), "nats per token", from_zero=True),
        Chart("Clipped and capped", capped, "of tokens", percent=True, from_zero=True),
        Chart("Rollout against trainer", mismatch, "KL, |Δ log-prob|", "log"),
        Chart("Groups", lines(*GROUPS), "in a step", from_zero=True),
        Chart(
            "Time of a step",
            lines(("seconds", "all"), *((f"{part}_seconds", part) for part in STEP_PARTS)),
            "seconds",
            from_zero=True,
        ),
    ]
