"""Losses as pure functions: the scores of trained tokens in, (loss sum, metric sums) out.

The trainer divides the sum by the number of trained tokens of the step, over all micro-batches and
ranks, so that every token has the same weight whichever rank or micro-batch it is on (the
normalization bug of transformers#34191 cannot occur).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenScores:
    """What the model computed for n trained tokens, and what the loss needs to know of each.

    Example: 3 tokens with `logprobs = tensor([-0.1, -2.3, -0.7])` and
    `inputs = {"advantages": tensor([1., 1., -1.])}`.
    """

    logprobs: Tensor  # [n] FP32, differentiable
    entropy: Tensor | None = None  # [n] FP32, nats, differentiable; None unless the loss needs it
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [n]: Batch.token_inputs
    num_sequences: int = 0  # in the micro-batch, whose tokens other ranks may have too:
    # sums values, in place, over the ranks that share the micro-batch
    sum_over_batch: Callable[[Tensor], Tensor] = lambda values: values


class Loss(Protocol):
    """A loss function, which declares what the trainer has to compute for it."""

    @property
    def uniform_gradient(self) -> bool:
        """True only if d loss / d logprobs is the same number for every token.

        The head may then compute its gradients during the forward pass (`token_logprobs`), which
        is wrong for a loss that weights its tokens.
        """
        ...

    @property
    def needs_entropy(self) -> bool:
        """Whether `TokenScores.entropy` has to be computed."""
        ...

    def __call__(self, scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns (loss [], metrics by name, each []), all summed over tokens."""
        ...


class NextTokenLoss:
    """Cross-entropy of the next token, summed over tokens: the loss of CPT and SFT."""

    uniform_gradient: ClassVar[bool] = True
    needs_entropy: ClassVar[bool] = False

    def __call__(self, scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
        return -scores.logprobs.sum(dtype=torch.float64), {}


next_token_loss = NextTokenLoss()
