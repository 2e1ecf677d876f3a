"""Scores with their uncertainty: pure functions of plain numbers.

A benchmark is a few dozen questions, each answered k times. Answers to one question resemble each
other, so the question, not the answer, is the unit of sampling: every interval is clustered by
question (Miller 2024, arXiv 2411.00640). It is a studentised bootstrap: on hard sets of 30
questions 1.96 standard errors cover the truth in far fewer than 95 % of draws.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_NORMAL_95, _NORMAL_90 = 1.959963984540054, 1.6448536269514722
# 97.5 % quantiles of Student's t with 1 to 9 degrees of freedom; beyond, the last.
_STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_RESAMPLES = 2000
_BATCH_CELLS = 1 << 21  # resampled questions at one time: 16 MiB
# Chosen by simulation for 94 to 97 % coverage at 30 questions with accuracies from 0.03 to 0.97
# (docs/results/evaluation.md). Variance, in questions: what questions that were all wrong, or all
# alike, do not say about the next one.
_UNSEEN, _UNSEEN_DIFFERENCE = 0.18, 0.06
# One end of an interval has all 5 % of the error where the chance that n questions are all wrong is
# at least 1 / _NEVER_BEYOND: every interval has to contain such a truth then.
_NEVER_BEYOND = 6.0


class Estimate(NamedTuple):
    """A mean with the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of one evaluation, as fractions of 1, and lengths of responses in tokens.

    `low` and `high` are the ends of the 95 % confidence interval of avg@k, clustered by problem. A
    response is truncated if it reached its token limit, answerless if it has no answer to compare.
    """

    avg_at_k: float
    low: float
    high: float
    k: int
    pass_at_k: float
    majority_at_k: float
    num_problems: int
    truncated_fraction: float
    empty_fraction: float
    answerless_fraction: float
    response_tokens_mean: float
    response_tokens_p95: float
    by_difficulty: dict[str, float]

    def describe(self) -> str:
        """One line for people.

        Example: "avg@4 0.412 (95 %: 0.381 to 0.446), pass@4 0.700, majority@4 0.480 on 300
        problems, 1.2 % truncated, 0.4 % without answer, 812 tokens".
        """
        return (
            f"avg@{self.k} {self.avg_at_k:.3f} (95 %: {self.low:.3f} to {self.high:.3f}), "
            f"pass@{self.k} {self.pass_at_k:.3f}, majority@{self.k} {self.majority_at_k:.3f} "
            f"on {self.num_problems} problems, {100 * self.truncated_fraction:.1f} % truncated, "
            f"{100 * self.answerless_fraction:.1f} % without answer, "
            f"{self.response_tokens_mean:,.0f} tokens"
        )


def clustered_mean(question_means: Sequence[float]) -> Estimate:
    """The mean of per-question means in [0, 1] with its studentised bootstrap interval.

    The bootstrapped quantity is t = (mean - mu) / sqrt(phi * mu * (1 - mu) / n): the variance of a
    proportion at mu, times the measured share phi of it that lies between questions. So the
    interval stays in [0, 1]; that of 0 of n is Wilson's with that phi. Near 0 and 1 the truth
    cannot lie beyond one of the ends, because every interval contains it when no answer is right,
    or all are; the other end has up to 5 % instead of 2.5 % there, so that both together keep 5 %
    (Blyth and Still 1983). The interval of one question is [0, 1]. Raises ValueError for an empty
    list and for values outside [0, 1].
    """
    values = _checked(question_means)
    if values.min() < 0 or values.max() > 1:
        raise ValueError("scores have to be between 0 and 1")
    n, mean = values.size, math.fsum(values) / values.size
    if n == 1:
        return Estimate(mean, 0.0, 1.0)
    phi = float(_between_share(n, mean, (values**2).mean()))
    tails = np.array([0.025, 0.05, 0.95, 0.975])
    t = _student(n)
    if 0 < mean < 1:
        means, squares = _resampled(values, values**2)
        pivots = (means - mean) / np.sqrt(_between_share(n, means, squares) * mean * (1 - mean) / n)
        # A set of questions that are nearly all wrong has too few different resamples.
        t = np.maximum(t, np.quantile(pivots, tails) * (-1, -1, 1, 1))
    return Estimate(
        mean,
        _lower_end(mean, float(t[3]), float(t[2]), phi, n),
        1 - _lower_end(1 - mean, float(t[0]), float(t[1]), phi, n),
    )


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of second - first over the same questions, with its studentised bootstrap interval.

    Both have one mean in [0, 1] per question, in the same order. The interval of one question is
    [-1, 1]. Raises ValueError for lists of different length and for empty ones.
    """
    if len(first) != len(second):
        raise ValueError("a paired comparison needs the same questions on both sides")
    values = _checked(np.subtract(second, first))
    n, mean = values.size, math.fsum(values) / values.size
    if n == 1:
        return Estimate(mean, -1.0, 1.0)
    means, squares = _resampled(values, values**2)
    error = math.sqrt(_difference_variance(n, mean, (values**2).mean()))
    t = (means - mean) / np.sqrt(_difference_variance(n, means, squares))
    far = float(_student(n)[0])
    lower, upper = np.quantile(t, (0.025, 0.975))
    return Estimate(
        mean,
        max(-1.0, mean - max(float(upper), far) * error),
        min(1.0, mean + max(-float(lower), far) * error),
    )


