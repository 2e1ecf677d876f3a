"""The one step loop's inside: micro-batches in, one optimizer step out. CPT, SFT and the policy update differ in data and loss only."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infir2.config.schema import OptimizerSection
from infir2.data import Batch
from infir2.errors import CheckpointError
from infir2.faults import fault
from infir2.model import Decoder
from infir2.numerics import Fp8Linear, token_logprobs
from infir2.train.losses import LossFunction, TokenScores
from infir2.train.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors, set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Example: `StepResult(loss=2.31, gradient_norm=0.8, trained_tokens=1003, skipped=False)`.
    """

    loss: float  # mean over the step's trained tokens
    gradient_norm: float  # global, before clipping
    trained_tokens: int
    skipped: bool  # True: non-finite loss or gradient, or nothing to train; no parameter changed
    metrics: dict[str, float] = field(default_factory=dict)  # the loss function's metrics, means over trained tokens


class Trainer:
    """A model, its optimizer and the step. Masters, gradients and moments are FP32.

    Raises CheckpointError for a model without masters.
    """

    def __init__(self, model: Decoder, section: OptimizerSection, head_chunk_tokens: int) -> None:
        if any(isinstance(layer, Fp8Linear) and layer.weight is None for layer in model.modules()):
            raise CheckpointError("the model holds FP8 codes without masters: train from BF16 weights (infir2 import fp8 DIR --to NEW)")
        self.model = model
        self.optimizer = make_optimizer(model, section)
        self.clip_norm = section.clip_norm
        self.head_chunk_tokens = head_chunk_tokens
        self.before_update: Callable[[], None] = lambda: None  # a save in the background may still be copying

    def step(self, batches: Sequence[Batch], loss_function: LossFunction, learning_rate: float, *, temperature: float = 1.0) -> StepResult:
        """Forward and backward over all micro-batches, finite check, clip, AdamW."""
        fault("train.step")
        self.model.train()
        num_tokens = sum(batch.num_trained_tokens for batch in batches)
        if num_tokens == 0:
            return StepResult(loss=float("nan"), gradient_norm=0.0, trained_tokens=0, skipped=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=self._device))
        for batch in batches:
            if batch.num_trained_tokens == 0:
                continue
            loss, metrics = loss_function(self.score(batch, temperature, with_entropy=bool(batch.extras)))
            if fault("train.loss"):
                loss = loss * math.nan
            (loss / num_tokens).backward()
            loss_sum += loss.detach()
            for name, value in metrics.items():
                sums[name] += value.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        finite = bool(torch.isfinite(loss_sum) & torch.isfinite(norm))
        if finite:
            self._update(norm, learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss_sum.item() / num_tokens,
            gradient_norm=norm.item(),
            trained_tokens=num_tokens,
            skipped=not finite,
            metrics={name: value.item() / num_tokens for name, value in sums.items()},
        )

    def score(self, batch: Batch, temperature: float = 1.0, *, with_entropy: bool = False) -> TokenScores:
        """Log-probabilities of the batch's trained tokens, in stream order. Only their rows reach the head."""
        rows = batch.loss_mask.nonzero().squeeze(1).to(self._device)
        hidden = self.model.hidden_states(
            batch.token_ids.to(self._device), batch.positions.to(self._device), batch.cu_seqlens.to(self._device)
        )
        labels = batch.labels.to(self._device)[rows]
        logprobs, entropy = token_logprobs(
            hidden[rows], self.model.head_weight, labels, temperature, self.head_chunk_tokens, with_entropy=with_entropy
        )
        return TokenScores(logprobs, entropy, {name: value.to(self._device)[rows] for name, value in batch.extras.items()})

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Batch]) -> float:
        """Next-token loss over batches, a mean per trained token; nothing is trained."""
        self.model.eval()
        num_tokens = sum(batch.num_trained_tokens for batch in batches)
        total = sum(-self.score(batch).logprobs.sum(dtype=torch.float64).item() for batch in batches if batch.num_trained_tokens)
        return total / max(1, num_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a bit-equal continuation needs, by name: FP32 masters and moments."""
        parameters = {f"parameters/{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        return parameters | optimizer_tensors(self.model, self.optimizer)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`. Raises CheckpointError on a missing or misshapen parameter."""
        load_parameters(self.model, tensors)
        load_optimizer_tensors(self.model, self.optimizer, tensors)

    @property
    def _device(self) -> torch.device:
        return self.model.head_weight.device

    def _update(self, norm: Tensor, learning_rate: float) -> None:
        self.before_update()
        if self.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, norm)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        # fused AdamW writes the parameters without moving their version counters, which the FP8 codes hang on
        torch.autograd.graph.increment_version(list(self.model.parameters()))


@torch.no_grad()
def load_parameters(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Copy 'parameters/NAME' of a checkpoint into the model's FP32 masters."""
    for name, parameter in model.named_parameters():
        stored = tensors.get(f"parameters/{name}")
        if stored is None or stored.shape != parameter.shape:
            found = "nothing" if stored is None else f"shape {tuple(stored.shape)}"
            raise CheckpointError(f"the checkpoint has {found} for {name}, the model needs {tuple(parameter.shape)}")
        parameter.copy_(stored)
