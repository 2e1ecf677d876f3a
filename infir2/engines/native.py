"""The native engine: the trainer's own decoder with continuous batching, in this process.

It serves the exported weights (FP8 codes, no masters). On a CPU a token's log-probability equals
the trainer's to the last bit: every sum of the forward pass is in FP64 (docs/numerics.md), so
batch, chunk and cache do not change it.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from infir2.config.schema import RolloutSection
from infir2.engines.graph_runner import GraphRunner
from infir2.engines.response_text import Decode
from infir2.engines.runner import ReferenceRunner, Runner
from infir2.engines.scheduler import Scheduler
from infir2.engines.types import Completion, Request, Tokens
from infir2.engines.weight_files import read_weights
from infir2.model import Decoder
from infir2.model.hf_names import exported_fp8_weights, load_weights, weights_digest
from infir2.model.memory import host_memory
from infir2.numerics import Fp8Linear
from infir2.numerics.kernels import usable

CACHE_SHARE = 0.5  # of the free memory: the trainer or another engine may need the rest


class NativeEngine:
    """A `RolloutEngine` that offers a digest: a `Scheduler` and the weights it generates with."""

    def __init__(
        self,
        model: Decoder,
        max_running_requests: int,
        cache_gib: float = 0.0,
        keep_cache: bool = False,
        decode: Decode | None = None,
    ) -> None:
        """Generate with `model`.

        Args:
            model: in training it may be converted to FP8 or not; here it gets no gradients.
            max_running_requests: more wait.
            cache_gib: bound of the KV cache; 0 for CACHE_SHARE of the memory that is free now.
            keep_cache: allocate all of it at the first request and keep it, as a server does;
                otherwise it has the size that the requests need and is freed with the last.
            decode: text of token ids, for requests with stop texts.
        """
        self.model = model.eval().requires_grad_(False)
        self.policy_version, self.shared_by_ranks = 0, False
        self.max_running_requests = max_running_requests
        device = model.head_weight.device
        cache_bytes = int(cache_gib * 2**30) or int(CACHE_SHARE * _free_bytes(device))
        runner = open_runner(model, max_running_requests)
        self._scheduler = Scheduler(
            self.model, runner, max_running_requests, cache_bytes, keep_cache, decode
        )

    @classmethod
    def from_hf(
        cls,
        directory: Path,
        section: RolloutSection,
        compute_dtype: torch.dtype,
        device: torch.device,
        decode: Decode | None = None,
    ) -> "NativeEngine":
        """Load an exported Hugging Face directory, FP8 or BF16. Raises CheckpointError."""
        model = Decoder.from_hf(directory, compute_dtype=compute_dtype).to(device)
        return cls(model, section.max_running_requests, section.cache_gib, decode=decode)

    @property
    def scale_format(self) -> str | None:
        """That of the model's FP8 layers; None without such layers."""
        layers = (each for each in self.model.modules() if isinstance(each, Fp8Linear))
        first = next(layers, None)
        return None if first is None else first.scale_format

    @property
    def cache_tokens(self) -> int:
        """Tokens that fit the KV cache, those of all running requests together."""
        return self._scheduler.cache_tokens

    @property
    def max_request_tokens(self) -> int:
        """As `ServedEngine`."""
        return self.cache_tokens

    def gauges(self) -> dict[str, int]:
        """As `ServedEngine`."""
        return {
            "requests_running": self._scheduler.num_running,
            "cache_tokens": self.cache_tokens,
            "cache_tokens_used": self._scheduler.used_cache_tokens,
        }

    @property
    def num_unfinished(self) -> int:
        """As `Engine`."""
        return self._scheduler.num_unfinished

    def submit(self, request: Request) -> None:
        """As `Engine`."""
        self._scheduler.submit(request)

    def step(self) -> list[Completion]:
        """As `Engine`: starts one token for each running request."""
        return self._scheduler.step(self.policy_version)

    def new_tokens(self) -> dict[str, Tokens]:
        """As `OffersProgress`."""
        return self._scheduler.new_tokens()

    def cancel(self, request_ids: Iterable[str]) -> None:
        """As `Engine`."""
        self._scheduler.cancel(set(request_ids))

    def cancel_all(self) -> None:
        """Drop all unfinished requests."""
        self._scheduler.cancel_all()

    @torch.inference_mode()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """As `WeightSink`."""
        self._scheduler.forget_weights()
        load_weights(self.model, weights)
        self.policy_version = policy_version

    def update_from_directory(self, directory: Path, policy_version: int) -> None:
        """Replace the weights by those of an exported directory; no request may be unfinished.

        Raises CheckpointError, and keeps the old weights, for another model's (`read_weights`).
        """
        tensors = read_weights(self.model, self.scale_format, directory)
        self.update_weights(tensors.items(), policy_version)

    def weights_digest(self) -> dict[str, str]:
        """As `OffersDigest`."""
        return weights_digest(exported_fp8_weights(self.model))


def open_runner(model: Decoder, num_slots: int) -> Runner:
    """The runner of the model's device and dtype."""
    if model.compute_dtype == torch.bfloat16 and usable(model.head_weight.device):
        return GraphRunner(model, num_slots)
    return ReferenceRunner(model, num_slots)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory()
