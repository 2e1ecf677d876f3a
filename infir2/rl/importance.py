"""Importance weights of tokens that the engine sampled with other probabilities than the trainer's.

With r = pi_trainer / pi_rollout of the token, its product over the response, or its geometric mean
there (rl.correction_level), the weight is

tis: min(r, cap): "Your efficient RL framework secretly brings you off-policy RL training".
mis: r within [floor, cap], otherwise 0: "When speed kills stability" (richardli.xyz/rl-collapse).
icepop: mis by token, with a floor: ringtech.notion.site/icepop.
none: 1.
"""

from dataclasses import replace

import torch
from torch import Tensor

from infir2.config.schema import RlSection
from infir2.data import Batch


def add_importance(batch: Batch, rl: RlSection) -> Batch:
    """The batch with the token inputs importance (FP32) and is_capped (bool), each [T].

    Needs trainer_logprobs and rollout_logprobs. `is_capped` marks tokens whose weight the cap or
    the floor has changed. Also adds sequence (int64) and response_tokens (FP32), each [T]: the
    number of a token's response in the batch, and how many trained tokens that has.
    """
    inputs = batch.token_inputs
    sequence = _sequences(batch)
    counts = torch.bincount(sequence[batch.loss_mask], minlength=len(batch.cu_seqlens) - 1)
    log_ratio = inputs["trainer_logprobs"] - inputs["rollout_logprobs"]
    if rl.correction_level != "token":
        sums = torch.zeros(len(counts), dtype=torch.float64)
        sums.index_add_(0, sequence, log_ratio.double() * batch.loss_mask)
        means = sums / (counts.clamp(min=1) if rl.correction_level == "geometric" else 1)
        log_ratio = means[sequence].float()
    importance, is_capped = importance_weights(log_ratio, rl)
    added = {
        "importance": importance,
        "is_capped": is_capped,
        "sequence": sequence,
        "response_tokens": counts[sequence].float(),
    }
    return replace(batch, token_inputs=inputs | added)


def importance_weights(log_ratio: Tensor, rl: RlSection) -> tuple[Tensor, Tensor]:
    """(weights, whether cap or floor changed them) of log r, each of its shape."""
    ratio = log_ratio.exp()
    if rl.correction == "none":
        return torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool)
    if rl.correction == "tis":
        return ratio.clamp(max=rl.correction_cap), ratio > rl.correction_cap
    outside = (ratio > rl.correction_cap) | (ratio < rl.correction_floor)
    return torch.where(outside, 0.0, ratio), outside


def _sequences(batch: Batch) -> Tensor:
    """int64 [T], number of the sequence of each token."""
    lengths = batch.cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)
