"""Samples into packed batches: best-fit decreasing within a token budget, the same number of batches on every rank."""

import bisect
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from infir2.data.types import Batch, Sample
from infir2.errors import DataError


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of places in `lengths`, none over `capacity`: the longest first, each into the fullest bin that has room.

    >>> best_fit_decreasing([3, 5, 2], capacity=5)
    [[1], [0, 2]]
    """
    assert not lengths or max(lengths) <= capacity
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        found = bisect.bisect_left(room, (lengths[place], -1))
        if found == len(room):
            bins.append([])
            left, number = capacity, len(bins) - 1
        else:
            left, number = room.pop(found)
        bins[number].append(place)
        bisect.insort(room, (left - lengths[place], number))
    return bins


def balanced_bins(lengths: Sequence[int], capacity: int, multiple: int) -> list[list[int]]:
    """As few bins as best-fit needs, rounded up to a multiple, with near-equal loads; the fullest first, empty ones last."""
    packed = best_fit_decreasing(lengths, capacity)
    bins: list[list[int]] = [[] for _ in range(max(1, -(-len(packed) // multiple)) * multiple)]
    loads = [(0, number) for number in range(len(bins))]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        load, number = loads[0]
        bins[number].append(place)
        heapq.heapreplace(loads, (load + lengths[place], number))
    if max(loads)[0] > capacity:  # only best-fit finds a place for everything
        bins = packed + [[] for _ in range(len(bins) - len(packed))]
    return sorted(bins, key=lambda members: (-sum(lengths[place] for place in members), members))


def split_among_ranks(
    units: Sequence[Sequence[Sample]], micro_batch_tokens: int, rank: int, world_size: int
) -> list[Batch]:
    """This rank's micro-batches of a step: as many as every other rank's, with loads as equal as the units allow.

    A unit, one sample or a full window of them, stays in one batch: taken apart, full windows would not fit again. A
    rank without a unit gets a batch of one token that trains nothing.
    """
    samples = [sample for unit in units for sample in unit]
    check_lengths(samples, micro_batch_tokens)
    bins = balanced_bins(
        [sum(sample.num_tokens for sample in unit) for unit in units],
        micro_batch_tokens,
        world_size,
    )
    starts = list(itertools.accumulate((len(unit) for unit in units), initial=0))
    members = [
        [place for unit in sorted(chosen) for place in range(starts[unit], starts[unit + 1])]
        for chosen in bins
    ]
    return [pack(samples, places) for places in members[rank::world_size]]


def pack_sequences(
    samples: Sequence[Sample], micro_batch_tokens: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """All samples in as few batches of at most `micro_batch_tokens` as best-fit finds; `Batch.sample_indices` leads back.

    Of several ranks each gets its part of the same batches, as many as every other; the last may train nothing.
    Raises DataError for a sample that is longer.
    """
    check_lengths(samples, micro_batch_tokens)
    bins = best_fit_decreasing([sample.num_tokens for sample in samples], micro_batch_tokens)
    bins += [[] for _ in range(-len(bins) % world_size)]
    return [pack(samples, sorted(members)) for members in bins[rank::world_size]]


def check_lengths(samples: Sequence[Sample], micro_batch_tokens: int) -> None:
    for sample in samples:
        if sample.num_tokens > micro_batch_tokens:
            raise DataError(
                f"{sample.origin or 'a sample'} has {sample.num_tokens} tokens, more than one forward pass takes: "
                f"raise data.micro_batch_tokens ({micro_batch_tokens}), or lower data.sequence_tokens."
            )


def pack(samples: Sequence[Sample], members: Sequence[int]) -> Batch:
    """The samples named by `members`, one after another. Nothing named: one masked token of the first sample."""
    if not members:
        blank = Sample(
            samples[0].token_ids[:1],
            np.zeros(1, dtype=np.bool_),
            token_inputs={k: v[:1] for k, v in samples[0].token_inputs.items()},
        )
        return replace(pack([blank], [0]), sample_indices=(), origins=())
    chosen = [samples[place] for place in members]
    lengths = np.array([sample.num_tokens for sample in chosen])
    token_ids = np.concatenate([sample.token_ids for sample in chosen]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    mask = _shifted([sample.loss_mask for sample in chosen])
    labels = np.where(mask, np.append(token_ids[1:], 0), 0)
    token_inputs = {
        name: np.where(mask, _shifted([sample.token_inputs[name] for sample in chosen]), 0)
        for name in chosen[0].token_inputs
    }
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(np.arange(len(token_ids)) - np.repeat(starts[:-1], lengths)),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(mask),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        token_inputs={name: torch.from_numpy(values) for name, values in token_inputs.items()},
        sample_indices=tuple(members),
        origins=tuple(sample.origin for sample in chosen),
    )


def _shifted(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Values per token, each moved to the place before its token; the last place of a sequence gets 0."""
    return np.concatenate([np.append(part[1:], np.zeros(1, dtype=part.dtype)) for part in parts])
