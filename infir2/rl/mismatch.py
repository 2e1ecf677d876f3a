"""How far the trainer's log-probabilities are from the engine's, for the same tokens and weights.

An engine that computes as the trainer does gives 0 everywhere. Otherwise the policy that sampled is
not the one that is trained, and the importance weights of the loss have to make up for it. With
x = trainer_logprobs - rollout_logprobs of the trained tokens:

mismatch_equal: share of tokens with x = 0, the same bits.
mismatch_k1, mismatch_kl: estimates k1 and k3 of KL(rollout || trainer), means of -x and of
    exp(x) - 1 - x (joschu.net/blog/kl-approx.html); k3 is never negative.
mismatch_mean, mismatch_p999, mismatch_max: mean, 99.9th percentile and maximum of |x|.
mismatch_prob_error: mean of exp(|x|), the token_mult_prob_error of NeMo RL; 1 if all are equal.
mismatch_sequence: the largest |mean of x| of a response, whose exponential is the geometric mean of
    its tokens' probability ratios.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from infir2.config.schema import RlSection
from infir2.data import Batch
from infir2.errors import CheckFailedError
from infir2.parallel.ranks import Ranks

TAIL = 1e-3  # the share of tokens above mismatch_p999


def mismatch_metrics(batches: Sequence[Batch], ranks: Ranks) -> dict[str, float]:
    """The metrics at the top of this file, over the trained tokens of all ranks."""
    differences = [_differences(batch) for batch in batches]
    x = torch.cat(differences)
    means, count = _means(x, ranks)
    num_tail = max(1, math.ceil(TAIL * count))
    largest = x.abs().topk(min(len(x), num_tail)).values.tolist()
    tail = sorted((value for part in ranks.all_gather(largest) for value in part), reverse=True)
    per_sequence = max(map(_largest_mean, batches, differences), default=0.0)
    return means | {
        "mismatch_p999": tail[num_tail - 1] if tail else 0.0,
        "mismatch_max": tail[0] if tail else 0.0,
        "mismatch_sequence": max(ranks.all_gather(per_sequence)),
    }


def _means(x: Tensor, ranks: Ranks) -> tuple[dict[str, float], float]:
    """Means over the tokens of all ranks, and how many tokens these are."""
    values = {
        "mismatch_equal": x == 0,
        "mismatch_k1": -x,
        "mismatch_kl": x.exp() - 1 - x,
        "mismatch_mean": x.abs(),
        "mismatch_prob_error": x.abs().exp(),
    }
    sums = [float(len(x)), *(value.sum().item() for value in values.values())]
    count, *totals = (sum(parts) for parts in zip(*ranks.all_gather(sums), strict=True))
    means = (total / max(1.0, count) for total in totals)
    return dict(zip(values, means, strict=True)), count


def check_mismatch(metrics: dict[str, float], rl: RlSection, exact: bool = False) -> None:
    """Raise CheckFailedError if rollout and trainer are too far apart to train on.

    With `exact` a single bit is too far.
    """
    if exact and metrics["mismatch_equal"] != 1:
        raise CheckFailedError(
            f"rollout.exact: {1 - metrics['mismatch_equal']:.3%} of the tokens have another "
            f"log-probability than the trainer's (largest difference {metrics['mismatch_max']:.2g}"
            "); docs/engines.md says what is exact where, or remove rollout.exact"
        )
    limits = {
        "mismatch_kl": ("KL", "rl.max_mismatch_kl", rl.max_mismatch_kl),
        "mismatch_prob_error": (
            "mean probability ratio",
            "rl.max_mismatch_prob_error",
            rl.max_mismatch_prob_error,
        ),
    }
    advice = "check that both use the same weights, scale format and temperature"
    if rl.max_off_policy_steps or rl.partial:
        advice += ", or lower the learning rate: older weights sampled a part of the tokens"
    for name, (words, key, limit) in limits.items():
        if not metrics[name] <= limit:
            raise CheckFailedError(
                f"the rollout engine's log-probabilities are not the trainer's: {words} "
                f"{metrics[name]:.4f} exceeds {key} = {limit}; {advice}"
            )


def _differences(batch: Batch) -> Tensor:
    """float64 [trained tokens of the batch]."""
    inputs = batch.token_inputs
    return (inputs["trainer_logprobs"] - inputs["rollout_logprobs"])[batch.loss_mask].double()


def _largest_mean(batch: Batch, differences: Tensor) -> float:
    """The largest |mean| of a sequence's differences."""
    positions = batch.loss_mask.nonzero()[:, 0]
    sequence = torch.bucketize(positions, batch.cu_seqlens[1:].long(), right=True)
    sums = torch.bincount(sequence, weights=differences)
    counts = torch.bincount(sequence).clamp(min=1)
    return float((sums / counts).abs().max()) if len(sums) else 0.0
