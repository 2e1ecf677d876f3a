# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""The head's softmax over the vocabulary, with one pass over the logits in each direction.

`infir2.numerics.head` is the reference. The forward computes the log-sum-exp of FP32 logits /
temperature, the label's log-probability and the entropy; the backward BF16 gradients of the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.kernels.codec import round_to_bf16
from infir2.numerics.kernels.custom_op import operator

CONFIG = {"WIDE": 4096, "num_warps": 8}


@triton.jit
def log_sum_exp(
    logits_ptr, row, columns, inverse_temperature, ENTROPY: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """(maximum, log-sum-exp, mean) of one row of logits * inverse_temperature.

    The mean is over the softmax; 0 without ENTROPY.
    """
    lane = tl.arange(0, WIDE)
    largest = tl.full((WIDE,), float("-inf"), tl.float32)
    total = tl.zeros((WIDE,), tl.float32)
    weighted = tl.zeros((WIDE,), tl.float32)
    for start in range(0, columns, WIDE):
        x = (
            tl.load(
                logits_ptr + row * columns + start + lane,
                mask=start + lane < columns,
                other=float("-inf"),
            )
            * inverse_temperature
        )
        higher = tl.maximum(largest, x)
        shrink = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - higher))
        share = tl.where(x == float("-inf"), 0.0, tl.exp(x - higher))
        total = total * shrink + share
        if ENTROPY:
            weighted = weighted * shrink + tl.where(share == 0.0, 0.0, share * x)
        largest = higher
    top = tl.max(largest, axis=0)
    shrink = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - top))
    sum_exp = tl.sum(total * shrink, axis=0)
    return top, top + tl.log(sum_exp), tl.sum(weighted * shrink, axis=0) / sum_exp


@triton.jit
def _forward_kernel(
    logits_ptr, labels_ptr, logprob_ptr, normalizer_ptr, entropy_ptr, columns, inverse_temperature,
    ENTROPY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _, normalizer, mean = log_sum_exp(logits_ptr, row, columns, inverse_temperature, ENTROPY, WIDE)
    label = tl.load(labels_ptr + row)
    tl.store(normalizer_ptr + row, normalizer)
    tl.store(
        logprob_ptr + row,
        tl.load(logits_ptr + row * columns + label) * inverse_temperature - normalizer,
    )
    if ENTROPY:
        tl.store(entropy_ptr + row, normalizer - mean)


@triton.jit
def _backward_kernel(
    logits_ptr,
    labels_ptr,
    normalizer_ptr,
    grad_ptr,
    entropy_ptr,
    grad_entropy_ptr,
    out_ptr,
    columns,
    inverse_temperature,
    ENTROPY: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = lane < columns
    x = tl.load(logits_ptr + row * columns + lane, mask=inside, other=0.0) * inverse_temperature
    logprob = x - tl.load(normalizer_ptr + row)
    probability = tl.exp(logprob)
    scaled = tl.load(grad_ptr + row) * inverse_temperature
    grad = scaled * (tl.where(lane == tl.load(labels_ptr + row), 1.0, 0.0) - probability)
    if ENTROPY:
        surprise = tl.where(probability == 0.0, 0.0, logprob + tl.load(entropy_ptr + row))
        scaled_entropy = tl.load(grad_entropy_ptr + row) * inverse_temperature
        grad -= scaled_entropy * probability * surprise
    tl.store(
        out_ptr + row * columns + lane,
        round_to_bf16(grad).to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@operator("infir2::label_logprobs")
def label_logprobs(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Label's log-probability, log-sum-exp and entropy, FP32 [T] each, of logits / temperature.

    logits are FP32 [T, V], labels [T]; without `with_entropy` the entropy is empty.
    """
    logprobs, normalizer, entropy = _fake_label_logprobs(logits, labels, temperature, with_entropy)
    if logits.shape[0]:
        _forward_kernel[(logits.shape[0],)](
            logits,
            labels,
            logprobs,
            normalizer,
            entropy,
            logits.shape[1],
            1.0 / temperature,
            ENTROPY=with_entropy,
            **CONFIG,
        )
    return logprobs, normalizer, entropy


@label_logprobs.register_fake
def _fake_label_logprobs(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows),
        logits.new_empty(rows),
        logits.new_empty(rows if with_entropy else 0),
    )


@operator("infir2::label_logprobs_backward")
def label_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    normalizer: Tensor,
    grad: Tensor,
    entropy: Tensor,
    grad_entropy: Tensor,
    temperature: float,
) -> Tensor:
    """BF16 gradient of the logits [T, V] for `grad` [T] of the labels' log-probabilities.

    `entropy` and its gradient are [T], or both empty for an entropy that has no gradient.
    """
    out = torch.empty(logits.shape, dtype=torch.bfloat16, device=logits.device)
    rows, columns = logits.shape
    if rows:
        grid = (rows, triton.cdiv(columns, CONFIG["WIDE"]))
        _backward_kernel[grid](
            logits,
            labels,
            normalizer,
            grad,
            entropy,
            grad_entropy,
            out,
            columns,
            1.0 / temperature,
            ENTROPY=bool(len(grad_entropy)),
            **CONFIG,
        )
    return out


@label_logprobs_backward.register_fake
def _fake_label_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    normalizer: Tensor,
    grad: Tensor,
    entropy: Tensor,
    grad_entropy: Tensor,
    temperature: float,
) -> Tensor:
    return torch.empty(logits.shape, dtype=torch.bfloat16, device=logits.device)
