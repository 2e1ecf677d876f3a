"""Packing: capacity, fill, equal counts on all ranks, shifted labels and token inputs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infir2.data import Sample, pack_sequences
from infir2.data.packing import balanced_bins, best_fit_decreasing, split_among_ranks
from infir2.errors import DataError


def make(length: int, first: int = 100, origin: str = "") -> Sample:
    ids = np.arange(first, first + length, dtype=np.int32)
    return Sample(
        ids,
        np.arange(length) >= (length + 1) // 2,
        origin,
        {"advantages": ids.astype(np.float32) / 10},
    )


def test_1024_samples_fill_windows_of_32k_to_97_percent() -> None:
    for seed in range(3):
        lengths = np.clip(np.random.default_rng(seed).lognormal(7.0, 0.8, 1024), 16, 32768).astype(
            int
        )
        lengths = np.maximum(1, lengths * 1500 // lengths.mean().astype(int)).clip(max=32768)
        bins = best_fit_decreasing(lengths.tolist(), 32768)
        assert lengths.sum() / (len(bins) * 32768) >= 0.97


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 5))
def test_bins_keep_the_capacity_and_lose_nothing(lengths: list[int], ranks: int) -> None:
    for bins in (best_fit_decreasing(lengths, 50), balanced_bins(lengths, 50, ranks)):
        assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
        assert all(sum(lengths[index] for index in members) <= 50 for members in bins)
    assert len(balanced_bins(lengths, 50, ranks)) % ranks == 0


def test_loads_are_balanced() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, 64).tolist()
    bins = balanced_bins(lengths, 1000, multiple=4)
    loads = [sum(lengths[index] for index in members) for members in bins]
    assert len(bins) == -(-len(best_fit_decreasing(lengths, 1000)) // 4) * 4
    assert max(loads) - min(loads) < 0.1 * max(loads)


def test_labels_are_shifted_inside_each_sequence() -> None:
    first, second = make(4, 10), make(3, 50)
    (batch,) = pack_sequences([second, first], micro_batch_tokens=7)
    assert batch.sample_indices == (0, 1)
    assert batch.token_ids.tolist() == [50, 51, 52, 10, 11, 12, 13]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 7]
    assert batch.loss_mask.tolist() == [False, True, False, False, True, True, False]
    assert batch.labels.tolist() == [0, 52, 0, 0, 12, 13, 0]
    expected = torch.tensor([0, 5.2, 0, 0, 1.2, 1.3, 0])
    assert torch.allclose(batch.token_inputs["advantages"], expected)
    assert batch.num_trained_tokens == 3
    assert (batch.token_ids.dtype, batch.cu_seqlens.dtype, batch.loss_mask.dtype) == (
        torch.int64,
        torch.int32,
        torch.bool,
    )


def test_sample_indices_map_to_the_samples() -> None:
    samples = [make(length, 1000 * index) for index, length in enumerate([5, 30, 12, 7, 30, 2])]
    batches = pack_sequences(samples, micro_batch_tokens=32)
    assert sorted(index for batch in batches for index in batch.sample_indices) == list(range(6))
    for batch in batches:
        for number, index in enumerate(batch.sample_indices):
            start, end = batch.cu_seqlens[number], batch.cu_seqlens[number + 1]
            assert batch.token_ids[start:end].tolist() == samples[index].token_ids.tolist()


@pytest.mark.parametrize("num_samples", [1, 2, 5, 40])
def test_every_rank_gets_as_many_batches(num_samples: int) -> None:
    samples = [make(3 + index % 11, 100 * index) for index in range(num_samples)]
    ranks = [
        split_among_ranks([[sample] for sample in samples], 20, rank, world_size=4)
        for rank in range(4)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) >= 1
    indices = sorted(
        index for batches in ranks for batch in batches for index in batch.sample_indices
    )
    assert indices == list(range(num_samples))
    filler = [batch for batches in ranks for batch in batches if not batch.sample_indices]
    assert all(
        len(batch.token_ids) == 1
        and batch.num_trained_tokens == 0
        and batch.cu_seqlens.tolist() == [0, 1]
        for batch in filler
    )


def test_full_windows_are_not_split() -> None:
    windows = [[make(7), make(13)], [make(11), make(9)], [make(17), make(3)], [make(20)]]
    for world_size in (1, 2, 4):
        split = [split_among_ranks(windows, 20, rank, world_size) for rank in range(world_size)]
        assert [len(batches) for batches in split] == [4 // world_size] * world_size
        assert all(len(batch.token_ids) == 20 for batches in split for batch in batches)


def test_a_training_row_over_the_capacity_is_named() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7 has 30 tokens.*data.micro_batch_tokens"):
        split_among_ranks([[make(30, origin="rows.jsonl:7")]], 20, rank=0, world_size=1)


def test_a_response_over_the_capacity_is_alone_in_its_micro_batch() -> None:
    samples = [make(4), make(30), make(16), make(25), make(1)]
    batches = pack_sequences(samples, micro_batch_tokens=20)
    assert [batch.sample_indices for batch in batches] == [(1,), (3,), (0, 2), (4,)]
    split = [pack_sequences(samples, 20, rank, world_size=3) for rank in range(3)]
    assert [len(batches) for batches in split] == [2, 2, 2]
    assert sum(batch.num_trained_tokens for batches in split for batch in batches) == sum(
        batch.num_trained_tokens for batch in batches
    )
