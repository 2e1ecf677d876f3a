"""One optimizer step: micro-batches in, updated masters and a `StepResult` out.

How the data flows through `Trainer.step`, on every rank:

    batches: packed micro-batches of this data-parallel rank       (infir2/data/types.py)
    -> all_reduce: trained tokens of the step, over micro-batches and ranks
    -> per batch: hidden states [T, D] -> log-probabilities [n] of its n trained tokens
       -> loss sum / trained tokens of the step -> backward into FP32 .grad
    -> all_reduce: squared gradient norm, loss, tokens, stop signals, non-finite blocks, metrics
    -> finite check -> clip -> AdamW -> zero_grad

CPT, SFT and the policy update of RL differ only in their data and in their `Loss`.
"""

import math
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infir2.config.schema import OptimizerSection
from infir2.data import Batch
from infir2.errors import CheckpointError
from infir2.faults import fault
from infir2.model import Decoder
from infir2.numerics import Fp8Linear, nonfinite_blocks, token_logprobs
from infir2.numerics.weight_cache import local_tensor
from infir2.parallel.collectives import to_device
from infir2.parallel.parallel_model import ParallelModel, single_process
from infir2.parallel.shard_spec import ShardSpec
from infir2.train.losses import Loss, TokenScores
from infir2.train.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors, update

if TYPE_CHECKING:
    from infir2.checkpoint.dcp import DcpTensors


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step, the same on every rank.

    Example: `StepResult(loss=2.31, gradient_norm=0.8, trained_tokens=1003, tokens=2048,
    skipped=False)`.
    """

    loss: float  # mean over the step's trained tokens
    gradient_norm: float  # global, before clipping
    trained_tokens: int
    tokens: int  # in the step's micro-batches, trained or not
    skipped: bool  # no parameter changed: non-finite loss or gradient, or no trained token
    metrics: dict[str, float] = field(default_factory=dict)  # the loss's, means over trained tokens
    signal: int | None = None  # a stop signal that some rank has received
    # FP8 blocks with an Inf or NaN that all ranks quantized since the last step; on a GPU, of
    # weights and of conversions outside the fused operations (NonFiniteBlocks).
    nonfinite_blocks: int = 0


@dataclass(frozen=True)
class _Totals:
    """Sums over the micro-batches of all ranks, after the step's one reduction."""

    squared_norm: Tensor  # [] FP64 on the device, so that clipping does not wait for the host
    values: dict[str, float]  # by the names in `_reduce_measurements`, and trained_tokens
    metrics: dict[str, float]

    def result(self) -> StepResult:
        trained_tokens = int(self.values["trained_tokens"])
        loss, norm, skipped = math.nan, 0.0, True
        if trained_tokens:
            loss = self.values["loss"] / trained_tokens
            norm = math.sqrt(self.values["squared_norm"])
            skipped = not (math.isfinite(self.values["loss"]) and math.isfinite(norm))
        stop = signal.SIGINT if self.values["sigint"] else None
        return StepResult(
            loss=loss,
            gradient_norm=norm,
            trained_tokens=trained_tokens,
            tokens=int(self.values["tokens"]),
            skipped=skipped,
            metrics={name: sum_ / max(1, trained_tokens) for name, sum_ in self.metrics.items()},
            signal=signal.SIGTERM if self.values["sigterm"] else stop,
            nonfinite_blocks=int(self.values["nonfinite_blocks"]),
        )


