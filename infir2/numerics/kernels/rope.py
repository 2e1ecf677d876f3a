# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""Bias and rotary embedding of the fused q, k, v projection, one pass forward and one backward.

`infir2.numerics.apply_rope` is the reference: it rotates in FP32, rounding each product and sum,
and then rounds to BF16. The bias is added to the BF16 product and rounded first, as a separate
linear layer would round it.
"""

import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.kernels.codec import round_to_bf16, to_float32
from infir2.numerics.kernels.custom_op import operator

_TOKENS = 32  # tokens of one head that a program rotates


@triton.jit
def _rotate(first, second, cos, sin, INVERSE: tl.constexpr):
    """(first, second) rotated by the angle, or by its negative."""
    if INVERSE:
        return first * cos + second * sin, second * cos - first * sin
    else:
        return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, cos_ptr, sin_ptr, out_ptr,
    tokens, q_heads, k_heads, q_stride, k_stride, v_stride, out_stride,
    HALF: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    head = tl.program_id(1)
    lane = tl.arange(0, WIDE)
    inside = (token < tokens)[:, None] & (lane < HALF)[None, :]
    source = q_ptr + token[:, None] * q_stride + head * 2 * HALF
    if head >= q_heads + k_heads:
        source = v_ptr + token[:, None] * v_stride + (head - q_heads - k_heads) * 2 * HALF
    elif head >= q_heads:
        source = k_ptr + token[:, None] * k_stride + (head - q_heads) * 2 * HALF
    first = to_float32(tl.load(source + lane[None, :], mask=inside, other=0))
    second = to_float32(tl.load(source + HALF + lane[None, :], mask=inside, other=0))
    if HAS_BIAS:
        bias = bias_ptr + head * 2 * HALF + lane
        first = round_to_bf16(
            first + round_to_bf16(tl.load(bias, mask=lane < HALF, other=0))[None, :]
        )
        second = round_to_bf16(
            second + round_to_bf16(tl.load(bias + HALF, mask=lane < HALF, other=0))[None, :]
        )
    if head < q_heads + k_heads:
        angle = token[:, None] * HALF + lane[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside, other=0)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0)
        first, second = _rotate(first, second, cos, sin, INVERSE)
    target = out_ptr + token[:, None] * out_stride + head * 2 * HALF + lane[None, :]
    kind = out_ptr.dtype.element_ty
    tl.store(target, round_to_bf16(first).to(kind), mask=inside)
    tl.store(target + HALF, round_to_bf16(second).to(kind), mask=inside)


@operator("infir2::rope")
def rope(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool
) -> Tensor:
    """Add the bias to q [T, N, H], k and v [T, G, H] BF16, and rotate q and k.

    Args:
        bias: FP32 [(N + 2 G) H], which is rounded to BF16 first, or None.
        cos: FP32 [T, 1, H / 2] from `rope_tables`; sin likewise.
        inverse: rotate by the negative angle, which is the backward.

    Returns:
        q, k and v in one matrix [T, (N + 2 G) H].
    """
    tokens, q_heads, size = q.shape
    k_heads = k.shape[1]
    q, k, v = (t if t.stride(2) == 1 and t.stride(1) == size else t.contiguous() for t in (q, k, v))
    out = _fake_rope(q, k, v, bias, cos, sin, inverse)
    if tokens:
        _rope_kernel[(triton.cdiv(tokens, _TOKENS), q_heads + 2 * k_heads)](
            q, k, v, q if bias is None else bias, cos, sin, out,
            tokens, q_heads, k_heads, q.stride(0), k.stride(0), v.stride(0), out.stride(0),
            HALF=size // 2, WIDE=triton.next_power_of_2(size // 2), HAS_BIAS=bias is not None,
            INVERSE=inverse, TOKENS=_TOKENS,
        )  # fmt: skip
    return out


@rope.register_fake
def _fake_rope(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool
) -> Tensor:
    return q.new_empty((q.shape[0], (q.shape[1] + 2 * k.shape[1]) * q.shape[2]))
