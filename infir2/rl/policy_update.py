"""The update of the policy from one step's groups: pack, score with the trainer, compare, step."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from infir2.config.schema import RlRecipe
from infir2.data import Batch, Sample, pack_sequences
from infir2.rl.groups import Group, training_samples
from infir2.rl.importance import add_importance
from infir2.rl.mismatch import check_mismatch, mismatch_metrics
from infir2.rl.policy_loss import PolicyLoss, find_objective
from infir2.rl.reference import ReferencePolicy
from infir2.terminal import begin_phase
from infir2.train.trainer import StepResult, Trainer


@dataclass(frozen=True)
class PolicyUpdate:
    """Trains the policy on the groups of one step after another."""

    recipe: RlRecipe
    trainer: Trainer
    loss: PolicyLoss
    reference: ReferencePolicy | None  # for a KL term
    # Of the last step, on rank 0, if rl.keep_rollouts: see kept_rollouts.py
    kept_logprobs: dict[bytes, np.ndarray] = field(default_factory=dict)

    def __call__(self, groups: Sequence[Group], rate: float) -> tuple[StepResult, dict[str, float]]:
        """One optimizer step per mini-batch of groups and pass over them.

        trainer_logprobs are those of the policy before the first of these steps.

        Returns:
            The combined result of the optimizer steps; `mismatch_metrics`, and the seconds of
            scoring (logprobs_seconds) and of the optimizer steps (update_seconds).

        Raises:
            CheckFailedError: the engine's log-probabilities are too far from the trainer's.
        """
        rl, start = self.recipe.rl, time.monotonic()
        self.kept_logprobs.clear()
        parts = [training_samples(part, rl) for part in split_evenly(groups, rl.mini_batches)]
        mini_batches = [self._scored(samples) for samples in parts if samples]
        if not mini_batches:
            return combine([]), {}
        ranks = self.trainer.parallel_model.layout.ranks
        batches = [batch for mini_batch in mini_batches for batch in mini_batch]
        mismatch = mismatch_metrics(batches, ranks)
        if rl.keep_rollouts:
            for part in ranks.gather_to_rank0(_logprobs_of_sequences(batches)):
                self.kept_logprobs.update(part)
        scored = time.monotonic()
        check_mismatch(mismatch, rl, self.recipe.rollout.exact)
        results = [
            self.trainer.step(mini_batch, self.loss, rate, temperature=rl.temperature)
            for _ in range(rl.passes)
            for mini_batch in mini_batches
        ]
        seconds = {"logprobs_seconds": scored - start, "update_seconds": time.monotonic() - scored}
        return combine(results), mismatch | seconds

    def _scored(self, samples: Sequence[Sample]) -> list[Batch]:
        """This rank's micro-batches, with all that the loss needs of their tokens."""
        layout, rl = self.trainer.parallel_model.layout, self.recipe.rl
        budget = self.recipe.data.micro_batch_tokens
        batches = []
        for batch in pack_sequences(samples, budget, layout.data_rank, layout.sizes.num_data):
            batch = add_importance(add_trainer_logprobs(self.trainer, batch, rl.temperature), rl)
            batches.append(self.reference.add_logprobs(batch) if self.reference else batch)
        return batches


def _logprobs_of_sequences(batches: Sequence[Batch]) -> dict[bytes, np.ndarray]:
    """The trainer's log-probabilities of each trained token, by the bytes of the sequence's ids."""
    found = {}
    for batch in batches:
        logprobs = batch.token_inputs["trainer_logprobs"]
        for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            token_ids = batch.token_ids[start:end].to(torch.int32).cpu().numpy()
            found[token_ids.tobytes()] = logprobs[start:end][batch.loss_mask[start:end]].numpy()
    return found


def open_policy_update(recipe: RlRecipe, trainer: Trainer) -> PolicyUpdate:
    """The update of a recipe, with its reference policy. Raises ConfigError, CheckpointError."""
    rl, model, reference = recipe.rl, trainer.model, None
    if rl.reference:
        begin_phase("loading the reference")
        device = trainer.parallel_model.layout.device
        reference = ReferencePolicy(
            rl, model.config, model.compute_dtype, device, trainer.loss_chunk_tokens
        )
    return PolicyUpdate(recipe, trainer, PolicyLoss(rl, find_objective(rl.loss)), reference)


def split_evenly(groups: Sequence[Group], count: int) -> list[Sequence[Group]]:
    """At most `count` consecutive parts whose sizes differ by at most one, larger ones first.

    Example: 5 groups in 4 parts are 2, 1, 1, 1.
    """
    size, larger = divmod(len(groups), count)
    ends = [(i + 1) * size + min(i + 1, larger) for i in range(count)]
    parts = [groups[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [part for part in parts if part]


@torch.no_grad()
def add_trainer_logprobs(trainer: Trainer, batch: Batch, temperature: float) -> Batch:
    """The batch with the current policy's log-probability of every trained token."""
    # Ranks that share the batch score different tokens of it: `index` says which.
    index = torch.arange(len(batch.token_ids))
    scores = trainer.score(replace(batch, token_inputs={"index": index}), temperature)
    values = torch.zeros(len(index), device=scores.logprobs.device)
    values.index_copy_(0, scores.inputs["index"], scores.logprobs)
    logprobs = trainer.parallel_model.all_reduce_over_batch(values).cpu()
    return replace(batch, token_inputs={**batch.token_inputs, "trainer_logprobs": logprobs})


def combine(results: Sequence[StepResult]) -> StepResult:
    """The results of the mini-batches as one, weighted by trained tokens."""
    num_tokens = sum(result.trained_tokens for result in results)
    if not num_tokens:
        return StepResult(
            loss=float("nan"), gradient_norm=0.0, trained_tokens=0, tokens=0, skipped=True
        )

    def mean(values: list[float]) -> float:
        weighted = (v * r.trained_tokens for v, r in zip(values, results, strict=True))
        return sum(weighted) / num_tokens

    return StepResult(
        loss=mean([r.loss for r in results]),
        gradient_norm=mean([r.gradient_norm for r in results]),
        trained_tokens=num_tokens,
        tokens=sum(r.tokens for r in results),
        skipped=any(r.skipped for r in results),
        metrics={name: mean([r.metrics[name] for r in results]) for name in results[0].metrics},
        signal=next((r.signal for r in results if r.signal), None),
        nonfinite_blocks=sum(r.nonfinite_blocks for r in results),
    )
