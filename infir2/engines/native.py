"""The native engine: the trainer's own decoder with continuous batching, in this process.

It serves the exported weights (FP8 codes, no masters). On a CPU a token's log-probability equals
the trainer's to the last bit: every sum of the forward pass is in FP64 (docs/numerics.md), so
batch, chunk and cache do not change it.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from infir2.engines.scheduler import Scheduler
from infir2.engines.types import Completion, Request
from infir2.model import Decoder
from infir2.model.hf_names import exported_fp8_weights, load_weights, weights_digest


class NativeEngine:
    """A `RolloutEngine` that offers a digest: a `Scheduler` and the weights it generates with."""

    def __init__(self, model: Decoder, max_running_requests: int, policy_version: int = 0) -> None:
        self.model = model.eval().requires_grad_(False)
        self.policy_version, self.shared_by_ranks = policy_version, False
        self._scheduler = Scheduler(self.model, max_running_requests)

    @classmethod
    def from_hf(
        cls,
        directory: Path,
        max_running_requests: int,
        compute_dtype: torch.dtype,
        device: torch.device,
    ) -> "NativeEngine":
        """Load an exported Hugging Face directory, FP8 or BF16. Raises CheckpointError."""
        model = Decoder.from_hf(directory, compute_dtype=compute_dtype).to(device)
        return cls(model, max_running_requests)

    @property
    def num_unfinished(self) -> int:
        """As `Engine`."""
        return self._scheduler.num_unfinished

    def submit(self, request: Request) -> None:
        """As `Engine`."""
        self._scheduler.submit(request)

    def step(self) -> list[Completion]:
        """As `Engine`: one token for each running request."""
        return self._scheduler.step(self.policy_version)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """As `Engine`."""
        self._scheduler.cancel(set(request_ids))

    def cancel_all(self) -> None:
        """Drop all unfinished requests."""
        self._scheduler.cancel_all()

    @torch.inference_mode()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """As `WeightSink`."""
        assert not self.num_unfinished, "finish or cancel all requests before new weights"
        load_weights(self.model, weights)
        self.policy_version = policy_version

    def weights_digest(self) -> dict[str, str]:
        """As `OffersDigest`."""
        return weights_digest(exported_fp8_weights(self.model))
