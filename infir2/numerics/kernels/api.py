"""The kernels as functions of `Fp8Tensor`: conversions with the reference's bits, and producers fused with them.

Importing this file imports triton and starts no device. With TRITON_INTERPRET=1 set before the import the kernels run on
CPU tensors, which is how tests compare them with the reference where there is no GPU.
"""

import torch
from torch import Tensor

from infir2.numerics import quantize_reference as reference
from infir2.numerics.formats import GROUP, ROW_BLOCK, TILE_BLOCK, Fp8Tensor, check_format
from infir2.numerics.kernels import norm, swiglu
from infir2.numerics.kernels import quantizers as matrix
from infir2.numerics.kernels.norm import rms_norm as rms_norm
from infir2.numerics.kernels.norm import rms_norm_backward as rms_norm_backward
from infir2.numerics.kernels.rope import rope as rope
from infir2.numerics.kernels.softmax import label_logprobs as label_logprobs
from infir2.numerics.kernels.softmax import label_logprobs_backward as label_logprobs_backward
from infir2.numerics.kernels.swiglu import swiglu_backward as swiglu_backward

swiglu_product = swiglu.swiglu


def quantize(
    x: Tensor, block: tuple[int, int] = ROW_BLOCK, scale_format: str = "pow2"
) -> Fp8Tensor:
    """x [R, C] (BF16, FP16, FP32) in 1x128 or 128x128 blocks; ValueError for another block or format."""
    pow2 = _is_pow2(scale_format, block)
    codes, scale = (
        matrix.quantize_rows(x, pow2)
        if tuple(block) == ROW_BLOCK
        else matrix.quantize_tiles(x, pow2, False)
    )
    return Fp8Tensor(codes, scale, (block[0], block[1]), scale_format)


def transpose(t: Fp8Tensor) -> Fp8Tensor:
    """The transposed matrix [C, R] in 128x128 blocks, from the codes; ValueError for 1x128 "fp32"."""
    if t.block == TILE_BLOCK:
        scale = matrix.empty_tile_scales(t.codes, t.shape[1], t.shape[0]).copy_(t.scale.t())
        return Fp8Tensor(matrix.transpose_bytes(t.codes), scale, TILE_BLOCK, t.scale_format)
    if t.scale_format != "pow2":
        raise ValueError(
            '1x128 codes with "fp32" scales cannot be transposed exactly; use quantize(x.T, (128, 128), "fp32")'
        )
    return _fp8(matrix.transpose_rows(t.codes, t.scale), TILE_BLOCK, "pow2")


def dequantize(t: Fp8Tensor, dtype: torch.dtype) -> Tensor:
    """`codes * scale` [R, C]; only 1x128 blocks to BF16 have a kernel."""
    if t.block != ROW_BLOCK or dtype != torch.bfloat16:
        return reference.dequantize(t, dtype)
    values: Tensor = matrix.dequantize_rows(t.codes, t.scale)
    return values


def quantize_gradient(grad: Tensor, scale_format: str = "pow2") -> tuple[Fp8Tensor, Fp8Tensor]:
    """`quantize(grad)` and `quantize(grad.T)`, both 1x128, from one read of grad [T, N]."""
    codes, scale, codes_t, scale_t = matrix.quantize_rows_and_columns(grad, _is_pow2(scale_format))
    return Fp8Tensor(codes, scale, ROW_BLOCK, scale_format), Fp8Tensor(
        codes_t, scale_t, ROW_BLOCK, scale_format
    )


def quantize_input(x: Tensor, scale_format: str = "pow2") -> tuple[Fp8Tensor, Fp8Tensor]:
    """`quantize(x)` and the weight gradient's operand, 128x128 blocks of x.T, from one read of x [T, K].

    The second is `transpose(quantize(x))` for "pow2" and `quantize(x.T, (128, 128), "fp32")` for "fp32".
    """
    if (
        x.shape[1] == 1
    ):  # Triton 3.6 folds a row stride of 1 into wrong addresses in this kernel; the reference takes its place
        rows = reference.quantize(x, ROW_BLOCK, scale_format)
        return rows, reference.transpose(rows) if scale_format == "pow2" else reference.quantize(
            x.t(), TILE_BLOCK, scale_format
        )
    codes, scale, codes_t, scale_t = matrix.quantize_rows_and_tiles(x, _is_pow2(scale_format))
    return Fp8Tensor(codes, scale, ROW_BLOCK, scale_format), Fp8Tensor(
        codes_t, scale_t, TILE_BLOCK, scale_format
    )


