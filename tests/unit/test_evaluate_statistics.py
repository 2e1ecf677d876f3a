"""Scores and intervals against closed forms and brute force."""

import itertools
import math

import numpy as np
import pytest

from infir2.evaluate.statistics import (
    average_at_k,
    by_difficulty,
    clustered_mean,
    mean_pass_at_k,
    pass_at_k,
)


def test_pass_at_k_equals_the_enumeration_of_all_draws() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            answers = [1] * c + [0] * (n - c)
            for k in range(1, n + 1):
                draws = list(itertools.combinations(answers, k))
                assert pass_at_k(n, c, k) == pytest.approx(
                    sum(any(d) for d in draws) / len(draws), abs=1e-12
                )


def test_pass_at_k_of_many_samples_keeps_its_digits() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, rel=1e-9)
    assert pass_at_k(10_000, 10_000, 1) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"pass@k needs"):
        pass_at_k(n, c, k)


def test_average_at_k_closed_form() -> None:
    estimate = average_at_k([[1, 0], [1, 1], [0, 0], [1, 0]])
    assert estimate.mean == 0.5
    # per-problem means 0.5, 1, 0, 0.5: s^2 = (0 + 0.25 + 0.25 + 0) / 3
    assert estimate.interval == pytest.approx(1.959963984540054 * math.sqrt(0.5 / 3) / 2)


def test_repeating_every_sample_does_not_shrink_the_interval() -> None:
    scores = [[1.0], [0.0], [1.0], [1.0], [0.0]]
    assert average_at_k([s * 50 for s in scores]) == average_at_k(scores)


def test_interval_covers_the_truth_in_95_percent_of_draws() -> None:
    rng = np.random.default_rng(0)
    hits, trials = 0, 2000
    for _ in range(trials):
        chance = rng.beta(2, 2, size=60)
        estimate = average_at_k((rng.random((60, 4)) < chance[:, None]).astype(float).tolist())
        hits += abs(estimate.mean - 0.5) <= estimate.interval
    assert 0.93 < hits / trials < 0.965


def test_one_problem_has_no_finite_interval_and_none_is_an_error() -> None:
    assert average_at_k([[1, 0, 0, 0]]).interval == math.inf
    with pytest.raises(ValueError, match="no problems"):
        clustered_mean([])
    with pytest.raises(ValueError, match="without samples"):
        average_at_k([[1], []])


def test_mean_pass_at_k_lies_between_average_and_one() -> None:
    scores = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert mean_pass_at_k(scores, 1) == pytest.approx(average_at_k(scores).mean)
    assert mean_pass_at_k(scores, 4) == pytest.approx(2 / 3)
    assert mean_pass_at_k(scores, 2) == pytest.approx((0.5 + 0 + 5 / 6) / 3)


def test_difficulties_are_in_order_and_keep_the_unknown() -> None:
    table = by_difficulty([[1, 1], [0, 1], [0, 0], [1, 0], [1, 1]], [10, 2, 10, None, 2])
    assert list(table) == ["2", "10", "unknown"]
    assert list(table.values()) == [0.75, 0.5, 0.5]
    with pytest.raises(ValueError, match="zip"):
        by_difficulty([[1]], [1, 2])


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_all_wrong_or_all_right_is_not_certain(score: float) -> None:
    estimate = average_at_k([[score] * 4] * 20)
    # Wilson's bound for 0 of n: z^2 / (n + z^2); "rule of three" 3 / n is the same to a few percent
    assert estimate.interval == pytest.approx(1.959963984540054**2 / (20 + 1.959963984540054**2))
    assert estimate.mean == score
    assert average_at_k([[score]]).interval == math.inf
