"""Accuracy by stage: the last evaluation of each, and the change from the stage it started from."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from infir2.evaluate.statistics import Evaluation, paired_difference
from infir2.report.read import EVALUATION_PREFIX, Run, read_runs
from infir2.report.text import minus, percent

HEADINGS = ("stage", "avg@k", "change, points", "pass@k", "truncated", "k", "problems")
_FREE_SETTINGS = ("problems", "max_problems")  # which questions: compared by themselves
CHANGE = HEADINGS.index("change, points")


@dataclass(frozen=True)
class Change:
    """A difference of two accuracies with the ends of its 95 % interval, in fractions of 1.

    `num_paired` is the number of questions if both evaluations asked the same ones: the interval is
    then that of the differences by question. 0 for independent intervals, added in quadrature.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    num_paired: int = 0

    @property
    def interval(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def text(self) -> str:
        """'+21.0 ± 5.1', in points of 1 %."""
        if not math.isfinite(self.value):
            return "–"
        interval = f" ± {100 * self.interval:.1f}" if math.isfinite(self.interval) else ""
        return minus(f"{100 * self.value:+.1f}{interval}")


@dataclass(frozen=True)
class StageRow:
    """One stage's accuracy, in fractions of 1.

    Example: StageRow("rl1", Path("runs/eval-rl1"), evaluation, Change(0.21, 0.16, 0.26), "sft2")

    `change` is that of avg@k from the row `compared_with` (NaN and '' without one). `scores` and
    `settings` are what a change is paired by.
    """

    stage: str
    run: Path
    evaluation: Evaluation
    change: Change
    compared_with: str
    scores: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> list[str]:
        """The row as text under HEADINGS: '61.2 ± 3.9 %', '+21.0 ± 5.1' in points of 1 %, ..."""
        result = self.evaluation
        rates = (percent(result.pass_at_k), percent(result.truncated_fraction))
        return [
            self.stage,
            accuracy_text(result),
            self.change.text,
            *rates,
            str(result.k or "–"),
            str(result.num_problems or "–"),
        ]

    def as_json(self) -> dict[str, Any]:
        """The row for `json.dumps`, which has no NaN or infinity: null stands for them."""
        values = asdict(self.evaluation) | {"change": self.change.value}
        values |= {"change_interval": self.change.interval, "paired": self.change.num_paired}
        return {"stage": self.stage, "run": str(self.run), "compared_with": self.compared_with} | {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


def stage_table(run_dirs: Iterable[Path]) -> list[StageRow]:
    """One row for each stage that has an evaluation, in itself or in an `eval-NAME` directory."""
    return stage_rows(read_runs(run_dirs))


def stage_rows(runs: Sequence[Run]) -> list[StageRow]:
    """`stage_table` of runs that are already read."""
    trained = [run for run in runs if run.train]
    evaluated: dict[str, tuple[int, Run]] = {}  # stage -> (index in trained or -1, evaluated run)
    for run in (run for run in runs if run.evaluation):
        subject = run if run.train else _subject(run, trained)
        stage = subject.name if subject else run.name.removeprefix(EVALUATION_PREFIX)
        # `infir2 eval` replaces the smaller evaluation in the training loop.
        if stage not in evaluated or not run.train:
            evaluated[stage] = (trained.index(subject) if subject else -1, run)
    rows: list[StageRow] = []
    for stage, (order, run) in sorted(evaluated.items(), key=lambda item: item[1][0]):
        evaluation = run.evaluation
        assert evaluation is not None
        base = _compared_row(trained[order], trained, rows) if order >= 0 else None
        name = base.stage if base else ""
        row = StageRow(stage, run.path, evaluation, Change(), name, run.scores, _settings(run))
        rows.append(replace(row, change=change_between(base, row)) if base else row)
    return rows


def change_between(before: StageRow, after: StageRow) -> Change:
    """The change of avg@k, paired by question if both evaluations asked the same ones."""
    first, second = before.evaluation, after.evaluation
    if before.settings == after.settings != {} and (
        paired := paired_change(before.scores, after.scores)
    ):
        return paired
    change = second.avg_at_k - first.avg_at_k
    interval = math.hypot(half_width(first), half_width(second))
    return Change(change, change - interval, change + interval)


def paired_change(before: dict[str, float], after: dict[str, float]) -> Change | None:
    """The mean difference of scores by question; None unless both have the same questions."""
    if not before or before.keys() != after.keys():
        return None
    pairs = [(before[question], after[question]) for question in before]
    return Change(*paired_difference(*zip(*pairs, strict=True)), num_paired=len(pairs))


def _settings(run: Run) -> dict[str, Any]:
    """What decides an evaluation's answers, beside its questions."""
    section = run.recipe.get("evaluate", {})
    return {key: value for key, value in section.items() if key not in _FREE_SETTINGS}


def _subject(evaluation: Run, trained: Sequence[Run]) -> Run | None:
    """The run that an evaluation directory evaluated, by its model.path or by its own name."""
    by_path = [run for run in trained if evaluation.starts_from(run)]
    by_name = [run for run in trained if evaluation.name == EVALUATION_PREFIX + run.name]
    return next(iter(by_path or by_name), None)


def _compared_row(run: Run, trained: Sequence[Run], rows: Sequence[StageRow]) -> StageRow | None:
    """The row of the nearest evaluated ancestor or base model; the row above without recipe."""
    if not run.recipe:
        return rows[-1] if rows else None
    by_stage, seen = {row.stage: row for row in rows}, {run.name}
    while parent := next(
        (other for other in trained if run.starts_from(other) and other.name not in seen), None
    ):
        if parent.name in by_stage:
            return by_stage[parent.name]
        seen.add(parent.name)
        run = parent
    names = {other.name for other in trained}
    return next((row for row in rows if row.stage not in names), None)


def accuracy_text(evaluation: Evaluation) -> str:
    """'61.2 ± 3.9 %'."""
    if not math.isfinite(half_width(evaluation)):
        return percent(evaluation.avg_at_k)
    return f"{100 * evaluation.avg_at_k:.1f} ± {100 * half_width(evaluation):.1f} %"


def half_width(evaluation: Evaluation) -> float:
    """Half the length of the interval of avg@k, which need not have avg@k in its middle."""
    return (evaluation.high - evaluation.low) / 2


def render_stage_table(rows: Sequence[StageRow]) -> RichTable:
    """The rows as a table for the terminal."""
    table = RichTable(
        title="What improved",
        title_justify="left",
        caption="± is a 95 % interval",
        caption_justify="left",
    )
    for heading in HEADINGS:
        table.add_column(
            heading, justify="left" if heading == HEADINGS[0] else "right", no_wrap=True
        )
    for row in rows:
        style = ("green" if row.change.value > 0 else "red") if row.change.is_sure else ""
        table.add_row(
            *(Text(cell, style if index == CHANGE else "") for index, cell in enumerate(row.cells))
        )
    return table
