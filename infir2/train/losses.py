"""Losses as pure functions: the scores of trained tokens in, (sum over tokens, metrics) out.

The trainer divides the sum by the number of trained tokens of the whole step, over all micro-batches and ranks, so that a
token weighs the same wherever it lands (the normalisation bug of transformers#34191 cannot occur).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenScores:
    """What the model says of n trained tokens.

    Example: 3 tokens with `logprobs = tensor([-0.1, -2.3, -0.7])` and `extras = {"advantages": tensor([1., 1., -1.])}`.
    """

    logprobs: Tensor  # [n] FP32, differentiable
    entropy: Tensor | None = None  # [n] FP32, no gradient
    extras: dict[str, Tensor] = field(default_factory=dict)  # name -> [n], packed with the tokens


LossFunction = Callable[[TokenScores], tuple[Tensor, dict[str, Tensor]]]
"""scores -> (loss summed over tokens, metrics summed over tokens)"""


def next_token_loss(scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next token, summed: CPT and SFT."""
    return -scores.logprobs.sum(dtype=torch.float64), {}
