"""The one step loop's inside: micro-batches in, one optimizer step out. CPT, SFT and the policy update differ in data and loss only."""

import math
import signal
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infir2.config.schema import OptimizerSection
from infir2.data import Batch
from infir2.errors import CheckpointError
from infir2.faults import fault
from infir2.model import Decoder
from infir2.numerics import Fp8Linear, token_logprobs
from infir2.numerics.weight_cache import local_tensor
from infir2.parallel.collectives import to_device
from infir2.parallel.parallel_model import ParallelModel, single_process
from infir2.parallel.shard_spec import ShardSpec
from infir2.train.losses import LossFunction, TokenScores
from infir2.train.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors, update

if TYPE_CHECKING:
    from infir2.checkpoint.dcp import DcpTensors


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Example: `StepResult(loss=2.31, gradient_norm=0.8, trained_tokens=1003, tokens=2048, skipped=False)`.
    """

    loss: float  # mean over the step's trained tokens
    gradient_norm: float  # global, before clipping
    trained_tokens: int
    tokens: int  # in the step's micro-batches, trained or not
    skipped: bool  # True: non-finite loss or gradient, or nothing to train; no parameter changed
    metrics: dict[str, float] = field(
        default_factory=dict
    )  # the loss function's metrics, means over trained tokens
    signal: int | None = None  # a stop signal that some rank has received


class Trainer:
    """A model, its optimizer and the step. Masters, gradients and moments are FP32.

    `sharded` is the model laid out over several processes; each calls every method at the same point, with its own batches,
    as many as every other. `pending_signal` tells of a stop signal here, so that all ranks hear of it in the same step.
    Raises CheckpointError for a model without masters.
    """

    def __init__(
        self,
        model: Decoder,
        section: OptimizerSection,
        loss_chunk_tokens: int,
        parallel_model: ParallelModel | None = None,
    ) -> None:
        if any(isinstance(layer, Fp8Linear) and layer.weight is None for layer in model.modules()):
            raise CheckpointError(
                "the model holds FP8 codes without masters: train from BF16 weights (infir2 import fp8 DIR --to NEW)"
            )
        self.model = model
        self.parallel_model = parallel_model or single_process(model)
        self.optimizer = make_optimizer(model, section)
        self.clip_norm = section.clip_norm
        self.loss_chunk_tokens = loss_chunk_tokens
        self.pending_signal: Callable[[], int | None] = lambda: None
        self.before_update: Callable[[], None] = lambda: (
            None
        )  # a save in the background may still be copying

    def step(
        self,
        batches: Sequence[Batch],
        loss_function: LossFunction,
        learning_rate: float,
        *,
        temperature: float = 1.0,
    ) -> StepResult:
        """Forward and backward over all micro-batches, one reduction of what was measured, finite check, clip, AdamW."""
        fault("train.step")
        self.model.train()
        counts = (
            self.parallel_model.layout.is_data_leader
        )  # what ranks with the same data do not count twice
        num_tokens = self.parallel_model.total(
            self._number(counts * sum(batch.num_trained_tokens for batch in batches))
        )
        loss_sum = self._number(0)
        sums: dict[str, Tensor] = defaultdict(lambda: self._number(0))
        for number, batch in enumerate(batches, 1):
            # with several ranks, a batch that trains nothing has to take part in the collectives
            if batch.num_trained_tokens == 0 and self.parallel_model.ranks.size == 1:
                continue
            self.parallel_model.before_backward(last=number == len(batches))
            loss, metrics = loss_function(
                self._score(
                    self.parallel_model.local(batch), temperature, with_entropy=bool(batch.extras)
                )
            )
            if fault("train.loss"):
                loss = loss * math.nan
            (loss / num_tokens.clamp(min=1)).backward()
            loss_sum += loss.detach()
            for name, value in metrics.items():
                sums[name] += value.detach()
        self.parallel_model.finish_gradients()
        tokens = self._number(counts * sum(len(batch.token_ids) for batch in batches))
        stops = [
            self._number(self.pending_signal() == number)
            for number in (signal.SIGTERM, signal.SIGINT)
        ]
        measured = self.parallel_model.total(
            torch.stack(
                [self.parallel_model.squared_norm(), loss_sum, tokens, *stops, *sums.values()]
            )
        )
        *totals, trained = torch.cat(
            [measured, num_tokens[None]]
        ).tolist()  # the one point where the host waits for the device
        result = _result(totals, int(trained), list(sums))
        if not result.skipped:
            self._update(measured[0].sqrt().float(), learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def score(
        self, batch: Batch, temperature: float = 1.0, *, with_entropy: bool = False
    ) -> TokenScores:
        """Log-probabilities of the batch's trained tokens that this rank scores, in stream order, without gradients to come."""
        scores = self._score(self.parallel_model.local(batch), temperature, with_entropy)
        self.parallel_model.release()
        return scores

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Batch]) -> float:
        """Next-token loss over all ranks' batches, a mean per trained token; nothing is trained."""
        self.model.eval()
        sums = torch.stack([self._number(0), self._number(0)])
        for batch in batches:
            if batch.num_trained_tokens or self.parallel_model.ranks.size > 1:
                logprobs = self.score(batch).logprobs
                sums -= torch.stack(
                    [logprobs.sum(dtype=torch.float64), self._number(-len(logprobs))]
                )
        loss_sum, num_tokens = self.parallel_model.total(sums).tolist()
        return loss_sum / max(1, num_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a bit-equal continuation needs, by name: this rank's part of the FP32 masters and moments."""
        parameters = {
            f"parameters/{name}": parameter.detach()
            for name, parameter in self.model.named_parameters()
        }
        tensors = parameters | optimizer_tensors(self.model, self.optimizer)
        return {name: local_tensor(tensor) for name, tensor in tensors.items()}

    def shard_specs(self) -> dict[str, ShardSpec]:
        """Where each of `tensors` that has a part on several ranks lies in the whole; empty in one process."""
        if self.parallel_model.ranks.size == 1:
            return {}
        names = ("parameters/{}", "optimizer/{}/exp_avg", "optimizer/{}/exp_avg_sq")
        return {
            form.format(name): place
            for name, place in self.parallel_model.shard_specs.items()
            for form in names
        }

    def load_tensors(self, tensors: "DcpTensors") -> None:
        """Read this rank's part of what `tensors` names. CheckpointError on a missing or misshapen one."""
        load_parameters(self.model, tensors, self.parallel_model.shard_specs)
        load_optimizer_tensors(self.model, self.optimizer, tensors, self.parallel_model.shard_specs)

    @property
    def _device(self) -> torch.device:
        return self.model.head_weight.device

    def _number(self, value: float) -> Tensor:
        return torch.full(
            (), float(value), dtype=torch.float64, device=self._device
        )  # torch.tensor would wait for a GPU

    def _score(self, batch: Batch, temperature: float, with_entropy: bool = False) -> TokenScores:
        """Only the rows of trained tokens reach the head."""
        rows = batch.loss_mask.nonzero().squeeze(1)
        rows, ids, positions, labels = (
            to_device(x, self._device)
            for x in (rows, batch.token_ids, batch.positions, batch.labels)
        )
        # cu_seqlens stay on the host, which lays out the attention: asking a GPU for them would wait for it.
        hidden = self.model.hidden_states(ids, positions, batch.cu_seqlens.numpy())
        logprobs, entropy = token_logprobs(
            hidden[rows],
            self.model.head_weight,
            labels[rows],
            temperature,
            self.loss_chunk_tokens,
            with_entropy=with_entropy,
            uniform_gradient=not batch.extras,  # next_token_loss is a sum; a policy loss weighs every token by its extras
        )
        return TokenScores(
            logprobs,
            entropy,
            {name: to_device(value, self._device)[rows] for name, value in batch.extras.items()},
        )

    def _update(self, norm: Tensor, learning_rate: float) -> None:
        self.before_update()
        # as torch.nn.utils.clip_grads_with_norm_
        clip = torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0) if self.clip_norm > 0 else None
        update(self.optimizer, self.parallel_model.gradients(), learning_rate, clip)


def _result(measured: list[float], num_tokens: int, names: list[str]) -> StepResult:
    """From the sums over all ranks: squared gradient norm, loss, tokens, signals, the loss function's metrics."""
    square, loss_sum, tokens, terminations, interruptions, *sums = measured
    if num_tokens == 0:
        loss, norm, skipped = math.nan, 0.0, True
    else:
        loss, norm = loss_sum / num_tokens, math.sqrt(square)
        skipped = not (math.isfinite(loss_sum) and math.isfinite(norm))
    return StepResult(
        loss=loss,
        gradient_norm=norm,
        trained_tokens=num_tokens,
        tokens=int(tokens),
        skipped=skipped,
        metrics={name: value / max(1, num_tokens) for name, value in zip(names, sums, strict=True)},
        signal=signal.SIGTERM if terminations else signal.SIGINT if interruptions else None,
    )


@torch.no_grad()
def load_parameters(
    model: Decoder, tensors: "DcpTensors", shard_specs: Mapping[str, ShardSpec]
) -> None:
    """Read this rank's part of each 'parameters/NAME' of a checkpoint into the model's FP32 masters."""
    for name, parameter in model.named_parameters():
        tensors.read(f"parameters/{name}", shard_specs[name], local_tensor(parameter))
