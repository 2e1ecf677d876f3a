"""Which curves a run has: its charts, and the comparison of an FP8 run with its BF16 twin."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from infir2.report.chart import Chart, Series, compact, figure, signed_percent, smooth
from infir2.report.read import Run, Table

FP8, BF16, VALIDATION = 0, 1, 2


@dataclass(frozen=True)
class Difference:
    """`what` ("validation loss" or "training loss") of FP8 and BF16 at `step`, and (fp8 - bf16) / bf16."""

    what: str
    step: int
    fp8: float
    bf16: float

    @property
    def relative(self) -> float:
        return (self.fp8 - self.bf16) / self.bf16


def twins(runs: Sequence[Run]) -> dict[str, Run]:
    """Name of an FP8 run -> the BF16 run that differs from it in precision only (by recipe, or by the name NAME-bf16)."""
    trained = [run for run in runs if len(run.train)]
    found: dict[str, Run] = {}
    for bf16 in trained:
        for fp8 in trained:
            if fp8 is bf16 or fp8.name in found or fp8.fp8 is False or bf16.fp8 is True:
                continue
            if bf16.name == f"{fp8.name}-bf16" or (bf16.recipe and _without_precision(fp8) == _without_precision(bf16)):
                found[fp8.name] = bf16
                break
    return found


def _without_precision(run: Run) -> dict[str, object]:
    return {name: section for name, section in run.recipe.items() if name not in ("run", "fp8")}


def window(table: Table) -> int:
    """Steps to smooth over: a fortieth of the run."""
    return max(1, len(table) // 40) | 1


def final_difference(fp8: Run, bf16: Run) -> Difference | None:
    """At the last validation that both have, else over the last smoothing window of the training loss."""
    for what, left, right, column in (
        ("validation loss", fp8.validation, bf16.validation, "validation_loss"),
        ("training loss", fp8.train, bf16.train, "loss"),
    ):
        a, b = (dict(zip(table.steps, table[column], strict=True)) for table in (left, right))
        common = sorted(step for step in a.keys() & b.keys() if np.isfinite(a[step]) and np.isfinite(b[step]))
        last = common[-1:] if what == "validation loss" else common[-window(left) :]
        if last and np.mean([b[step] for step in last]):
            return Difference(what, int(last[-1]), float(np.mean([a[step] for step in last])), float(np.mean([b[step] for step in last])))
    return None


def curve(table: Table, column: str, label: str, color: int = 0, raw: bool = True, suffix: str = "") -> list[Series]:
    """The smoothed column over the raw one; only the raw one when the run is too short to smooth."""
    x, y, width = table.steps, table[column], window(table)
    if not raw or width < 3:
        return [Series(label, x, y, color)]
    return [Series(f"{label} (raw)", x, y, color, "faint"), Series(label, x, smooth(y, width), color)]


def _validation(run: Run, label: str, color: int) -> list[Series]:
    return (
        [Series(label, run.validation.steps, run.validation["validation_loss"], color, "points")]
        if run.validation.has("validation_loss")
        else []
    )


def _marks(run: Run) -> tuple[tuple[float, str], ...]:
    skipped = run.train["skipped"] == 1
    return tuple((float(step), f"step {step:.0f} skipped") for step in run.train.steps[skipped])


def precision_section(fp8: Run, bf16: Run, points: int) -> str:
    """Loss of both in one chart, and the relative difference of the smoothed losses."""
    loss = [*curve(fp8.train, "loss", "FP8", FP8), *curve(bf16.train, "loss", "BF16", BF16)]
    loss += [*_validation(fp8, "FP8 validation", FP8), *_validation(bf16, "BF16 validation", BF16)]
    note = f"Lines are means over {window(fp8.train)} steps, faint lines the single steps." if window(fp8.train) > 1 else ""
    chart = Chart(f"Loss of {fp8.name} and {bf16.name}", tuple(loss), unit="nats per token", marks=_marks(fp8), note=note)
    html = ""
    final = final_difference(fp8, bf16)
    if final:
        html = (
            f'<p class="facts">At step {final.step}: {final.what} {compact(final.fp8)} in FP8, {compact(final.bf16)} in BF16, '
            f"<b>{signed_percent(final.relative)}</b> relative.</p>"
        )
    common, left, right = np.intersect1d(fp8.train.steps, bf16.train.steps, return_indices=True)
    charts = [figure(chart, points * 2, wide=True)]
    if len(common) > 1:
        a, b = (smooth(run.train["loss"][index], window(run.train)) for run, index in ((fp8, left), (bf16, right)))
        relative = Series("(FP8 − BF16) / BF16", common, (a - b) / b, FP8)
        charts.append(
            figure(Chart("Relative difference of the training loss", (relative,), percent=True, from_zero=True), points * 2, wide=True)
        )
    return f"<h3>{escape(fp8.name)}</h3>{html}{''.join(charts)}" if html or charts else ""


def run_charts(run: Run, twin: Run | None, points: int) -> list[str]:
    """Every chart that the run has data for; a BF16 twin's curves are drawn beside the run's own."""
    table = run.train
    charts = [*(_rl_charts(run) if run.is_rl else ()), _loss_chart(run, twin)]
    for column, title, unit, scale, raw in (
        ("learning_rate", "Learning rate", "", "linear", False),
        ("gradient_norm", "Gradient norm", "before clipping", "auto", True),
        ("tokens_per_second", "Throughput", "tokens/s", "linear", True),
    ):
        series = curve(table, column, "FP8" if twin else title, FP8, raw)
        if twin and column != "learning_rate":
            series += curve(twin.train, column, "BF16", BF16, raw)
        charts.append(Chart(title, tuple(series), unit, scale, from_zero=column == "tokens_per_second"))  # type: ignore[arg-type]
    return [figure(chart, points) for chart in charts if any(len(series.finite) for series in chart.series)]


def _loss_chart(run: Run, twin: Run | None) -> Chart:
    series = curve(run.train, "loss", "policy loss" if run.is_rl else "training", FP8)
    return Chart(
        "Loss", (*series, *_validation(run, "validation", VALIDATION)), "nats per token" if not run.is_rl else "", marks=_marks(run)
    )


def _rl_charts(run: Run) -> list[Chart]:
    table = run.train

    def lines(*columns: tuple[str, str], raw: bool = True) -> tuple[Series, ...]:
        present = [(column, label) for column, label in columns if table.has(column)]
        return tuple(series for color, (column, label) in enumerate(present) for series in curve(table, column, label, color, raw))

    charts = [Chart("Reward", lines(("reward", "reward")), "mean of a step", from_zero=True)]
    if run.evaluations:
        steps = np.array([float(evaluation.step) for evaluation in run.evaluations])
        average = np.array([evaluation.avg_at_k for evaluation in run.evaluations])
        passed = np.array([evaluation.pass_at_k for evaluation in run.evaluations])
        half = np.array([evaluation.interval for evaluation in run.evaluations])
        charts.append(
            Chart(
                "Evaluation in the loop",
                (Series("avg@k", steps, average, 0, half_width=half), Series("pass@k", steps, passed, 2)),
                percent=True,
            )
        )
    return charts + [
        Chart("Response length", lines(("response_tokens", "response_tokens")), "tokens, mean", from_zero=True),
        Chart("Truncated responses", lines(("truncated_fraction", "truncated")), percent=True, from_zero=True),
        Chart("Entropy", lines(("entropy", "entropy")), "nats per token", from_zero=True),
        Chart(
            "Clipped and capped tokens",
            lines(("clip_fraction", "ratio clipped"), ("tis_capped_fraction", "TIS capped")),
            percent=True,
            from_zero=True,
        ),
        Chart(
            "Rollout against trainer",
            lines(("mismatch_kl", "KL"), ("mismatch_mean", "mean"), ("mismatch_max", "max"), raw=False),
            "|Δ log-prob|, KL in nats",
            "log",
        ),
        Chart("Groups", lines(("groups_sampled", "sampled"), ("groups_without_signal", "no signal")), "in a step", from_zero=True),
    ]
