"""From the last hidden state to log-probabilities, without holding the logits of all tokens.

`logits = hidden @ head_weight.T / temperature` in FP32, with the head's weight rounded to the dtype
of the hidden state. The logits of one chunk of tokens exist at a time. `head_reference` defines the
results, `head_cuda` computes them with kernels; `_definitions_for` chooses."""

from typing import Protocol

from torch import Tensor

from infir2.numerics import head_reference, ops


class HeadOperations(Protocol):
    """The signatures of `head_reference` and `head_cuda`."""

    def head_logits(self, hidden: Tensor, head_weight: Tensor) -> Tensor: ...
    def token_logprobs(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
        uniform_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


def _definitions_for(hidden: Tensor) -> HeadOperations:
    if not ops.runs_on_kernels(hidden):
        return head_reference
    from infir2.numerics import head_cuda  # imports triton, which may be missing elsewhere

    return head_cuda


def head_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits [T, V] FP32 of hidden [T, D] with head_weight [V, D]; differentiable in both.

    All T x V values exist at once, for sampling and tests. Training uses `token_logprobs`.
    """
    return _definitions_for(hidden).head_logits(hidden, head_weight)


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
    with_entropy: bool = False,
    uniform_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token's label under `softmax(logits / temperature)`.

    Args:
        hidden: [T, D], after the final norm.
        head_weight: [V, D] FP32 master.
        labels: [T] int64 in [0, V); a masked token may have any label, such as 0.
        temperature: > 0.
        chunk_tokens: number of tokens whose logits exist at a time.
        with_entropy: also return the entropy of each distribution, nats.
        uniform_gradient: the loss is a plain sum, so that every log-probability has the same
            gradient. A GPU then computes gradients while it has the logits, instead of computing
            the logits again in the backward.

    Returns:
        Log-probabilities [T] FP32 and the entropy [T] FP32 or None, both differentiable in hidden
        and head_weight.

    Raises:
        ValueError: shapes that do not match, a temperature or a chunk size that is not positive.
    """
    matrices = hidden.ndim == 2 and head_weight.ndim == 2
    if not matrices or hidden.shape[1] != head_weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = ", ".join(str(list(t.shape)) for t in (hidden, head_weight, labels))
        raise ValueError(
            f"token_logprobs needs hidden [T, D], head_weight [V, D], labels [T]; got {shapes}"
        )
    if not temperature > 0 or chunk_tokens < 1:
        raise ValueError(
            f"temperature must be > 0 and chunk_tokens >= 1; got {temperature} and {chunk_tokens}"
        )
    return _definitions_for(hidden).token_logprobs(
        hidden, head_weight, labels, temperature, chunk_tokens, with_entropy, uniform_gradient
    )
