# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""The head's logits, with sums whose order does not depend on the number of rows.

`gemm_reference.fp32_product` is the reference. cuBLAS chooses another kernel for a few rows, which
splits the sum over the hidden size: then a token sampled in a small batch has other bits than the
trainer's. Here every number of rows has the same tiles, and a tile its sum in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.kernels.codec import INTERPRET, to_float32
from infir2.numerics.kernels.custom_op import operator

# One shape for all: a smaller tile for a few rows would be another instruction with other sums.
CONFIG = {"ROWS": 128, "TOKENS": 256, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _product_kernel(
    hidden_ptr, weight_ptr, logits_ptr, rows, tokens, depth, hidden_stride, weight_stride,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Consecutive programs share a tile of the weight, which is the larger operand.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside_row, inside_token = row < rows, token < tokens
    lane = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, depth, DEPTH):
        inside = start + lane < depth
        x = tl.load(
            hidden_ptr + row[:, None] * hidden_stride + (start + lane)[None, :],
            mask=inside_row[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + token[None, :] * weight_stride + (start + lane)[:, None],
            mask=inside_token[None, :] & inside[:, None],
            other=0.0,
        )
        if INTERPRET:  # its products of BF16 are those of the bits
            x, w = to_float32(x), to_float32(w)
        total = tl.dot(x, w, total)
    tl.store(
        logits_ptr + row[:, None] * tokens + token[None, :],
        total,
        mask=inside_row[:, None] & inside_token[None, :],
    )


@operator("infir2::head_product")
def head_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """`hidden [T, D] @ weight [V, D].T` as FP32 [T, V], of BF16 matrices with consecutive columns.

    A row of the result has the same bits whatever the other rows are.
    """
    assert hidden.stride(1) == weight.stride(1) == 1, "the kernel reads consecutive columns"
    logits = _fake_head_product(hidden, weight)
    if logits.numel():
        (rows, depth), tokens = hidden.shape, weight.shape[0]
        grid = (triton.cdiv(rows, CONFIG["ROWS"]), triton.cdiv(tokens, CONFIG["TOKENS"]))
        _product_kernel[grid](
            hidden, weight, logits, rows, tokens, depth, hidden.stride(0), weight.stride(0),
            **CONFIG,
        )  # fmt: skip
    return logits


@head_product.register_fake
def _fake_head_product(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)
