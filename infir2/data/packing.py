"""Pack samples into micro-batches: best-fit decreasing under a token budget, for all ranks.

A *pack* is a list of samples that stay in one micro-batch: a single sample, or a window that has
been filled already. Every rank gets the same number of micro-batches, because all ranks run the
same collectives in each forward and backward pass.
"""

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
    """Return bins of indices of `lengths`, each with a total length of at most `capacity`.

    The longest item comes first; each goes to the fullest bin that has room for it. An item that
    is longer than `capacity` is alone in its bin.

    >>> best_fit_decreasing([3, 5, 2, 7], capacity=5)
    [[3], [1], [0, 2]]
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        position = bisect.bisect_left(free, (lengths[index], -1))
        if position == len(free):
            bins.append([])
            room, number = capacity, len(bins) - 1
        else:
            room, number = free.pop(position)
        bins[number].append(index)
        bisect.insort(free, (room - lengths[index], number))
    return bins


def balanced_bins(lengths: Sequence[int], capacity: int, multiple: int) -> list[list[int]]:
    """Return bins of indices with nearly equal loads, the fullest first, empty ones last.

    Their number is that of best-fit decreasing, rounded up to a multiple of `multiple`.
    """
    packed = best_fit_decreasing(lengths, capacity)
    bins: list[list[int]] = [[] for _ in range(max(1, -(-len(packed) // multiple)) * multiple)]
    loads = [(0, number) for number in range(len(bins))]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        load, number = loads[0]
        bins[number].append(index)
        heapq.heapreplace(loads, (load + lengths[index], number))
    if max(loads)[0] > capacity:  # balancing exceeds the capacity where best-fit does not
        bins = packed + [[] for _ in range(len(bins) - len(packed))]
    return sorted(bins, key=lambda members: (-sum(lengths[index] for index in members), members))


def split_among_ranks(
    packs: Sequence[Sequence[Sample]], micro_batch_tokens: int, rank: int, world_size: int
) -> list[Batch]:
    """Return this rank's micro-batches of an optimizer step, with loads as equal as packs allow.

    A pack stays in one micro-batch: the samples of full windows, once separated, would not fit
    into the same number of micro-batches again. A rank without a pack gets one batch that trains
    nothing. `Batch.sample_indices` count the samples of all packs in order.

    Raises:
        DataError: a sample is longer than `micro_batch_tokens`.
    """
    samples = [sample for pack in packs for sample in pack]
    check_lengths(samples, micro_batch_tokens)
    lengths = [sum(sample.num_tokens for sample in pack) for pack in packs]
    bins = balanced_bins(lengths, micro_batch_tokens, world_size)
    starts = list(itertools.accumulate((len(pack) for pack in packs), initial=0))
    members = [
        [index for pack in sorted(chosen) for index in range(starts[pack], starts[pack + 1])]
        for chosen in bins
    ]
    return [concatenate(samples, indices) for indices in members[rank::world_size]]


def pack_sequences(
    samples: Sequence[Sample], micro_batch_tokens: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """Pack all samples into micro-batches of at most `micro_batch_tokens` by best-fit decreasing.

    A sample that is longer is alone in its micro-batch: a response is not known to be too long
    before it is sampled. Each rank gets the same number of micro-batches; those beyond the samples
    train nothing. `Batch.sample_indices` maps the sequences to `samples`.
    """
    bins = best_fit_decreasing([sample.num_tokens for sample in samples], micro_batch_tokens)
    bins += [[] for _ in range(-len(bins) % world_size)]
    return [concatenate(samples, sorted(members)) for members in bins[rank::world_size]]


def check_lengths(samples: Sequence[Sample], micro_batch_tokens: int) -> None:
    """Raise DataError for a sample that is longer than a micro-batch."""
    for sample in samples:
        if sample.num_tokens > micro_batch_tokens:
            raise DataError(
                f"{sample.origin or 'a sample'} has {sample.num_tokens} tokens, more than one "
                f"forward pass can process: raise data.micro_batch_tokens ({micro_batch_tokens}), "
                "or lower data.sequence_tokens."
            )


def concatenate(samples: Sequence[Sample], indices: Sequence[int]) -> Batch:
    """Concatenate the samples at `indices` into one batch.

    Without indices, the batch is one token of the first sample and trains nothing.
    """
    if not indices:
        return _empty_batch(samples[0])
    chosen = [samples[index] for index in indices]
    lengths = np.array([sample.num_tokens for sample in chosen])
    token_ids = np.concatenate([sample.token_ids for sample in chosen]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    mask = _shift_left([sample.loss_mask for sample in chosen])
    labels = np.where(mask, np.append(token_ids[1:], 0), 0)
    token_inputs = {
        name: np.where(mask, _shift_left([sample.token_inputs[name] for sample in chosen]), 0)
        for name in chosen[0].token_inputs
    }
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(np.arange(len(token_ids)) - np.repeat(starts[:-1], lengths)),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(mask),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        token_inputs={name: torch.from_numpy(values) for name, values in token_inputs.items()},
        sample_indices=tuple(indices),
        origins=tuple(sample.origin for sample in chosen),
    )


def _empty_batch(sample: Sample) -> Batch:
    """Return a batch of the first token of `sample`, with nothing to train."""
    token = Sample(
        sample.token_ids[:1],
        np.zeros(1, dtype=np.bool_),
        token_inputs={name: values[:1] for name, values in sample.token_inputs.items()},
    )
    return replace(concatenate([token], [0]), sample_indices=(), origins=())


def _shift_left(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Shift the values of each sequence from a token to the position of its label; 0 at the end."""
    return np.concatenate([np.append(part[1:], np.zeros(1, dtype=part.dtype)) for part in parts])
