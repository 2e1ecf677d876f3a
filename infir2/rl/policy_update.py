"""The update of the policy from one step's groups: pack, score with the trainer, compare, step."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from infir2.config.schema import RlRecipe
from infir2.data import Batch, pack_sequences
from infir2.rl.groups import Group, training_samples
from infir2.rl.mismatch import check_mismatch, mismatch_metrics
from infir2.rl.policy_loss import PolicyLoss
from infir2.train.trainer import StepResult, Trainer


def update_policy(
    recipe: RlRecipe, trainer: Trainer, groups: Sequence[Group], rate: float
) -> tuple[StepResult, dict[str, float]]:
    """One optimizer step per mini-batch of groups.

    trainer_logprobs are those of the policy before the first of these steps.

    Returns:
        The combined result of the optimizer steps; `mismatch_metrics`, and the seconds of scoring
        (logprobs_seconds) and of the optimizer steps (update_seconds).

    Raises:
        CheckFailedError: the engine's log-probabilities are too far from the trainer's.
    """
    if not groups:
        return combine([]), {}
    rl, layout, start = recipe.rl, trainer.parallel_model.layout, time.monotonic()
    mini_batches = []
    for part in split_evenly(groups, rl.mini_batches):
        samples = [s for group in part for s in training_samples(group, rl.normalize_by_std)]
        budget = recipe.data.micro_batch_tokens
        packed = pack_sequences(samples, budget, layout.data_rank, layout.sizes.num_data)
        mini_batches.append([add_trainer_logprobs(trainer, b, rl.temperature) for b in packed])
    mismatch = mismatch_metrics([b for batches in mini_batches for b in batches], layout.ranks)
    scored = time.monotonic()
    check_mismatch(mismatch, rl)
    loss = PolicyLoss(rl.clip_low, rl.clip_high, rl.tis_cap)
    results = [trainer.step(b, loss, rate, temperature=rl.temperature) for b in mini_batches]
    seconds = {"logprobs_seconds": scored - start, "update_seconds": time.monotonic() - scored}
    return combine(results), mismatch | seconds


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
