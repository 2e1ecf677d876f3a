"""The order of rows: a permutation in every epoch, the requested shares, fixed forever."""

from collections import Counter

import numpy as np

from infir2.data.mixture import Mixture, permute_index, quotas


def test_permute_index_is_a_permutation_that_depends_on_its_key() -> None:
    for size in (1, 2, 3, 5, 64, 100, 1000, 4097):
        assert sorted(permute_index(index, size, (1, 0, 0)) for index in range(size)) == list(
            range(size)
        )
    first, second = (
        [permute_index(index, 1000, key) for index in range(1000)] for key in ((1, 0, 0), (1, 0, 1))
    )
    assert first != second


def test_permute_index_looks_random() -> None:
    order = np.array([permute_index(index, 4096, (7, 0, 3)) for index in range(4096)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(4096), order)[0, 1]) < 0.05
    assert (order == np.arange(4096)).sum() < 8
    # Over the epochs, each position gets each quarter of the rows about equally often.
    quarters = [
        Counter(permute_index(index, 400, (7, 0, epoch)) // 100 for epoch in range(400))
        for index in (0, 1, 399)
    ]
    assert all(60 < count < 140 for counts in quarters for count in counts.values())


def test_the_order_never_changes() -> None:
    """A checkpoint's data position refers to these rows: a change breaks every resumed run."""
    mixture = Mixture([5, 3], [1.0, 2.0], seed=1236)
    assert [tuple(mixture.row_at(index)) for index in range(6)] == [
        (0, 0, 0),
        (1, 0, 0),
        (1, 2, 0),
        (1, 1, 0),
        (1, 0, 1),
        (0, 2, 0),
    ]


def test_every_epoch_visits_every_row_once() -> None:
    mixture = Mixture([10], [1.0], seed=3)
    epochs = [[mixture.row_at(10 * epoch + index) for index in range(10)] for epoch in range(3)]
    assert all(
        sorted(position.row for position in positions) == list(range(10)) for positions in epochs
    )
    assert [positions[0].epoch for positions in epochs] == [0, 1, 2]
    assert len({tuple(position.row for position in positions) for positions in epochs}) == 3


def test_shares_hold_over_short_stretches_and_small_sources_repeat() -> None:
    mixture = Mixture([1000, 10], [3.0, 1.0], seed=0)
    positions = [mixture.row_at(index) for index in range(4096)]
    assert sum(position.source == 1 for position in positions) == 1024
    assert 0.15 < sum(position.source == 1 for position in positions[:256]) / 256 < 0.35
    small = [position for position in positions if position.source == 1]
    for start in range(0, 1020, 10):
        assert sorted(position.row for position in small[start : start + 10]) == list(range(10))
        assert {position.epoch for position in small[start : start + 10]} == {start // 10}


def test_quotas() -> None:
    assert quotas([1, 1], 1024) == [512, 512]
    assert quotas([0.7, 0.2, 0.1], 10) == [7, 2, 1]
    assert quotas([1.0, 1e-9], 1024) == [1024, 1]
