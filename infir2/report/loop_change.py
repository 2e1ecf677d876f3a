"""What an RL run's own evaluations say: the first against the last."""

import math
from pathlib import Path
from typing import NamedTuple

from infir2.report.read import Run, read_lines
from infir2.report.samples import Samples, number
from infir2.report.stages import Change, paired_change
from infir2.report.text import percent


class LoopChange(NamedTuple):
    """avg@k after two steps of a run, as fractions of 1, and the difference."""

    first_step: int
    first: float
    last_step: int
    last: float
    change: Change

    @property
    def text(self) -> str:
        """'accuracy 41.0 % after step 10, 61.2 % after step 60, +20.2 ± 3.1 points'."""
        return (
            f"accuracy {percent(self.first)} after step {self.first_step}, {percent(self.last)} "
            f"after step {self.last_step}, {self.change.text} points"
        )


def loop_change(run: Run) -> LoopChange | None:
    """The change over a run; None without two evaluations.

    It is paired by question if the responses to the same questions were kept, else its interval is
    that of independent questions.
    """
    rows = run.evaluations.rows
    values = run.evaluations["avg_at_k"]
    if not run.train or len(rows) < 2 or not math.isfinite(values[0] + values[-1]):
        return None
    (first, last), steps = (rows[0], rows[-1]), run.evaluations.steps
    kept = [run.path / "evaluations" / f"step-{step:.0f}.jsonl" for step in steps[[0, -1]]]
    change = paired_change(*map(_scores, kept))
    if change is None:
        halves = [(number(row.get("high")) - number(row.get("low"))) / 2 for row in (first, last)]
        value, interval = float(values[-1] - values[0]), math.hypot(*halves)
        change = Change(value, value - interval, value + interval)
    return LoopChange(int(steps[0]), values[0], int(steps[-1]), values[-1], change)


def _scores(path: Path) -> dict[str, float]:
    samples = Samples()
    read_lines(path, [], samples.add)
    return samples.scores
