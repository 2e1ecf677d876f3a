"""What the report keeps of samples.jsonl, which may be larger than memory."""

import math
from collections import deque
from typing import Any

from infir2.evaluate.question_scores import QuestionScores

LARGEST = 1e100
FIRST_BYTES, LAST_BYTES = 1 << 22, 1 << 23  # of the file, that are kept
Row = dict[str, Any]


def number(value: Any) -> float:
    """A float of a size that charts can add and scale; NaN for anything else (null, Infinity)."""
    try:
        result = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan
    return result if abs(result) < LARGEST else math.nan


class Samples:
    """Rows of samples.jsonl: the first and the last of them whole, the scores of all.

    `add` takes the rows in order.
    """

    def __init__(self) -> None:
        self._first: list[Row] = []
        self._last: deque[tuple[Row, int]] = deque()
        self.num_rows = self._first_bytes = self._last_bytes = 0
        self._questions = QuestionScores()

    def add(self, row: Row, num_bytes: int) -> None:
        row |= {name: number(row.get(name, 0)) for name in ("step", "reward")}
        self.num_rows += 1
        self._questions.add(row, row["reward"])
        if self._first_bytes + num_bytes <= FIRST_BYTES:
            self._first.append(row)
            self._first_bytes += num_bytes
            return
        self._first_bytes = FIRST_BYTES  # later rows are not among the first
        self._last.append((row, num_bytes))
        self._last_bytes += num_bytes
        while self._last_bytes > LAST_BYTES:
            self._last_bytes -= self._last.popleft()[1]

    @property
    def rows(self) -> tuple[Row, ...]:
        return (*self._first, *(row for row, _ in self._last))

    @property
    def scores(self) -> dict[str, float]:
        """{question: mean score}; empty if a score is not between 0 and 1."""
        by_question = self._questions.scores
        values = [score for scores in by_question.values() for score in scores]
        if not all(0 <= score <= 1 for score in values):
            return {}
        return {name: math.fsum(own) / len(own) for name, own in by_question.items()}

    @property
    def notes(self) -> list[str]:
        """Which rows are left out, if any are."""
        left_out = self.num_rows - len(self.rows)
        if not left_out:
            return []
        return [f"samples.jsonl is large: {left_out:,} samples in its middle are left out"]