def student_half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of independent values; NaN for less than two."""
    count = len(values)
    if count < 2:
        return math.nan
    quantile = _STUDENT_975[min(count - 1, len(_STUDENT_975)) - 1]
    return float(quantile * np.std(values, ddof=1) / math.sqrt(count))


def average_at_k(scores: Sequence[Sequence[float]]) -> Estimate:
    """avg@k: the mean over questions of the mean score of a question's samples.

    `scores` has one list of k scores per question. All questions have the same weight, whatever
    their number of samples. Example: the mean of [[1, 0], [1, 1]] is 0.75.
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
    """pass@k averaged over questions. A sample is correct when its score is greater than 0."""
    return _mean(
        [pass_at_k(len(samples), sum(score > 0 for score in samples), k) for samples in scores]
    )


def majority_at_k(samples: Sequence[tuple[str, bool]]) -> float:
    """Whether the most frequent of a question's answers is correct, from (answer, is correct).

    All correct answers are one answer, whatever their spelling. A sample without an answer ("") has
    no vote. Among equally frequent answers one is drawn: the result is the chance of the correct.
    Example: [("1/2", True), ("0.5", True), ("3", False), ("3", False)] -> 0.5.
    """
    votes = Counter(True if correct else answer for answer, correct in samples if answer or correct)
    most = max(votes.values(), default=0)
    return (votes[True] == most) / list(votes.values()).count(most) if most else 0.0


def known_and_bounds(scores: Sequence[Sequence[float | None]]) -> Estimate:
    """The mean of the known scores, and what it is with all missing ones wrong or all right.

    None stands for a missing score. Questions have the same weight; one without a known score does
    not count for the mean, which is NaN without any. Example: [[1, None], [0, 0]] -> (0.5, 0.25,
    0.5). Raises ValueError for a question without samples.
    """
    known = [[score for score in samples if score is not None] for samples in scores]
    means = [_mean(samples) for samples in known if samples]
    low, high = (
        _mean([_mean([s if s is not None else fill for s in samples]) for samples in scores])
        for fill in (0.0, 1.0)
    )
    return Estimate(_mean(means) if means else math.nan, low, high)


def tokens_mean_and_p95(tokens: Sequence[int]) -> tuple[float, float]:
    """Mean and 95th percentile (linear between neighbours); NaN for an empty list."""
    if not tokens:
        return math.nan, math.nan
    return float(np.mean(tokens)), float(np.percentile(tokens, 95))


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
        "unknown" if level is None else str(level): _mean([_mean(samples) for samples in own])
        for level, own in by_level.items()
    }


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    if not values:
        raise ValueError("a problem without samples has no score: drop it, or count it as wrong")
    return math.fsum(values) / len(values)


def _checked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no problems to score: the list of problems is empty")
    return array


def _between_share(n: int, mean: np.ndarray | float, square: np.ndarray | float) -> np.ndarray:
    """Variance between questions as a share of mean * (1 - mean), its largest possible value."""
    mean = np.asarray(mean)
    between = np.maximum(square - mean * mean, 0.0)
    return (n * between + _UNSEEN) / (n * mean * (1 - mean) + _UNSEEN)


def _difference_variance(
    n: int, mean: np.ndarray | float, square: np.ndarray | float
) -> np.ndarray:
    return (n * np.maximum(square - np.square(mean), 0.0) + _UNSEEN_DIFFERENCE) / (n * (n - 1))


def _student(n: int) -> np.ndarray:
    """Quantiles of Student's t with n - 1 degrees of freedom, to 1 % from n = 8 on.

    Of 2.5, 5, 95 and 97.5 %, without their signs.
    """
    z = np.array([_NORMAL_95, _NORMAL_90, _NORMAL_90, _NORMAL_95])
    return z + (z**3 + z) / (4 * (n - 1))


def _lower_end(mean: float, t_half: float, t_whole: float, phi: float, n: int) -> float:
    """The mu below the mean with mean - mu = t sqrt(phi mu (1 - mu) / n).

    t goes from `t_half`, of 2.5 %, to `t_whole`, of 5 %, where no interval can lie below mu.
    """
    low, high = 0.0, mean
    for _ in range(50):
        mu = (low + high) / 2
        share = min(1.0, _NEVER_BEYOND * (1 - mu) ** n)
        t = t_half + share * (t_whole - t_half)
        if mean - mu > t * math.sqrt(phi * mu * (1 - mu) / n):
            low = mu
        else:
            high = mu
    return low


def _resampled(*columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Means of each column over resamples of its n values, the same resamples for all columns."""
    counts = _counts(columns[0].size) if columns[0].size * _RESAMPLES <= _BATCH_CELLS else None
    table = np.stack(columns, axis=1)
    if counts is not None:
        return tuple((counts @ table).T / len(table))
    generator = np.random.default_rng(0)
    rows = max(1, _BATCH_CELLS // len(table))
    parts = [
        _draw(generator, len(table), min(rows, _RESAMPLES - start)) @ table
        for start in range(0, _RESAMPLES, rows)
    ]
    return tuple(np.concatenate(parts).T / len(table))


@lru_cache(maxsize=4)
def _counts(n: int) -> np.ndarray:
    return _draw(np.random.default_rng(0), n, _RESAMPLES)


def _draw(generator: np.random.Generator, n: int, rows: int) -> np.ndarray:
    """How often each of n questions is drawn, [rows, n]."""
    return generator.multinomial(n, np.full(n, 1 / n), size=rows).astype(np.float64)
