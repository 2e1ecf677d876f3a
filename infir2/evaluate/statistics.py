"""Scores with their uncertainty: pure functions of plain numbers.

A benchmark is a few dozen problems, each answered k times. Answers to one problem resemble each
other, so the problem, not the answer, is the unit of sampling: every interval is clustered by
problem (Miller 2024, arXiv 2411.00640).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NORMAL_95 = 1.959963984540054


class Estimate(NamedTuple):
    """A mean with the half-width of its 95 % confidence interval: `mean` +- `interval`."""

    mean: float
    interval: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of one evaluation, as fractions of 1.

    `interval` is the half-width of the 95 % confidence interval of avg@k, clustered by problem.
    """

    avg_at_k: float
    interval: float
    k: int
    pass_at_k: float
    num_problems: int
    truncated_fraction: float
    by_difficulty: dict[str, float]

    def describe(self) -> str:
        """One line for people.

        Example: "avg@4 0.412 +- 0.031, pass@4 0.700 on 300 problems, 1.2 % truncated".
        """
        return (
            f"avg@{self.k} {self.avg_at_k:.3f} +- {self.interval:.3f}, "
            f"pass@{self.k} {self.pass_at_k:.3f} on {self.num_problems} problems, "
            f"{100 * self.truncated_fraction:.1f} % truncated"
        )


def clustered_mean(problem_means: Sequence[float]) -> Estimate:
    """The mean of per-problem means m_i in [0, 1] and its half-width 1.96 * s / sqrt(n).

    s = sqrt(sum (m_i - mean)^2 / (n - 1)). All 0 or all 1 is not certainty: the half-width is then
    Wilson's bound z^2 / (n + z^2). The interval of one problem is infinite. Raises ValueError for
    an empty list.
    """
    values = np.asarray(problem_means, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no problems to score: the list of problems is empty")
    mean, n = float(values.mean()), values.size
    if n == 1:
        interval = math.inf
    elif mean in (0.0, 1.0):
        interval = NORMAL_95**2 / (n + NORMAL_95**2)
    else:
        interval = float(NORMAL_95 * values.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, interval)


def average_at_k(scores: Sequence[Sequence[float]]) -> Estimate:
    """avg@k: the mean over problems of the mean score of a problem's samples.

    `scores` has one list of k scores per problem. All problems have the same weight, whatever their
    number of samples. Example: [[1, 0], [1, 1]] -> 0.75 +- 0.49.
    """
    return clustered_mean([_mean(samples) for samples in scores])


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate without bias the chance that at least one of k samples is correct.

    `num_correct` c of `num_samples` n >= k are correct. The estimate is 1 - C(n-c, k) / C(n, k)
    (Chen et al. 2021, arXiv 2107.03374, equation 1), computed as a product that neither overflows
    nor cancels. Raises ValueError for impossible counts.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            "pass@k needs 0 <= correct <= samples and 1 <= k <= samples, got "
            f"{num_correct}, {num_samples}, k = {k}"
        )
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(
        1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1)
    )


def mean_pass_at_k(scores: Sequence[Sequence[float]], k: int) -> float:
    """pass@k averaged over problems. A sample is correct when its score is greater than 0."""
    return _mean(
        [pass_at_k(len(samples), sum(score > 0 for score in samples), k) for samples in scores]
    )


def by_difficulty(
    scores: Sequence[Sequence[float]], difficulties: Sequence[int | None]
) -> dict[str, float]:
    """avg@k of each difficulty, easiest first; problems without one come last under "unknown"."""
    levels = sorted(set(difficulties), key=lambda level: (level is None, level or 0))
    by_level = {
        level: [s for s, d in zip(scores, difficulties, strict=True) if d == level]
        for level in levels
    }
    return {
        "unknown" if level is None else str(level): average_at_k(own).mean
        for level, own in by_level.items()
    }


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    if not values:
        raise ValueError("a problem without samples has no score: drop it, or count it as wrong")
    return math.fsum(values) / len(values)
