"""FP8 against BF16: an FP8 run beside its BF16 twin, and how far apart their losses are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from infir2.evaluate.statistics import student_half_width
from infir2.report.chart import Chart, Series, smooth
from infir2.report.curves import Drawing, loss_series, marks, wide_figure, window
from infir2.report.read import Run, Table
from infir2.report.stages import Change, StageRow, change_between
from infir2.report.text import counted, percent

INTERVAL_NOTE = (
    "± is a 95 % interval over steps with the same batches in both runs; another seed may differ."
)
MIN_INTERVAL_STEPS, BLOCKS = 20, 10


@dataclass(frozen=True)
class Difference:
    """A loss of an FP8 run and of its BF16 twin, and (FP8 - BF16) / BF16.

    Example: Difference("training loss", 300, 1.930, 1.926, 0.0021, 0.0004, 30)

    `interval` is half the 95 % interval of `relative`, NaN for a single number; both are taken over
    the last `num_steps` steps up to `step`, or over so many pairs of runs.
    """

    name: str
    step: int
    fp8: float
    bf16: float
    relative: float
    interval: float = math.nan
    num_steps: int = 1

    @property
    def text(self) -> str:
        side = "above" if self.relative >= 0 else "below"
        if math.isnan(self.interval):
            return f"{percent(abs(self.relative), 2)} {side} BF16"
        size = f"{100 * abs(self.relative):.2f} ± {percent(self.interval, 2)}"
        return f"{size} {side} BF16"

    @property
    def sentence(self) -> str:
        """Both losses and the difference, in words."""
        over = f"over the {self.num_steps} steps up to" if self.num_steps > 1 else "at"
        return (
            f"{self.name[0].upper()}{self.name[1:]} {over} step {self.step}: {self.fp8:.4f} in "
            f"FP8, {self.bf16:.4f} in BF16"
        )


def twins(runs: Sequence[Run]) -> dict[str, Run]:
    """{name of an FP8 run: its BF16 twin}.

    A twin has the same recipe but for `[run]` and `[fp8]`, or the name NAME-bf16. Of several, that
    with the same seed.
    """

    def are_twins(fp8: Run, bf16: Run) -> bool:
        left, right = (_without_sections(run, "run", "fp8") for run in (fp8, bf16))
        return bf16.name == f"{fp8.name}-bf16" or (bool(right) and left == right)

    trained = [run for run in runs if run.train]
    pairs: dict[str, Run] = {}
    for bf16 in (run for run in trained if run.fp8 is not True):
        free = [
            run
            for run in trained
            if run is not bf16 and run.fp8 is not False and run.name not in pairs
        ]
        same_seed = [run for run in free if _seed(run) == _seed(bf16)]
        if fp8 := next((run for run in same_seed + free if are_twins(run, bf16)), None):
            pairs[fp8.name] = bf16
    return pairs


def _without_sections(run: Run, *names: str) -> dict[str, object]:
    """The run's recipe without these sections."""
    return {name: section for name, section in run.recipe.items() if name not in names}


def _seed(run: Run) -> object:
    return run.recipe.get("run", {}).get("seed")


