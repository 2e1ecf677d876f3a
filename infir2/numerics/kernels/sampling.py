# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""Sampling one token per row of logits, with the log-probabilities that the trainer computes.

`infir2.engines.sampling.sample` is the reference. A row is read twice: for its log-sum-exp, which
is the head's own (`softmax.py`), and for the cumulative sum, in the order of the token ids. A row
depends on no other, and its log-probability has the bits of `label_logprobs` on equal logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.kernels.custom_op import operator
from infir2.numerics.kernels.softmax import CONFIG, log_sum_exp


@triton.jit
def _sample_kernel(
    logits_ptr, inverse_ptr, draw_ptr, token_ptr, logprob_ptr, columns,
    GIVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(inverse_ptr + row)
    greedy = wanted == 0.0
    inverse = tl.where(greedy, 1.0, wanted)
    top, normalizer, _ = log_sum_exp(logits_ptr, row, columns, inverse, False, WIDE)
    if GIVEN:
        token = tl.load(token_ptr + row)
    else:
        lane = tl.arange(0, WIDE)
        draw = tl.load(draw_ptr + row)
        before = draw * 0.0  # probability of the tokens before the block
        token = tl.zeros_like(row) + columns
        last = tl.zeros_like(row)  # the last token with a probability above 0
        for start in range(0, columns, WIDE):
            x = (
                tl.load(
                    logits_ptr + row * columns + start + lane,
                    mask=start + lane < columns,
                    other=float("-inf"),
                )
                * inverse
            )
            probability = tl.exp(x - normalizer)
            index = (start + lane).to(tl.int64)
            possible = probability > 0.0
            reached = possible & (before + tl.cumsum(probability, 0) > draw)
            hit = tl.where(greedy, x == top, reached)
            token = tl.minimum(token, tl.min(tl.where(hit, index, columns), axis=0))
            last = tl.maximum(last, tl.max(tl.where(possible, index, 0), axis=0))
            before += tl.sum(probability, axis=0)
        # Rounding can leave the sum below a draw next to 1.
        token = tl.where(token < columns, token, last)
        tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, tl.load(logits_ptr + row * columns + token) * inverse - normalizer)


@operator("infir2::sample_rows")
def sample_rows(
    logits: Tensor, inverse_temperatures: Tensor, draws: Tensor, given: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids int64 [T] and their FP32 log-probabilities [T] of FP32 logits [T, V].

    Args:
        logits: FP32 [T, V].
        inverse_temperatures: FP32 [T]; 0 takes the most likely token, at temperature 1.
        draws: FP32 [T], in [0, 1].
        given: int64 [T] to score these tokens instead of sampling, or empty.
    """
    rows = logits.shape[0]
    for each in (logits, inverse_temperatures, draws, given):
        assert each.is_contiguous(), "the kernel reads consecutive rows"
    token_ids = given.clone() if len(given) else logits.new_empty(rows, dtype=torch.int64)
    logprobs = logits.new_empty(rows)
    if rows:
        _sample_kernel[(rows,)](
            logits, inverse_temperatures, draws, token_ids, logprobs, logits.shape[1],
            GIVEN=bool(len(given)), **CONFIG,
        )  # fmt: skip
    return token_ids, logprobs


@sample_rows.register_fake
def _fake_sample_rows(
    logits: Tensor, inverse_temperatures: Tensor, draws: Tensor, given: Tensor
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)
