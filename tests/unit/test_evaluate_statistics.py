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
    paired_difference,
    pass_at_k,
    truncated_fraction,
)


def test_pass_at_k_equals_the_enumeration_of_all_draws() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            answers = [1] * c + [0] * (n - c)
            for k in range(1, n + 1):
                draws = list(itertools.combinations(answers, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws), abs=1e-12)


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
    assert estimate.num_problems == 4
    # per-problem means 0.5, 1, 0, 0.5: s^2 = (0 + 0.25 + 0.25 + 0) / 3
    assert estimate.interval == pytest.approx(1.959963984540054 * math.sqrt(0.5 / 3) / 2)
    assert (estimate.low, estimate.high) == (0.5 - estimate.interval, 0.5 + estimate.interval)


def test_repeating_every_sample_does_not_shrink_the_interval() -> None:
    scores = [[1.0], [0.0], [1.0], [1.0], [0.0]]
    assert average_at_k([s * 50 for s in scores]) == average_at_k(scores)


def test_interval_covers_the_truth_in_95_percent_of_draws() -> None:
    rng = np.random.default_rng(0)
    hits, trials = 0, 2000
    for _ in range(trials):
        chance = rng.beta(2, 2, size=60)
        estimate = average_at_k((rng.random((60, 4)) < chance[:, None]).astype(float).tolist())
        hits += estimate.low <= 0.5 <= estimate.high
    assert 0.93 < hits / trials < 0.965


def test_one_problem_has_no_finite_interval_and_none_is_an_error() -> None:
    assert average_at_k([[1, 0, 0, 0]]).interval == math.inf
    with pytest.raises(ValueError, match="no problems"):
        clustered_mean([])
    with pytest.raises(ValueError, match="without samples"):
        average_at_k([[1], []])


def test_mean_pass_at_k_lies_between_average_and_one() -> None:
    scores = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert mean_pass_at_k(scores, 1).mean == pytest.approx(average_at_k(scores).mean)
    assert mean_pass_at_k(scores, 4).mean == pytest.approx(2 / 3)
    assert mean_pass_at_k(scores, 2).mean == pytest.approx((0.5 + 0 + 5 / 6) / 3)


def test_truncated_fraction_counts_samples_not_problems() -> None:
    assert truncated_fraction([[True], [False, False, False]]) == 0.25


def test_difficulties_are_in_order_and_keep_the_unknown() -> None:
    table = by_difficulty([[1, 1], [0, 1], [0, 0], [1, 0], [1, 1]], [10, 2, 10, None, 2])
    assert list(table) == ["2", "10", "unknown"]
    assert [table[level].mean for level in table] == [0.75, 0.5, 0.5]
    assert [table[level].num_problems for level in table] == [2, 2, 1]
    with pytest.raises(ValueError, match="1 problems but 2"):
        by_difficulty([[1]], [1, 2])


def test_paired_difference_closed_form_and_tighter_than_unpaired() -> None:
    rng = np.random.default_rng(1)
    chance = rng.uniform(0, 0.8, size=100)
    before = (rng.random((100, 32)) < chance[:, None]).astype(float)
    after = (rng.random((100, 16)) < chance[:, None] + 0.1).astype(float)
    difference = paired_difference(before.tolist(), after.tolist())
    per_problem = after.mean(1) - before.mean(1)
    assert difference.mean == pytest.approx(per_problem.mean())
    assert difference.interval == pytest.approx(1.959963984540054 * per_problem.std(ddof=1) / 10)
    unpaired = math.hypot(average_at_k(before.tolist()).interval, average_at_k(after.tolist()).interval)
    assert difference.interval < 0.6 * unpaired
    assert difference.low > 0
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([[1]], [[1], [0]])


def test_equal_scores_show_no_difference() -> None:
    scores = [[1, 0], [0, 0], [1, 1]]
    difference = paired_difference(scores, scores)
    assert (difference.mean, difference.interval) == (0.0, 0.0)