def quantize_transposed(x: Tensor, scale_format: str = "pow2") -> Fp8Tensor:
    """The second result of `quantize_input` alone, for an x [T, K] that something else keeps anyway."""
    return _fp8(matrix.quantize_transposed(x, _is_pow2(scale_format)), TILE_BLOCK, scale_format)


def quantize_weight(master: Tensor, scale_format: str = "pow2") -> Fp8Tensor:
    """128x128 blocks of the BF16-rounded master [N, K]."""
    return _fp8(
        matrix.quantize_tiles(master, _is_pow2(scale_format), True), TILE_BLOCK, scale_format
    )


def encode_weight_rows(master: Tensor, scale: Tensor, scale_format: str) -> Tensor:
    """Codes [R, K] of rows of a weight, rounded to BF16, with given scales [R, ceil(K / 128)]."""
    return matrix.encode_weight_rows(master, scale, scale_format == "pow2")


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, scale_format: str = "pow2"
) -> tuple[Fp8Tensor, Tensor]:
    """`quantize(rms_norm(x))` for x [T, D] BF16, and rstd [T] float32 for the backward."""
    codes, scale, rstd = norm.rms_norm_quantize(x, weight, eps, _is_pow2(scale_format))
    return Fp8Tensor(codes, scale, ROW_BLOCK, scale_format), rstd


def rms_norm_transposed(
    x: Tensor, rstd: Tensor, weight: Tensor, scale_format: str = "pow2"
) -> Fp8Tensor:
    """The second result of `quantize_input(rms_norm(x))`, made again from x [T, D] and rstd."""
    return _fp8(
        norm.rms_norm_transposed(x, rstd, weight, _is_pow2(scale_format)), TILE_BLOCK, scale_format
    )


def swiglu_quantize(gate: Tensor, up: Tensor, scale_format: str = "pow2") -> Fp8Tensor:
    """`quantize(silu(gate) * up)`, both [T, F] BF16."""
    return _fp8(swiglu.swiglu_quantize(gate, up, _is_pow2(scale_format)), ROW_BLOCK, scale_format)


def swiglu_transposed(gate: Tensor, up: Tensor, scale_format: str = "pow2") -> Fp8Tensor:
    """The second result of `quantize_input(silu(gate) * up)`, made again from gate and up [T, F]."""
    return _fp8(
        swiglu.swiglu_transposed(gate, up, _is_pow2(scale_format)), TILE_BLOCK, scale_format
    )


def swiglu_backward_quantize(
    grad: Tensor, gate: Tensor, up: Tensor, scale_format: str = "pow2"
) -> tuple[Fp8Tensor, Fp8Tensor]:
    """`quantize_gradient([dgate | dup])` [T, 2F] without the BF16 gradient, for grad, gate, up [T, F].

    Raises:
        ValueError: 128 does not divide F, so that the halves share no block grid; use `swiglu_backward` and quantise each.
    """
    if grad.shape[1] % GROUP:
        raise ValueError(
            f"a fused gate/up gradient needs F divisible by 128, got {grad.shape[1]}; quantise the halves of swiglu_backward"
        )
    codes, scale, codes_t, scale_t = swiglu.swiglu_backward_quantize(
        grad, gate, up, _is_pow2(scale_format)
    )
    return Fp8Tensor(codes, scale, ROW_BLOCK, scale_format), Fp8Tensor(
        codes_t, scale_t, ROW_BLOCK, scale_format
    )


def _fp8(parts: tuple[Tensor, Tensor], block: tuple[int, int], scale_format: str) -> Fp8Tensor:
    return Fp8Tensor(parts[0], parts[1], block, scale_format)


def _is_pow2(scale_format: str, block: tuple[int, int] = ROW_BLOCK) -> bool:
    check_format(block, scale_format)
    return scale_format == "pow2"
