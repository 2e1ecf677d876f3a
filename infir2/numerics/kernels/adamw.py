# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""AdamW in one pass over a parameter whose moments are FP32, BF16 or 1x128 FP8 codes. `infir2.numerics.adamw` is the reference."""

import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.kernels.codec import (
    GROUP,
    block_scale,
    cast_to_e4m3,
    decode,
    magnitude_bits,
    reciprocal_of_power,
    round_to_bf16,
    to_float32,
)

_ROWS = 8


@triton.jit
def _noise(index, step):
    """20 bits from a position and a step: the same on every machine."""
    x = index.to(tl.uint32) * 0x9E3779B1 + step.to(tl.uint32) * 0x85EBCA77
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return ((x ^ (x >> 16)) & 0xFFFFF).to(tl.int32)


@triton.jit
def _encode(x, scale, noise):
    """E4M3 bytes of x / scale, rounded up with the probability of the remainder; scale is a power of two."""
    scaled = x * reciprocal_of_power(scale)
    bits = magnitude_bits(scaled)
    normal = ((bits + noise) & -1048576).to(tl.float32, bitcast=True)
    steps = bits.to(tl.float32, bitcast=True) * 512.0 + noise.to(tl.float32) * 9.5367431640625e-07
    magnitude = tl.where(bits < 0x3C800000, tl.floor(steps) * 0.001953125, normal)
    return cast_to_e4m3(tl.where(scaled < 0, -magnitude, magnitude))


@triton.jit(do_not_specialize=["step"])  # the first step is 1, which would become a constant without a type
def _adamw_kernel(
    p_ptr, g_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr, size, groups, step, lr, beta1, beta2, eps, decay, correction1, correction2,
    FP8: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = index < size
    p = tl.load(p_ptr + index, mask=inside, other=0)
    g = to_float32(tl.load(g_ptr + index, mask=inside, other=0))
    m = tl.load(m_ptr + index, mask=inside, other=0)
    v = tl.load(v_ptr + index, mask=inside, other=0)
    if FP8:
        m = decode(m) * tl.load(m_scale_ptr + row, mask=row < groups, other=1.0)[:, None]
        root = decode(v) * tl.load(v_scale_ptr + row, mask=row < groups, other=1.0)[:, None]
        v = root * root
    m = to_float32(m) * beta1 + g * (1 - beta1)
    v = to_float32(v) * beta2 + g * g * (1 - beta2)
    p = p * (1 - lr * decay) - lr * (m / correction1) / (tl.sqrt_rn(v / correction2) + eps)
    tl.store(p_ptr + index, p, mask=inside)
    if FP8:
        noise = _noise(index, step)
        m_scale = block_scale(tl.max(magnitude_bits(m), axis=1), True)
        root = tl.sqrt_rn(v)
        v_scale = block_scale(tl.max(magnitude_bits(root), axis=1), True)
        tl.store(m_ptr + index, _encode(m, m_scale[:, None], noise), mask=inside)
        tl.store(v_ptr + index, _encode(root, v_scale[:, None], noise), mask=inside)
        tl.store(m_scale_ptr + row, m_scale, mask=row < groups)
        tl.store(v_scale_ptr + row, v_scale, mask=row < groups)
    elif m_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(m_ptr + index, round_to_bf16(m).to(tl.bfloat16), mask=inside)
        tl.store(v_ptr + index, round_to_bf16(v).to(tl.bfloat16), mask=inside)
    else:
        tl.store(m_ptr + index, m, mask=inside)
        tl.store(v_ptr + index, v, mask=inside)


def adamw_(p: Tensor, g: Tensor, m: Tensor, m_scale: Tensor | None, v: Tensor, v_scale: Tensor | None, numbers: tuple[float, ...]) -> None:
    """Update p (FP32, contiguous) and its moments in place; `numbers` are step, lr, beta1, beta2, eps, decay and both corrections."""
    size = p.numel()
    groups = -(-size // GROUP.value)
    if size:
        _adamw_kernel[(triton.cdiv(groups, _ROWS),)](
            p, g, m, m if m_scale is None else m_scale, v, v if v_scale is None else v_scale, size, groups, *numbers,
            FP8=m_scale is not None, ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
