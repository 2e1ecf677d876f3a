"""The trainer's weights in its own memory, for servers that get them by broadcast.

Rank 0's GPU keeps a copy of the newest version, in FP8, beside the trainer's own weights: a server
that is started again gets that one while the trainer is a step ahead.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from infir2.engines.remote import PublishedWeights
from infir2.engines.weight_buckets import WeightBuckets
from infir2.engines.weight_directory import ExpectedNames
from infir2.model.safetensors_io import check_finite


class WeightMemory:
    """A `WeightPublisher`. A version's memory is free once no engine needs it."""

    def __init__(self, model: Path, device: torch.device) -> None:
        """`model` is `rollout.model`; `device` that of the trainer's weights."""
        self._model, self._device = model.resolve(), device
        self._expected = ExpectedNames(model)

    def publish(
        self, weights: Iterable[tuple[str, Tensor]], policy_version: int
    ) -> PublishedWeights:
        """As `WeightPublisher`. Raises CheckpointError for a value that is not finite."""

        def finite() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                check_finite(name, tensor)
                yield name, tensor

        buckets = WeightBuckets.of(finite(), self._device)
        self._expected.check(set(buckets.names()))
        return PublishedWeights(self._model, policy_version, buckets.num_bytes, buckets=buckets)

    def remove_before(self, weights: PublishedWeights) -> None:
        """As `WeightPublisher`: nothing holds them any more."""

    def close(self) -> None:
        """As `WeightPublisher`."""
