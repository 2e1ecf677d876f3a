"""The policy loss: GRPO with DAPO's asymmetric clip and token-level mean, and truncated importance
sampling (TIS). There is no KL term and no entropy bonus."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from infir2.train.losses import TokenScores


@dataclass(frozen=True)
class PolicyInputs:
    """What the policy loss needs to know of n response tokens, beside their log-probabilities."""

    advantages: Tensor  # [n] of the token's response
    trainer_logprobs: Tensor  # [n] under the policy before the step's first update (pi_trainer)
    rollout_logprobs: Tensor  # [n] under the engine's policy that sampled it (pi_rollout)


@dataclass(frozen=True)
class PolicyLoss:
    """A `Loss` of n response tokens; `scores.inputs` are the fields of `PolicyInputs`.

    With ratio = pi / pi_trainer and the weight w = min(pi_trainer / pi_rollout, tis_cap), which is
    held constant, the loss of a token is
    -w * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A): arXiv 2503.14476,
    equation 8, with the weight of "Your efficient RL framework secretly brings you off-policy RL
    training" (TIS).
    """

    uniform_gradient: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = True

    clip_low: float
    clip_high: float
    tis_cap: float

    def __call__(self, scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns (loss [], metrics by name, each []), all summed over tokens."""
        assert scores.entropy is not None
        inputs = PolicyInputs(**scores.inputs)
        ratio = (scores.logprobs - inputs.trainer_logprobs).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        objective = torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
        importance = (inputs.trainer_logprobs - inputs.rollout_logprobs).exp()
        loss = -(importance.clamp(max=self.tis_cap) * objective).sum(dtype=torch.float64)
        metrics = {
            "clip_fraction": (clipped * inputs.advantages < ratio * inputs.advantages).sum(),
            "tis_capped_fraction": (importance > self.tis_cap).sum(),
            "entropy": scores.entropy.sum(),
        }
        return loss, metrics
