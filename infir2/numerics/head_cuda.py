"""The head's operations on a GPU: FP32 logits of BF16 operands, softmax and its gradient in
kernels.

The signatures are those of `head_reference`, which defines the operations; `head` chooses.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infir2.numerics import head_reference
from infir2.numerics.gemm_reference import fp32_product
from infir2.numerics.kernels import api as kernels
from infir2.numerics.weight_cache import rounded


def head_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits [T, V] FP32 of hidden [T, D] with head_weight [V, D]; differentiable in both."""
    if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
        return head_reference.head_logits(hidden, head_weight)
    return _logits(hidden, _bf16(head_weight))


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
    uniform_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `head.token_logprobs`."""
    if uniform_gradient and hidden.shape[0] and torch.is_grad_enabled():
        return _SummedLogprobs.apply(hidden, head_weight, labels, temperature, chunk_tokens), None
    logprobs, entropy = _TokenLogprobs.apply(
        hidden, head_weight, labels, temperature, chunk_tokens, with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """The backward computes each chunk's logits again instead of saving them."""

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
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        normalizer = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
        ctx.save_for_backward(hidden, head_weight, labels, normalizer, entropy)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)  # None for an entropy that is only measured
        weight = _bf16(head_weight)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = _logits(hidden[chunk], weight)
            results = kernels.label_logprobs(logits, labels[chunk], temperature, with_entropy)
            logprobs[chunk], normalizer[chunk] = results[:2]
            if with_entropy:
                entropy[chunk] = results[2]
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight, labels, normalizer, entropy = ctx.saved_tensors
        grad_hidden, grad_weight = _empty_gradients(ctx, hidden, head_weight)
        grad = torch.zeros_like(normalizer) if grad is None else grad.contiguous()
        if grad_entropy is None:
            entropy = grad_entropy = grad.new_empty(0)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = _bf16(head_weight)
            for start in range(0, hidden.shape[0], ctx.chunk_tokens):
                chunk = slice(start, start + ctx.chunk_tokens)
                logits = _logits(hidden[chunk], weight)
                grad_logits = kernels.label_logprobs_backward(
                    logits,
                    labels[chunk],
                    normalizer[chunk],
                    grad[chunk],
                    entropy[chunk],
                    grad_entropy[chunk].contiguous(),
                    ctx.temperature,
                )
                del logits
                _add_products(grad_logits, chunk, hidden, weight, grad_hidden, grad_weight)
        return grad_hidden, grad_weight, None, None, None, None


class _SummedLogprobs(torch.autograd.Function):
    """Log-probabilities whose gradients are all equal.

    The forward computes the gradients of their sum, and the backward scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        weight = _bf16(head_weight)
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        ones, none = torch.ones_like(logprobs), logprobs.new_empty(0)
        grad_hidden, grad_weight = _empty_gradients(ctx, hidden, head_weight)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = fp32_product(hidden[chunk], weight.t())
            logprobs[chunk], normalizer, _ = kernels.label_logprobs(
                logits, labels[chunk], temperature, False
            )
            grad_logits = kernels.label_logprobs_backward(
                logits, labels[chunk], normalizer, ones[chunk], none, none, temperature
            )
            _add_products(grad_logits, chunk, hidden, weight, grad_hidden, grad_weight)
        # Neither inputs nor outputs, and used once: an attribute instead of save_for_backward.
        ctx.grads = (grad_hidden, grad_weight)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return *(None if part is None else part.mul_(grad[0]) for part in grads), None, None, None


def _empty_gradients(
    ctx: Any, hidden: Tensor, head_weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the gradients that are needed: BF16 [T, D], and FP32 zeros [V, D]."""
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_weight = None
    if need_weight:
        grad_weight = torch.zeros(head_weight.shape, dtype=torch.float32, device=hidden.device)
    return torch.empty_like(hidden) if need_hidden else None, grad_weight


def _add_products(
    grad_logits: Tensor,
    chunk: slice,
    hidden: Tensor,
    weight: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """grad_hidden = grad_logits @ W for the chunk; grad_W += grad_logits.T @ hidden, in FP32."""
    if grad_hidden is not None:
        torch.mm(grad_logits, weight, out=grad_hidden[chunk])
    if grad_weight is not None:
        fp32_product(grad_logits.t(), hidden[chunk], grad_weight)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """FP32 logits of a policy: a row's bits depend on no other row.

    So a rollout in a small batch has the bits of the trainer's large one.
    """
    if hidden.dtype != torch.bfloat16:
        return fp32_product(hidden, weight.t())
    return kernels.head_product(hidden, weight)


def _bf16(head_weight: Tensor) -> Tensor:
    return rounded(head_weight, torch.bfloat16, torch.bfloat16)
