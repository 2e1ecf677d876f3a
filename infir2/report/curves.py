"""The charts of a run, and the comparison of an FP8 run with its BF16 twin."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from infir2.report.chart import Chart, Series, figure, smooth
from infir2.report.read import Run, Table
from infir2.report.text import counted, percent

FP8, BF16, VALIDATION = 0, 1, 2  # colors
STEP_PARTS = ("generate", "update", "publish", "wait")  # the longest of an RL step
MISMATCH = (("kl", "KL"), ("mean", "mean"), ("p999", "99.9 %"), ("max", "max"))
UNANSWERED = (
    ("truncated_fraction", "truncated"),
    ("no_answer_fraction", "no answer"),
    ("verifier_failed_fraction", "not judged"),
)
GROUPS = (
    ("groups_sampled", "all"),
    ("groups_all_right", "all right"),
    ("groups_all_wrong", "all wrong"),
)


@dataclass(frozen=True)
class Difference:
    """A loss of an FP8 run and of its BF16 twin.

    Example: Difference("validation loss", 300, 1.930, 1.926)
    """

    name: str
    step: int
    fp8: float
    bf16: float

    @property
    def text(self) -> str:
        relative = (self.fp8 - self.bf16) / self.bf16
        return f"{percent(abs(relative), 2)} {'above' if relative >= 0 else 'below'} BF16"


def twins(runs: Sequence[Run]) -> dict[str, Run]:
    """{name of an FP8 run: its BF16 twin}.

    A twin has the same recipe but for `[run]` and `[fp8]`, or the name NAME-bf16.
    """

    def are_twins(fp8: Run, bf16: Run) -> bool:
        left, right = (
            {name: section for name, section in run.recipe.items() if name not in ("run", "fp8")}
            for run in (fp8, bf16)
        )
        return bf16.name == f"{fp8.name}-bf16" or (bool(right) and left == right)

    trained = [run for run in runs if run.train]
    pairs: dict[str, Run] = {}
    for bf16 in (run for run in trained if run.fp8 is not True):
        free = (
            run
            for run in trained
            if run is not bf16 and run.fp8 is not False and run.name not in pairs
        )
        if fp8 := next((run for run in free if are_twins(run, bf16)), None):
            pairs[fp8.name] = bf16
    return pairs


def window(table: Table) -> int:
    """The number of steps to smooth over: a fortieth of the run, odd."""
    return len(table) // 40 | 1


def final_difference(fp8: Run, bf16: Run) -> Difference | None:
    """The difference at the last common validation, or over the last window of training steps."""
    pairs = (
        ("validation loss", fp8.validation, bf16.validation, "validation_loss", 1),
        ("training loss", fp8.train, bf16.train, "loss", window(fp8.train)),
    )
    for name, left, right, column, count in pairs:
        steps, a, b = np.intersect1d(left.steps, right.steps, return_indices=True)
        values = np.stack([left[column][a], right[column][b]]) if len(steps) else np.empty((2, 0))
        last = np.flatnonzero(np.isfinite(values).all(axis=0))[-count:]
        if len(last):
            mean_fp8, mean_bf16 = values[:, last].mean(axis=1)
            step = int(steps[last[-1]])
            return Difference(name, step, float(mean_fp8), float(mean_bf16)) if mean_bf16 else None
    return None


def curve(
    table: Table, column: str, label: str, color: int = 0, raw: bool = True, dashed: bool = False
) -> list[Series]:
    """The smoothed column, over a faint line of the single steps.

    Only the single steps if not `raw`, or if the run is too short to smooth.
    """
    style: Literal["line", "dashed"] = "dashed" if dashed else "line"
    x, y, width = table.steps, table[column], window(table)
    if not raw or width < 3:
        return [Series(label, x, y, color, style)]
    return [
        Series(f"{label}, single steps", x, y, color, "faint"),
        Series(label, x, smooth(y, width), color, style),
    ]


def _loss_series(run: Run, twin: Run | None) -> tuple[Series, ...]:
    names = ("FP8", "BF16") if twin else ("training", "")
    series = curve(run.train, "loss", names[0], FP8) + (
        curve(twin.train, "loss", names[1], BF16, dashed=True) if twin else []
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
                )
            )
    return tuple(series)


def _marks(run: Run) -> tuple[tuple[float, str], ...]:
    return tuple(
        (float(step), f"step {step:.0f} skipped")
        for step in run.train.steps[run.train["skipped"] == 1]
    )


def precision_section(fp8: Run, bf16: Run, points: int) -> str:
    """HTML: the loss of both in one chart, and the relative difference of the smoothed losses."""
    html, width = f"<h3>{escape(fp8.name)}</h3>", window(fp8.train)
    final = final_difference(fp8, bf16)
    if final:
        values = f"{final.name} {final.fp8:.4f} in FP8, {final.bf16:.4f} in BF16"
        html += f'<p class="facts">At step {final.step}: {values}, <b>{final.text}</b>.</p>'
    note = f"Lines are means over {width} steps, faint lines the single steps." if width > 1 else ""
    loss = Chart(
        f"Loss of {fp8.name} and {bf16.name}",
        _loss_series(fp8, bf16),
        "nats per token",
        "auto",
        marks=_marks(fp8),
        note=note,
    )
    steps, left, right = np.intersect1d(fp8.train.steps, bf16.train.steps, return_indices=True)
    loss_fp8, loss_bf16 = fp8.train["loss"][left], bf16.train["loss"][right]
    gaps = np.full_like(loss_fp8, np.nan)
    ratio = np.divide(loss_fp8 - loss_bf16, loss_bf16, out=gaps, where=loss_bf16 != 0)
    width = min(4 * width + 1, (len(steps) - 1) | 1) if len(steps) else 1
    relative = Series("(FP8 − BF16) / BF16", steps, smooth(ratio, width))
    note = f"Mean over {counted(width, 'step')}."
    difference = Chart(
        "Training loss, (FP8 − BF16) / BF16", (relative,), percent=True, from_zero=True, note=note
    )
    return html + "".join(
        figure(chart, 2 * points, height)
        for chart, height in ((loss, 340), (difference, 220))
        if chart.drawable
    )


def run_charts(run: Run, twin: Run | None, points: int) -> str:
    """HTML of every chart that the run has data for.

    A BF16 twin's curves are in the same charts, except for the loss (`precision_section`).
    """
    loss = Chart(
        "Loss",
        _loss_series(run, None),
        "policy loss" if run.is_rl else "nats per token",
        "auto",
        marks=_marks(run),
    )
    rate = Chart(
        "Learning rate",
        tuple(curve(run.train, "learning_rate", "learning rate", raw=False)),
        from_zero=True,
    )
    charts = [*_rl_charts(run), loss, rate] if run.is_rl else [rate]
    for column, title, unit in (
        ("gradient_norm", "Gradient norm", "before clipping"),
        ("tokens_per_second", "Throughput", "tokens/s"),
    ):
        series = curve(run.train, column, "FP8" if twin else title.lower(), FP8)
        series += curve(twin.train, column, "BF16", BF16, dashed=True) if twin else []
        speed = column == "tokens_per_second"
        charts.append(
            Chart(title, tuple(series), unit, "linear" if speed else "auto", from_zero=speed)
        )
    first = (
        figure(loss, 2 * points, wide_height=250)
        if loss.drawable and not run.is_rl and not twin
        else ""
    )
    figures = "".join(figure(chart, points) for chart in charts if chart.drawable)
    return f'{first}<div class="grid-3">{figures}</div>'


def _rl_charts(run: Run) -> list[Chart]:
    table = run.train

    def lines(*columns: tuple[str, str], raw: bool = True) -> tuple[Series, ...]:
        present = [(column, label) for column, label in columns if table.has(column)]
        return tuple(
            series
            for color, (column, label) in enumerate(present)
            for series in curve(table, column, label, color, raw, dashed=color == 1)
        )

    capped = lines(("clip_fraction", "clip"), ("capped_fraction", "importance capped"))
    unanswered = lines(*UNANSWERED)
    mismatch = lines(*((f"mismatch_{name}", label) for name, label in MISMATCH), raw=False)
    scores = run.evaluations
    ends = (scores["low"], scores["high"])
    average = Series("avg@k", scores.steps, scores["avg_at_k"], 0, "line", *ends)
    return [
        Chart("Reward", lines(("reward", "reward")), "mean of a step", from_zero=True),
        Chart("Accuracy", lines(("accuracy", "accuracy")), percent=True, from_zero=True),
        Chart(
            "Evaluation in the loop",
            (average, Series("pass@k", scores.steps, scores["pass_at_k"], 2)),
            percent=True,
        ),
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
