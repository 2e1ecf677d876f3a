"""The scores of an evaluation's samples by question."""

from collections import Counter
from collections.abc import Mapping
from typing import Any


class QuestionScores:
    """Scores by prompt and reference answer: ids depend on the place of the file.

    Attributes:
        scores: {question: the scores of its samples}, in the order of the first samples. Problems
            with the same prompt and answer are different questions.
    """

    def __init__(self) -> None:
        self.scores: dict[str, list[float]] = {}
        self._questions: dict[str, str] = {}  # by the problem's id
        self._repeated: Counter[str] = Counter()  # how many problems have the same text

    def add(self, row: Mapping[str, Any], score: float) -> None:
        """A line of samples.jsonl; one that is no sample of a problem is left out."""
        if "sample" not in row or "problem" not in row:
            return
        name = str(row["problem"])
        if name not in self._questions:
            text = f"{row.get('prompt')}\n{row.get('answer')}"
            self._repeated[text] += 1
            self._questions[name] = f"{text}\n{self._repeated[text]}"
        self.scores.setdefault(self._questions[name], []).append(score)
