"""Objectives of the policy: a loss per response token, and the loss that the trainer minimizes.

With A the advantage of the token's response, pi the policy that is trained, pi_trainer the policy
before the step's first update, ratio = pi / pi_trainer, and clip(x) = x within
[1 - clip_low, 1 + clip_high]:

grpo: -min(ratio A, clip(ratio) A); where A < 0, at most -clip_dual A (arXiv 2402.03300, 2503.14476,
    1912.09729).
gspo: the same with the response's ratio, the geometric mean of its tokens' (arXiv 2507.18071,
    section 4.3, GSPO-token).
cispo: -clip(ratio) A log pi, where the clipped ratio is held constant (arXiv 2506.13585).

`PolicyLoss` multiplies by the importance weight (`importance.py`), adds KL and entropy terms, and
weights the tokens as rl.loss_mean says.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from infir2.config.schema import RlSection
from infir2.errors import ConfigError
from infir2.train.losses import TokenScores


@dataclass(frozen=True)
class PolicyTokens:
    """What an objective may know of n response tokens; each tensor is [n], all but two constant."""

    logprobs: Tensor  # of pi, differentiable
    entropy: Tensor  # of pi, nats, differentiable
    advantages: Tensor  # of the token's response
    trainer_logprobs: Tensor  # under the policy before the step's first update (pi_trainer)
    rollout_logprobs: Tensor  # under the engine's policy that sampled it (pi_rollout)
    sequence: Tensor  # int64, number of the token's response in the micro-batch
    # [n] -> [n]: means over each token's response; all ranks that share a micro-batch call it
    response_mean: Callable[[Tensor], Tensor]

    @property
    def log_ratio(self) -> Tensor:
        """log(pi / pi_trainer), differentiable."""
        return self.logprobs - self.trainer_logprobs


# Returns the loss of each token [n] and metrics by name, each [n]; the report shows clip_fraction.
Objective = Callable[[PolicyTokens, RlSection], tuple[Tensor, dict[str, Tensor]]]


def grpo(tokens: PolicyTokens, rl: RlSection) -> tuple[Tensor, dict[str, Tensor]]:
    """See the top of this file."""
    return _clipped_surrogate(tokens.log_ratio.exp(), tokens.advantages, rl)


def gspo(tokens: PolicyTokens, rl: RlSection) -> tuple[Tensor, dict[str, Tensor]]:
    """See the top of this file."""
    log_ratio = tokens.log_ratio
    constant = log_ratio.detach()
    # The response's ratio in value, each token's own gradient.
    ratio = (tokens.response_mean(constant) + (log_ratio - constant)).exp()
    return _clipped_surrogate(ratio, tokens.advantages, rl)


def cispo(tokens: PolicyTokens, rl: RlSection) -> tuple[Tensor, dict[str, Tensor]]:
    """See the top of this file."""
    ratio = tokens.log_ratio.detach().exp()
    clipped = _clip(ratio, rl)
    return -clipped * tokens.advantages * tokens.logprobs, {"clip_fraction": clipped != ratio}


OBJECTIVES: dict[str, Objective] = {"grpo": grpo, "gspo": gspo, "cispo": cispo}


def find_objective(name: str) -> Objective:
    """The objective of rl.loss. Raises ConfigError for a function that cannot be imported."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module may raise anything
        raise ConfigError(
            f"rl.loss: {name} cannot be imported ({error!r}): fix it, or set PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"rl.loss: {name} is no function")
    objective: Objective = function
    return objective


@dataclass(frozen=True)
class PolicyLoss:
    """A `Loss`: importance * objective + kl_coefficient KL - entropy_coefficient entropy, summed.

    `scores.inputs` are advantages, trainer_logprobs, rollout_logprobs; importance and is_capped
    (`importance.py`); sequence and response_tokens; weights (`groups.token_weights`);
    reference_logprobs if there is a KL term.
    """

    uniform_gradient: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = True

    rl: RlSection
    objective: Objective

    def __call__(self, scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns (loss [], metrics by name, each []), all summed over tokens."""
        tokens, inputs = _tokens(scores), scores.inputs
        loss, metrics = self.objective(tokens, self.rl)
        loss = inputs["importance"] * loss
        if self.rl.kl_coefficient:
            kl = kl_to_reference(tokens.logprobs - inputs["reference_logprobs"], self.rl)
            loss = loss + self.rl.kl_coefficient * kl
            metrics = metrics | {"reference_kl": kl}
        if self.rl.entropy_coefficient:
            loss = loss - self.rl.entropy_coefficient * tokens.entropy
        metrics = metrics | {"capped_fraction": inputs["is_capped"], "entropy": tokens.entropy}
        total = (inputs["weights"] * loss).sum(dtype=torch.float64)
        return total, {name: value.detach().sum() for name, value in metrics.items()}


def kl_to_reference(log_ratio: Tensor, rl: RlSection) -> Tensor:
    """Estimates [n] of KL(pi || reference) for log_ratio = log(pi / reference) of sampled tokens.

    As a loss, k1's gradient is 0 in expectation, k2's is that of the KL (joschu.net/blog/kl-approx,
    arXiv 2506.09477).
    """
    if rl.kl_estimator == "k1":
        return log_ratio
    if rl.kl_estimator == "k2":
        return log_ratio.square() / 2
    return (-log_ratio).exp() - 1 + log_ratio


def _tokens(scores: TokenScores) -> PolicyTokens:
    assert scores.entropy is not None
    inputs = scores.inputs
    sequence, length = inputs["sequence"], inputs["response_tokens"]

    def response_mean(values: Tensor) -> Tensor:
        sums = torch.zeros(scores.num_sequences, dtype=values.dtype, device=values.device)
        return scores.sum_over_batch(sums.index_add_(0, sequence, values))[sequence] / length

    return PolicyTokens(
        logprobs=scores.logprobs,
        entropy=scores.entropy,
        advantages=inputs["advantages"],
        trainer_logprobs=inputs["trainer_logprobs"],
        rollout_logprobs=inputs["rollout_logprobs"],
        sequence=sequence,
        response_mean=response_mean,
    )


def _clip(ratio: Tensor, rl: RlSection) -> Tensor:
    return ratio.clamp(1 - rl.clip_low, 1 + rl.clip_high)


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, rl: RlSection
) -> tuple[Tensor, dict[str, Tensor]]:
    plain, clipped = ratio * advantages, _clip(ratio, rl) * advantages
    objective = torch.minimum(plain, clipped)
    is_clipped = clipped < plain
    if rl.clip_dual:
        bound = rl.clip_dual * advantages
        is_bounded = (advantages < 0) & (objective < bound)
        objective = torch.where(is_bounded, bound, objective)
        is_clipped = is_clipped | is_bounded
    return -objective, {"clip_fraction": is_clipped}
