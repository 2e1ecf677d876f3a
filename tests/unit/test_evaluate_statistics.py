"""Scores and intervals against closed forms and brute force."""

import itertools
import math

import numpy as np
import pytest

from infir2.evaluate.statistics import (
    average_at_k,
    by_difficulty,
    clustered_mean,
    known_and_bounds,
    majority_at_k,
    mean_pass_at_k,
    paired_difference,
    pass_at_k,
    tokens_mean_and_p95,
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


def test_the_interval_of_many_equal_halves_is_the_normal_one() -> None:
    estimate = average_at_k([[1, 0], [1, 1], [0, 0], [1, 0]] * 500)
    assert estimate.mean == 0.5
    # per-problem means 0.5, 1, 0, 0.5: s^2 = 0.125
    half = 1.959963984540054 * math.sqrt(0.125 / 2000)
    assert estimate.low == pytest.approx(0.5 - half, abs=0.04 * half)
    assert estimate.high == pytest.approx(0.5 + half, abs=0.04 * half)


def test_repeating_every_sample_does_not_shrink_the_interval() -> None:
    scores = [[1.0], [0.0], [1.0], [1.0], [0.0]]
    assert average_at_k([s * 50 for s in scores]) == average_at_k(scores)


@pytest.mark.parametrize(
    ("accuracy", "spread", "k"),
    # Beta(accuracy * spread, (1 - accuracy) * spread) over questions: a spread of 1 has nearly all
    # questions right or wrong, 8 has them alike
    [
        (0.5, 4, 4),
        (0.5, 1, 32),
        (0.2, 1, 1),
        (0.1, 1, 8),
        (0.05, 1, 32),
        (0.05, 4, 32),
        (0.95, 4, 32),
        (0.1, 1, 32),
        (0.1, 5, 4),
        (0.03, 1, 8),
        (0.03, 4, 32),
        (0.97, 1, 4),
    ],
)
def test_the_interval_covers_the_truth_at_30_questions(
    accuracy: float, spread: float, k: int
) -> None:
    rng, trials = np.random.default_rng(7), 1500
    chance = rng.beta(accuracy * spread, (1 - accuracy) * spread, (trials, 30))
    estimates = map(clustered_mean, rng.binomial(k, chance) / k)
    hits = sum(each.low <= accuracy <= each.high for each in estimates)
    assert 0.936 <= hits / trials <= 0.974  # 94 to 97 %, and the error of 1500 trials


def test_one_problem_says_nothing_and_none_is_an_error() -> None:
    assert average_at_k([[1, 0, 0, 0]]) == (0.25, 0.0, 1.0)
    assert paired_difference([0.5], [0.75]) == (0.25, -1.0, 1.0)
    with pytest.raises(ValueError, match="no problems"):
        clustered_mean([])
    with pytest.raises(ValueError, match="without samples"):
        average_at_k([[1], []])
    with pytest.raises(ValueError, match="between 0 and 1"):
        clustered_mean([0.5, 1.5])


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
    # Wilson's bound for 0 of n: t^2 / (n + t^2), with Student's t of 19 degrees of freedom
    far = 2.0930**2 / (20 + 2.0930**2)
    assert estimate.mean == score
    assert estimate.low == pytest.approx(score * (1 - far), abs=2e-3)
    assert estimate.high == pytest.approx(score + (1 - score) * far, abs=2e-3)


def test_a_single_right_answer_of_a_large_set_is_about_wilsons_interval() -> None:
    estimate = clustered_mean([1.0] + [0.0] * 99)
    assert estimate.low == pytest.approx(0.0018, abs=2e-4)
    assert 0.054 <= estimate.high < 0.08


def test_large_sets_are_resampled_in_parts() -> None:
    values = np.random.default_rng(3).random(3000)
    estimate = clustered_mean(values.tolist())
    half = 1.96 * values.std(ddof=1) / math.sqrt(3000)
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.05)


def test_a_paired_difference_is_narrower_and_covers_the_truth() -> None:
    rng, trials = np.random.default_rng(1), 600
    hits, widths = 0, []
    for _ in range(trials):
        chance = rng.beta(0.5, 0.5, 30)
        better = np.clip(chance + 0.05 * (chance < 0.95), 0, 1)
        first, second = (rng.binomial(32, p) / 32 for p in (chance, better))
        estimate = paired_difference(first, second)
        hits += estimate.low <= (better - chance).mean() <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert hits / trials >= 0.935
    assert 0.05 < np.mean(widths) < 0.08  # +- 3 points; unpaired they are +- 16


def test_equal_scores_do_not_differ() -> None:
    estimate = paired_difference([0.5, 0.25] * 15, [0.5, 0.25] * 15)
    assert estimate.mean == 0
    assert -0.02 < estimate.low < 0 < estimate.high < 0.02
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([1, 0], [1])


def test_the_majority_counts_right_answers_together_and_shares_ties() -> None:
    assert majority_at_k([("1/2", True), ("0.5", True), ("3", False)]) == 1.0
    assert majority_at_k([("1/2", True), ("0.5", True), ("3", False), ("3", False)]) == 0.5
    assert majority_at_k([("4", True), ("3", False), ("2", False)]) == pytest.approx(1 / 3)
    assert majority_at_k([("4", True), ("3", False), ("3", False)]) == 0.0
    assert majority_at_k([("", False), ("", False), ("7", True)]) == 1.0
    assert majority_at_k([("", False)]) == majority_at_k([]) == 0.0


def test_missing_answers_are_neither_wrong_nor_dropped() -> None:
    assert known_and_bounds([[1, None], [0, 0]]) == (0.5, 0.25, 0.5)
    assert known_and_bounds([[1, 0], [None, None]]) == (0.5, 0.25, 0.75)
    assert known_and_bounds([[1, 0, 1, 1]]) == (0.75, 0.75, 0.75)
    unknown = known_and_bounds([[None]])
    assert math.isnan(unknown.mean)
    assert unknown[1:] == (0.0, 1.0)


def test_mean_and_95th_percentile_of_tokens() -> None:
    assert tokens_mean_and_p95(list(range(1, 101))) == (50.5, pytest.approx(95.05))
    assert all(map(math.isnan, tokens_mean_and_p95([])))
