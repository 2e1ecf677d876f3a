"""Scores with their uncertainty: pure functions of plain numbers.

A benchmark is a few dozen problems, each answered k times. Answers to one problem resemble each other, so the problem,
not the answer, is the unit of chance: every interval here is clustered by problem (Miller 2024, arXiv 2411.00640).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean with the half-width of its 95 % confidence interval: `mean` +- `interval`; n is the number of problems."""

    mean: float
    interval: float
    num_problems: int

    @property
    def low(self) -> float:
        return self.mean - self.interval

    @property
    def high(self) -> float:
        return self.mean + self.interval


def clustered_mean(problem_means: Sequence[float]) -> Estimate:
    """Mean of per-problem means m_i with half-width 1.96 * s / sqrt(n), s = sqrt(sum (m_i - mean)^2 / (n - 1)).

    One problem gives an infinite interval. Raises ValueError without problems.
    """
    values = np.asarray(problem_means, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no problems to score: the list of problems is empty")
    if values.size == 1:
        return Estimate(float(values[0]), math.inf, 1)
    return Estimate(float(values.mean()), float(NORMAL_95 * values.std(ddof=1) / math.sqrt(values.size)), int(values.size))


def average_at_k(scores: Sequence[Sequence[float]]) -> Estimate:
    """avg@k: the mean over problems of the mean score of a problem's samples. `scores`: one list of k scores per problem.

    Problems weigh the same whatever their number of samples. Example: [[1, 0], [1, 1]] -> 0.75 +- 0.49.
    """
    return clustered_mean([_mean(samples) for samples in scores])


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is correct, from n >= k samples of which c are.

    1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1), as a product that neither overflows nor cancels.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 0 <= correct <= samples and 1 <= k <= samples, got {num_correct}, {num_samples}, k = {k}")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1))


def mean_pass_at_k(scores: Sequence[Sequence[float]], k: int) -> Estimate:
    """pass@k averaged over problems, with its clustered interval. A sample is correct when its score is greater than 0."""
    return clustered_mean([pass_at_k(len(samples), sum(score > 0 for score in samples), k) for samples in scores])


def truncated_fraction(truncated: Sequence[Sequence[bool]]) -> float:
    """Share of all samples that hit the token limit, in [0, 1]. Raises ValueError without samples."""
    flags = [flag for samples in truncated for flag in samples]
    return _mean(flags)


def by_difficulty(scores: Sequence[Sequence[float]], difficulties: Sequence[int | None]) -> dict[str, Estimate]:
    """avg@k of each difficulty, easiest first; problems without one come last under "unknown"."""
    if len(scores) != len(difficulties):
        raise ValueError(f"{len(scores)} problems but {len(difficulties)} difficulties")
    known = sorted({difficulty for difficulty in difficulties if difficulty is not None})
    levels: list[int | None] = [*known, *([None] if None in difficulties else [])]
    return {
        "unknown" if level is None else str(level): average_at_k([s for s, d in zip(scores, difficulties, strict=True) if d == level])
        for level in levels
    }


def paired_difference(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Estimate:
    """Mean of after - before over the same problems in the same order, with the interval of the paired differences.

    Pairing removes the spread of the problems' difficulty, which both sides share; the numbers of samples may differ.
    `low > 0` is "rises by more than its interval"; `low <= 0 <= high` is "no difference shown" (BF16 against FP8).
    """
    if len(before) != len(after):
        raise ValueError(f"a paired difference needs the same problems on both sides, got {len(before)} and {len(after)}")
    return clustered_mean([_mean(b) - _mean(a) for a, b in zip(before, after, strict=True)])


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    if not values:
        raise ValueError("a problem without samples has no score: drop it, or count it as wrong")
    return math.fsum(values) / len(values)
