"""The policy loss: GRPO with DAPO's asymmetric clip and token-level mean, and truncated importance sampling (TIS)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from infir2.train.losses import TokenScores


@dataclass(frozen=True)
class PolicyLoss:
    """A `LossFunction` of n response tokens, with `extras` advantages, trainer_logprobs and rollout_logprobs, each [n].

    With ratio = pi / pi_trainer and w = min(pi_trainer / pi_rollout, tis_cap), held constant, the loss of a token is
    -w * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A): arXiv 2503.14476, equation 8, with the weight of
    "Your efficient RL framework secretly brings you off-policy RL training" (TIS). No KL term and no entropy bonus.
    """

    clip_low: float
    clip_high: float
    tis_cap: float

    def __call__(self, scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics, summed over tokens."""
        advantages, trainer = scores.extras["advantages"], scores.extras["trainer_logprobs"]
        ratio = (scores.logprobs - trainer).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        importance = (trainer - scores.extras["rollout_logprobs"]).exp()
        objective = torch.minimum(ratio * advantages, clipped * advantages)
        loss = -(importance.clamp(max=self.tis_cap) * objective).sum(dtype=torch.float64)
        assert scores.entropy is not None
        metrics = {
            "clip_fraction": (clipped * advantages < ratio * advantages).sum(),
            "tis_capped_fraction": (importance > self.tis_cap).sum(),
            "entropy": scores.entropy.sum(),
        }
        return loss, metrics
