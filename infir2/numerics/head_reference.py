"""The definition of the head's operations in plain PyTorch: FP64 sums on a CPU, FP32 on a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infir2.numerics.weight_cache import rounded


def head_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits [T, V] FP32 of hidden [T, D] with head_weight [V, D]; differentiable in both."""
    work = _work_dtype(hidden)
    if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
        return (hidden.to(work) @ head_weight.to(hidden.dtype).to(work).t()).float()
    return (hidden.to(work) @ rounded(head_weight, hidden.dtype, work).t()).float()


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
    uniform_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `head.token_logprobs`; `uniform_gradient` makes no difference here."""
    logprobs, entropy = _TokenLogprobs.apply(
        hidden, head_weight, labels, temperature, chunk_tokens, with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden.shape[0]
        logprobs = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        normalizer = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
        ctx.save_for_backward(hidden, head_weight, labels, normalizer, entropy)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)  # None for an entropy that is only measured
        work = _work_dtype(hidden)
        weight = rounded(head_weight, hidden.dtype, work).t()
        for start in range(0, num_tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            # Rounded to FP32 like those of `head_logits`, so that an engine that samples from
            # `head_logits` computes the same log-probabilities to the last bit.
            logits = (hidden[chunk].to(work) @ weight).float().to(work).div_(temperature)
            log_sum = torch.logsumexp(logits, dim=-1)
            logprobs[chunk] = logits.gather(1, labels[chunk, None]).squeeze(1).sub_(log_sum)
            normalizer[chunk] = log_sum
            if with_entropy:
                logits.sub_(log_sum[:, None])
                entropy[chunk] = -logits.exp().mul_(logits).sum(dim=-1)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight, labels, normalizer, entropy = ctx.saved_tensors
        grad = torch.zeros_like(normalizer) if grad is None else grad
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = (
            torch.zeros(head_weight.shape, dtype=torch.float32, device=head_weight.device)
            if need_weight
            else None
        )
        with torch.autocast(hidden.device.type, enabled=False):
            weight = rounded(head_weight, hidden.dtype, torch.float32)
            for start in range(0, hidden.shape[0], ctx.chunk_tokens):
                chunk = slice(start, start + ctx.chunk_tokens)
                x = hidden[chunk].float()
                logprobs = (x @ weight.t()).div_(ctx.temperature).sub_(normalizer[chunk, None])
                grad_logits = _grad_logits(
                    logprobs,
                    labels[chunk, None],
                    grad[chunk, None] / ctx.temperature,
                    entropy[chunk, None],
                    None if grad_entropy is None else grad_entropy[chunk, None] / ctx.temperature,
                )
                if grad_hidden is not None:
                    grad_hidden[chunk] = grad_logits @ weight
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.t(), x)
        if grad_weight is not None:
            grad_weight = grad_weight.to(head_weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _grad_logits(
    logprobs: Tensor, labels: Tensor, grad: Tensor, entropy: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """Gradient [T, V] of logits / temperature, whose log-softmax is `logprobs`.

    The others are [T, 1]: d logprob / d x = one_hot(label) - p, and d entropy / d x =
    -p * (log p + entropy).
    """
    if grad_entropy is None:
        return logprobs.exp_().mul_(-grad).scatter_add_(1, labels, grad)
    probabilities = logprobs.exp()
    surprise = torch.where(probabilities == 0, 0.0, logprobs + entropy)
    grad_logits = probabilities * (-grad - grad_entropy * surprise)
    return grad_logits.scatter_add_(1, labels, grad)


def _work_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float32 if hidden.is_cuda else torch.float64
