"""The reference policy: a frozen model beside the trainer's, for the KL term of the loss."""

from dataclasses import replace
from pathlib import Path

import torch

from infir2.config.paths import check_model_directory
from infir2.config.schema import RlSection
from infir2.data import Batch
from infir2.model import Decoder, ModelConfig
from infir2.preflight.objective import require_shape
from infir2.train.trainer import score_batch


class ReferencePolicy:
    """Log-probabilities under the model in `rl.reference`, which every rank holds whole.

    An FP8 export computes as an FP8 policy does, and takes half of a BF16 one's memory.
    """

    def __init__(
        self,
        rl: RlSection,
        policy: ModelConfig,
        compute_dtype: torch.dtype,
        device: torch.device,
        loss_chunk_tokens: int,
    ) -> None:
        """Raises ConfigError for a model of another shape than the policy, CheckpointError for a
        directory that cannot be read."""
        check_model_directory("rl.reference", rl.reference)
        model = Decoder.from_hf(Path(rl.reference), compute_dtype=compute_dtype)
        require_shape(rl.reference, model.config, policy)
        self._model = model.to(device).eval().requires_grad_(False)
        self._temperature, self._chunk_tokens = rl.temperature, loss_chunk_tokens

    @torch.no_grad()
    def add_logprobs(self, batch: Batch) -> Batch:
        """The batch with the token input reference_logprobs, FP32 [T]."""
        values = torch.zeros(len(batch.token_ids))
        plain = replace(batch, token_inputs={})
        scores = score_batch(self._model, plain, self._temperature, self._chunk_tokens)
        values[batch.loss_mask] = scores.logprobs.cpu()
        return replace(batch, token_inputs=batch.token_inputs | {"reference_logprobs": values})