class Trainer:
    """A model, its optimizer and the optimizer step. Masters and gradients are FP32.

    `parallel_model` is the model sharded over several ranks (default: one process). Every rank
    calls every method at the same point, with its own batches and the same number of them.
    `graph_tokens`: run micro-batches of about that many tokens as CUDA graphs (0: none), for a
    model on one GPU. Raises CheckpointError for a model that has FP8 codes without masters.
    """

    def __init__(
        self,
        model: Decoder,
        section: OptimizerSection,
        loss_chunk_tokens: int,
        parallel_model: ParallelModel | None = None,
        graph_tokens: int = 0,
    ) -> None:
        if any(isinstance(layer, Fp8Linear) and layer.weight is None for layer in model.modules()):
            raise CheckpointError(
                "the model holds FP8 codes without masters: "
                "train from BF16 weights (infir2 import fp8 DIR --to NEW)"
            )
        self.model = model
        self.parallel_model = parallel_model or single_process(model)
        self._graphs = model.use_block_graphs(graph_tokens) if graph_tokens else None
        self.optimizer = make_optimizer(model, section)
        self.clip_norm = section.clip_norm
        self.loss_chunk_tokens = loss_chunk_tokens
        # A stop signal that this rank has received; the step's reduction makes it known to all.
        self.pending_signal: Callable[[], int | None] = lambda: None
        # Called right before parameters change: a background save may still be copying them.
        self.before_update: Callable[[], None] = lambda: None

    def step(
        self,
        batches: Sequence[Batch],
        loss: Loss,
        learning_rate: float,
        *,
        temperature: float = 1.0,
    ) -> StepResult:
        """Forward and backward over all micro-batches, finite check, clip, AdamW."""
        fault("train.step")
        self.model.train()
        trained_tokens = self._reduce_trained_tokens(batches)
        with self._graphs.active() if self._graphs else nullcontext():
            loss_sum, metric_sums = self._backward(batches, loss, trained_tokens, temperature)
        self.parallel_model.finish_gradients()
        totals = self._reduce_measurements(batches, trained_tokens, loss_sum, metric_sums)
        result = totals.result()
        if not result.skipped:
            self._update(totals.squared_norm.sqrt().float(), learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        return result

    @torch.no_grad()
    def score(
        self, batch: Batch, temperature: float = 1.0, *, with_entropy: bool = False
    ) -> TokenScores:
        """Scores, in stream order, of those trained tokens of the batch that this rank computes."""
        scores = self._score(
            self.parallel_model.local_batch(batch),
            temperature,
            with_entropy,
            uniform_gradient=False,
        )
        self.parallel_model.reshard()
        return scores

    @torch.no_grad()
    def mean_loss(self, batches: Iterable[Batch]) -> float:
        """Next-token loss over all ranks' batches, the mean over trained tokens."""
        self.model.eval()
        sums = torch.stack([self._number(0), self._number(0)])
        for batch in batches:
            if batch.num_trained_tokens or self.parallel_model.ranks.size > 1:
                logprobs = self.score(batch).logprobs
                sums -= torch.stack(
                    [logprobs.sum(dtype=torch.float64), self._number(-len(logprobs))]
                )
        loss_sum, num_tokens = self.parallel_model.all_reduce(sums).tolist()
        return loss_sum / max(1, num_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """This rank's shards of masters and moments by name: all that a bit-equal resume needs."""
        parameters = {
            f"parameters/{name}": parameter.detach()
            for name, parameter in self.model.named_parameters()
        }
        tensors = parameters | optimizer_tensors(self.model, self.optimizer)
        return {name: local_tensor(tensor) for name, tensor in tensors.items()}

    def shard_specs(self) -> dict[str, ShardSpec]:
        """The shard spec of each of `tensors` that is sharded; empty in one process."""
        if self.parallel_model.ranks.size == 1:
            return {}
        names = ("parameters/{}", "optimizer/{}/exp_avg", "optimizer/{}/exp_avg_sq")
        return {
            form.format(name): spec
            for name, spec in self.parallel_model.shard_specs.items()
            for form in names
        }

    def load_tensors(self, tensors: "DcpTensors") -> None:
        """Read this rank's shards. CheckpointError if a tensor is missing or has another shape."""
        load_parameters(self.model, tensors, self.parallel_model.shard_specs)
        load_optimizer_tensors(self.model, self.optimizer, tensors, self.parallel_model.shard_specs)

    def _reduce_trained_tokens(self, batches: Sequence[Batch]) -> Tensor:
        """all_reduce of the number of trained tokens, [] FP64."""
        return self.parallel_model.all_reduce(
            self._number(self._counted * sum(batch.num_trained_tokens for batch in batches))
        )

    def _backward(
        self, batches: Sequence[Batch], loss: Loss, trained_tokens: Tensor, temperature: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulate gradients. Returns this rank's loss and metrics, summed over its tokens."""
        loss_sum = self._number(0)
        metric_sums: dict[str, Tensor] = defaultdict(lambda: self._number(0))
        for number, batch in enumerate(batches, 1):
            # With several ranks, a batch without trained tokens still joins the collectives.
            if batch.num_trained_tokens == 0 and self.parallel_model.ranks.size == 1:
                continue
            self.parallel_model.before_backward(is_last=number == len(batches))
            batch_loss, metrics = self._backward_one(batch, loss, trained_tokens, temperature)
            loss_sum += batch_loss
            for name, value in metrics.items():
                metric_sums[name] += value
        return loss_sum, metric_sums

    def _backward_one(
        self, batch: Batch, loss: Loss, trained_tokens: Tensor, temperature: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of a micro-batch. Returns its loss and metrics, outside of autograd.

        Nothing of its autograd graph is left: memory, and nodes that would tie the capture of a
        CUDA graph to the stream that they ran on.
        """
        scores = self._score(
            self.parallel_model.local_batch(batch),
            temperature,
            loss.needs_entropy,
            loss.uniform_gradient,
        )
        batch_loss, metrics = loss(scores)
        if fault("train.loss"):
            batch_loss = batch_loss * math.nan
        (batch_loss / trained_tokens.clamp(min=1)).backward()
        return batch_loss.detach(), {name: value.detach() for name, value in metrics.items()}

    def _reduce_measurements(
        self,
        batches: Sequence[Batch],
        trained_tokens: Tensor,
        loss_sum: Tensor,
        metric_sums: Mapping[str, Tensor],
    ) -> _Totals:
        """One all_reduce of all that this step measured, and one copy to the host."""
        stop = self.pending_signal()
        local = {
            "squared_norm": self.parallel_model.squared_norm(),
            "loss": loss_sum,
            "tokens": self._number(self._counted * sum(len(batch.token_ids) for batch in batches)),
            "sigterm": self._number(stop == signal.SIGTERM),
            "sigint": self._number(stop == signal.SIGINT),
            "nonfinite_blocks": nonfinite_blocks.take(self._device).double(),
        }
        total = self.parallel_model.all_reduce(
            torch.stack([*local.values(), *metric_sums.values()])
        )
        # tolist() is the step's only point where the host waits for the device.
        *sums, trained = torch.cat([total, trained_tokens[None]]).tolist()
        values = dict(zip(local, sums, strict=False)) | {"trained_tokens": trained}
        metrics = dict(zip(metric_sums, sums[len(local) :], strict=True))
        return _Totals(total[0], values, metrics)

    @property
    def _counted(self) -> bool:
        """Whether this rank counts its tokens: one of the ranks that share a batch does."""
        return self.parallel_model.layout.is_data_leader

    @property
    def _device(self) -> torch.device:
        return self.model.head_weight.device

    def _number(self, value: float) -> Tensor:
        # torch.tensor would copy from the host and wait for the GPU; torch.full does not.
        return torch.full((), float(value), dtype=torch.float64, device=self._device)

    def _score(
        self, batch: Batch, temperature: float, with_entropy: bool, uniform_gradient: bool
    ) -> TokenScores:
        """Scores of this rank's part of a batch."""
        scores = score_batch(
            self.model,
            batch,
            temperature,
            self.loss_chunk_tokens,
            with_entropy=with_entropy,
            uniform_gradient=uniform_gradient,
        )
        return replace(scores, sum_over_batch=self.parallel_model.all_reduce_over_batch)

    def _update(self, norm: Tensor, learning_rate: float) -> None:
        self.before_update()
        # as torch.nn.utils.clip_grads_with_norm_
        clip = torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0) if self.clip_norm > 0 else None
        update(self.optimizer, self.parallel_model.gradients(), learning_rate, clip)


@torch.no_grad()
def load_parameters(
    model: Decoder, tensors: "DcpTensors", shard_specs: Mapping[str, ShardSpec]
) -> None:
    """Read this rank's shard of each 'parameters/NAME' of a checkpoint into the FP32 masters."""
    for name, parameter in model.named_parameters():
        tensors.read_into(f"parameters/{name}", shard_specs[name], local_tensor(parameter))


def score_batch(
    model: Decoder,
    batch: Batch,
    temperature: float,
    chunk_tokens: int,
    *,
    with_entropy: bool = False,
    uniform_gradient: bool = False,
) -> TokenScores:
    """Forward of a batch. Only rows of trained tokens reach the head, in stream order."""
    device = model.head_weight.device
    rows = batch.loss_mask.nonzero().squeeze(1)
    rows, ids, positions, labels = (
        to_device(x, device) for x in (rows, batch.token_ids, batch.positions, batch.labels)
    )
    # cu_seqlens stays on the host, which plans the attention without waiting for the GPU.
    hidden = model.hidden_states(ids, positions, batch.cu_seqlens.numpy())
    logprobs, entropy = token_logprobs(
        hidden[rows],
        model.head_weight,
        labels[rows],
        temperature,
        chunk_tokens,
        with_entropy=with_entropy,
        uniform_gradient=uniform_gradient,
    )
    inputs = {name: to_device(value, device)[rows] for name, value in batch.token_inputs.items()}
    return TokenScores(logprobs, entropy, inputs, len(batch.sample_indices))
