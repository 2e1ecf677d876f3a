"""From the last hidden state to log-probabilities, without ever holding the logits of all tokens.

`logits = hidden @ head_weight.T / temperature` in FP32 (FP64 sums on a CPU) from a head weight that is rounded to the
hidden state's dtype. Backward computes each chunk's logits again instead of saving them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infir2.numerics import ops_cuda as fused
from infir2.numerics.gemm_reference import fp32_product
from infir2.numerics.weight_cache import rounded


def head_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits [T, V] FP32 of hidden [T, D] with head_weight [V, D]; differentiable in both.

    All T x V values exist at once: for sampling and tests. Training takes `token_logprobs`.
    """
    if fused.serves(hidden) and not (
        torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    ):
        return fp32_product(hidden, rounded(head_weight, torch.bfloat16, torch.bfloat16).t())
    work = _work_dtype(hidden)
    if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
        return (hidden.to(work) @ head_weight.to(hidden.dtype).to(work).t()).float()
    return (hidden.to(work) @ rounded(head_weight, hidden.dtype, work).t()).float()


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
        labels: [T] int64 in [0, V); a masked token's label may be any of them, such as 0.
        temperature: > 0.
        chunk_tokens: tokens whose logits exist at one time.
        with_entropy: also return the entropy of each distribution, nats.
        uniform_gradient: the loss is a plain sum, so that every log-probability gets the same gradient. On a GPU the
            gradients are then made while the logits are there, instead of from logits made again in the backward.

    Returns:
        (log-probabilities [T] FP32, differentiable in hidden and head_weight; entropy [T] FP32 without gradient, or None).

    Raises:
        ValueError: shapes that do not fit, a temperature or a chunk that is not positive.
    """
    if (
        hidden.ndim != 2
        or head_weight.ndim != 2
        or hidden.shape[1] != head_weight.shape[1]
        or labels.shape != hidden.shape[:1]
    ):
        found = ", ".join(str(list(t.shape)) for t in (hidden, head_weight, labels))
        raise ValueError(
            f"token_logprobs takes hidden [T, D], head_weight [V, D], labels [T]; got {found}"
        )
    if not temperature > 0 or chunk_tokens < 1:
        raise ValueError(
            f"temperature must be > 0 and chunk_tokens >= 1; got {temperature} and {chunk_tokens}"
        )
    if uniform_gradient and fused.serves(hidden) and hidden.shape[0] and torch.is_grad_enabled():
        return _SummedLogprobs.apply(hidden, head_weight, labels, temperature, chunk_tokens), None
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
        ctx.save_for_backward(hidden, head_weight, labels, normalizer)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        if fused.serves(hidden):
            bf16 = rounded(head_weight, torch.bfloat16, torch.bfloat16).t()
            for start in range(0, num_tokens, chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                logits = fp32_product(hidden[chunk], bf16)
                results = fused.kernels().label_logprobs(
                    logits, labels[chunk], temperature, with_entropy
                )
                logprobs[chunk], normalizer[chunk] = results[:2]
                if with_entropy:
                    entropy[chunk] = results[2]
            return logprobs, entropy
        work = _work_dtype(hidden)
        weight = rounded(head_weight, hidden.dtype, work).t()
        for start in range(0, num_tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            # Rounded to FP32 as `head_logits` gives them, so that the engine's log-probabilities are these to the last bit.
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
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head_weight, labels, normalizer = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = (
            torch.zeros(head_weight.shape, dtype=torch.float32, device=head_weight.device)
            if need_weight
            else None
        )
        with torch.autocast(hidden.device.type, enabled=False):
            if fused.serves(hidden):
                _backward_on_gpu(ctx, grad, grad_hidden, grad_weight)
                return grad_hidden, grad_weight, None, None, None, None
            weight = rounded(head_weight, hidden.dtype, torch.float32)
            for start in range(0, hidden.shape[0], ctx.chunk_tokens):
                chunk = slice(start, start + ctx.chunk_tokens)
                x = hidden[chunk].float()
                # d logprob / d logits = (one_hot(label) - softmax) / temperature
                probabilities = (
                    (x @ weight.t()).div_(ctx.temperature).sub_(normalizer[chunk, None]).exp_()
                )
                scaled = grad[chunk, None] / ctx.temperature
                grad_logits = probabilities.mul_(-scaled).scatter_add_(
                    1, labels[chunk, None], scaled
                )
                if grad_hidden is not None:
                    grad_hidden[chunk] = grad_logits @ weight
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.t(), x)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(head_weight.dtype),
            None,
            None,
            None,
            None,
        )


class _SummedLogprobs(torch.autograd.Function):
    """Log-probabilities whose gradients are all alike: made for a gradient of one, scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        weight = rounded(head_weight, torch.bfloat16, torch.bfloat16)
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        ones = torch.ones_like(logprobs)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros(head_weight.shape, dtype=torch.float32, device=hidden.device)
            if ctx.needs_input_grad[1]
            else None
        )
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = fp32_product(hidden[chunk], weight.t())
            logprobs[chunk], normalizer, _ = fused.kernels().label_logprobs(
                logits, labels[chunk], temperature, False
            )
            grad_logits = fused.kernels().label_logprobs_backward(
                logits, labels[chunk], normalizer, ones[chunk], temperature
            )
            _add_products(
                grad_logits,
                hidden[chunk],
                weight,
                None if grad_hidden is None else grad_hidden[chunk],
                grad_weight,
            )
        ctx.grads = (
            grad_hidden,
            grad_weight,
        )  # no inputs or outputs, and needed once: not for save_for_backward
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return *(None if part is None else part.mul_(grad[0]) for part in grads), None, None, None


def _add_products(
    grad_logits: Tensor,
    x: Tensor,
    weight: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    if grad_x is not None:
        torch.mm(grad_logits, weight, out=grad_x)
    if grad_weight is not None:
        fp32_product(grad_logits.t(), x, grad_weight)


def _backward_on_gpu(
    ctx: Any, grad: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> None:
    """Fill the gradients: logits again in FP32, their gradient in BF16, products summed in FP32."""
    hidden, head_weight, labels, normalizer = ctx.saved_tensors
    weight = rounded(head_weight, torch.bfloat16, torch.bfloat16)
    for start in range(0, hidden.shape[0], ctx.chunk_tokens):
        chunk = slice(start, start + ctx.chunk_tokens)
        x = hidden[chunk]
        logits = fp32_product(x, weight.t())
        grad_logits = fused.kernels().label_logprobs_backward(
            logits, labels[chunk], normalizer[chunk], grad[chunk].contiguous(), ctx.temperature
        )
        del logits
        _add_products(
            grad_logits, x, weight, None if grad_hidden is None else grad_hidden[chunk], grad_weight
        )


def _work_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float32 if hidden.is_cuda else torch.float64