def differences(fp8: Run, bf16: Run) -> list[Difference]:
    """Of the losses at the last validation that both have, and over the last training steps.

    The second has an interval: both runs saw the same batch at each of these steps.
    """
    steps, left, right = _common(fp8.validation, bf16.validation, "validation_loss")
    found = []
    if len(steps):
        pair = (float(left[-1]), float(right[-1]))
        found.append(Difference("validation loss", int(steps[-1]), *pair, pair[0] / pair[1] - 1))
    steps, left, right = _common(fp8.train, bf16.train, "loss")
    if len(steps):
        last = slice(-max(MIN_INTERVAL_STEPS, len(steps) // 10), None)
        means = (float(left[last].mean()), float(right[last].mean()))
        relative = (left - right)[last] / means[1]
        interval, count = half_interval(relative), len(relative)
        name, step = "training loss", int(steps[-1])
        found.append(Difference(name, step, *means, float(relative.mean()), interval, count))
    return found


def _common(fp8: Table, bf16: Table, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, values, values) where both are finite and the second is not 0."""
    steps, left, right = np.intersect1d(fp8.steps, bf16.steps, return_indices=True)
    a, b = fp8[column][left], bf16[column][right]
    good = np.isfinite(a) & np.isfinite(b) & (b != 0)
    return steps[good], a[good], b[good]


def half_interval(values: np.ndarray) -> float:
    """Half the 95 % interval of the mean of a series [n], from the means of 10 blocks of it.

    Neighboring steps resemble each other, blocks hardly do. NaN below MIN_INTERVAL_STEPS values.
    """
    if len(values) < MIN_INTERVAL_STEPS:
        return math.nan
    return student_half_width([block.mean() for block in np.array_split(values, BLOCKS)])


def across_pairs(pairs: Sequence[tuple[Run, Run]]) -> list[Difference]:
    """The differences of several pairs that repeat one comparison: means over the pairs.

    Their intervals say what another seed may give: none of pairs whose recipes differ in more than
    `[run]`, or are unknown. Losses that not all pairs have are left out.
    """
    if not all(_are_repeats(runs) for runs in zip(*pairs, strict=True)):
        return []
    found = [{each.name: each for each in differences(*pair)} for pair in pairs]
    means = []
    for name in ("validation loss", "training loss"):
        own = [each[name] for each in found if name in each]
        if len(own) == len(pairs) > 1:
            fp8, bf16, relative = (
                float(np.mean(values))
                for values in zip(*((e.fp8, e.bf16, e.relative) for e in own), strict=True)
            )
            interval = student_half_width([each.relative for each in own])
            step = max(each.step for each in own)
            means.append(Difference(name, step, fp8, bf16, relative, interval, len(pairs)))
    return means


def _are_repeats(runs: Sequence[Run]) -> bool:
    """Whether the runs have one recipe but for `[run]`, which has the seed and the directory."""
    first, *others = (_without_sections(run, "run") for run in runs)
    return bool(first) and all(other == first for other in others)


def across_html(pairs: Sequence[tuple[Run, Run]]) -> str:
    """HTML: what several pairs say together; "" for less than two."""
    return "".join(
        f'<p class="facts">Over {each.num_steps} pairs: {each.name} {each.fp8:.4f} in FP8, '
        f"{each.bf16:.4f} in BF16, <b>{each.text}</b> (95 % interval over the pairs).</p>"
        for each in across_pairs(pairs)
    )


def accuracy_difference(fp8: Run, bf16: Run, rows: Sequence[StageRow]) -> Change | None:
    """FP8's accuracy minus BF16's, if both were evaluated; paired if on the same questions."""
    by_stage = {row.stage: row for row in rows}
    if fp8.name not in by_stage or bf16.name not in by_stage:
        return None
    change = change_between(by_stage[bf16.name], by_stage[fp8.name])
    return change if math.isfinite(change.value) else None


def accuracy_difference_html(fp8: Run, bf16: Run, rows: Sequence[StageRow]) -> str:
    """HTML: a sentence, or "" without evaluations."""
    change = accuracy_difference(fp8, bf16, rows)
    if change is None:
        return ""
    count = change.num_paired
    how = f"paired over {counted(count, 'question')}" if count else "as of independent questions"
    return (
        f'<p class="facts">Accuracy, FP8 − BF16: <b>{change.text} points</b> (95 % interval, '
        f"{how}).</p>"
    )


def precision_section(fp8: Run, bf16: Run, drawing: Drawing, rows: Sequence[StageRow] = ()) -> str:
    """HTML: the loss of both in one chart, and the relative difference of the smoothed losses."""
    html, width = f"<h3>{escape(fp8.name)}</h3>", window(fp8.train)
    for each in differences(fp8, bf16):
        html += f'<p class="facts">{each.sentence}, <b>{each.text}</b>.</p>'
    html += f'<p class="note">{INTERVAL_NOTE}</p>{accuracy_difference_html(fp8, bf16, rows)}'
    note = f"Lines are means over {width} steps, faint lines the single steps." if width > 1 else ""
    loss = Chart(
        f"Loss of {fp8.name} and {bf16.name}",
        loss_series(fp8, bf16),
        "nats per token",
        "auto",
        marks=marks(fp8),
        note=note,
    )
    steps, loss_fp8, loss_bf16 = _common(fp8.train, bf16.train, "loss")
    with np.errstate(over="ignore"):
        ratio = loss_fp8 / loss_bf16 - 1
    width = min(4 * width + 1, (len(steps) - 1) | 1) if len(steps) else 1
    relative = Series(
        "(FP8 − BF16) / BF16", steps, smooth(ratio, width), raw=ratio, clock=fp8.clock
    )
    note = f"Mean over {counted(width, 'step')}."
    difference = Chart(
        "Training loss, (FP8 − BF16) / BF16", (relative,), percent=True, from_zero=True, note=note
    )
    return html + "".join(
        wide_figure(chart, drawing, height) for chart, height in ((loss, 340), (difference, 220))
    )
