# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""AdamW over many parameters in one launch; moments are FP32, BF16 or 1x128 FP8 codes.

`infir2.numerics.adamw_reference` is the reference. The kernel reads a table with the addresses of
every parameter's tensors, so that a model of hundreds of parameters needs one launch, and it clips
the gradients without a separate pass. It moves 28 bytes per value with FP32 moments and gradients.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.adamw_reference import Hyper, Moments
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

_ROWS = 8  # groups of 128 values in a tile
_CHUNK = 64  # tiles per program
# A table row: addresses of p, gradient, m, scales of m, v, scales of v; number of values.
_FIELDS = tl.constexpr(7)
Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.uint8: tl.uint8}


@triton.jit
def _noise(index, step):
    """20 pseudorandom bits of a position and a step, the same on every machine."""
    x = index.to(tl.uint32) * 0x9E3779B1 + step.to(tl.uint32) * 0x85EBCA77
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return ((x ^ (x >> 16)) & 0xFFFFF).to(tl.int32)


@triton.jit
def _encode(x, scale, noise):
    """E4M3 bytes of x / scale, rounded stochastically by `noise`; scale is a power of two."""
    scaled = x * reciprocal_of_power(scale)
    bits = magnitude_bits(scaled)
    normal = ((bits + noise) & -1048576).to(tl.float32, bitcast=True)
    steps = bits.to(tl.float32, bitcast=True) * 512.0 + noise.to(tl.float32) * 9.5367431640625e-07
    magnitude = tl.where(bits < 0x3C800000, tl.floor(steps) * 0.001953125, normal)
    return cast_to_e4m3(tl.where(scaled < 0, -magnitude, magnitude))


@triton.jit
def _at(table_ptr, field: tl.constexpr, index, TYPE: tl.constexpr, EVEN: tl.constexpr):
    """Addresses [R, 128] of a field's values."""
    address = tl.load(table_ptr + field).to(tl.pointer_type(TYPE)) + index
    return tl.multiple_of(address, [16, 16]) if EVEN else address


# Specialized, the first step's 1 would become a constant without a type.
@triton.jit(do_not_specialize=["step"])
def _adamw_kernel(
    tables_ptr, chunks_ptr, clip_ptr,
    step, lr, beta1, beta2, eps, decay, correction1, correction2,
    GRADIENT: tl.constexpr, MOMENT: tl.constexpr, FP8: tl.constexpr, ROUND: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    table_ptr = tables_ptr + tl.load(chunks_ptr + pid * 2) * _FIELDS
    first = tl.load(chunks_ptr + pid * 2 + 1) * (ROWS * CHUNK)
    size = tl.load(table_ptr + 6)
    if EVEN:
        size = tl.multiple_of(size, 16)
    clip = tl.load(clip_ptr)
    for tile in range(tl.minimum(tl.cdiv(size - first * GROUP, ROWS * GROUP), CHUNK).to(tl.int32)):
        row = first + tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        index = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = index < size
        p_at = _at(table_ptr, 0, index, tl.float32, EVEN)
        m_at, v_at = _at(table_ptr, 2, index, MOMENT, EVEN), _at(table_ptr, 4, index, MOMENT, EVEN)
        p = tl.load(p_at, mask=inside, other=0)
        g = (
            to_float32(tl.load(_at(table_ptr, 1, index, GRADIENT, EVEN), mask=inside, other=0))
            * clip
        )
        m, v = tl.load(m_at, mask=inside, other=0), tl.load(v_at, mask=inside, other=0)
        if FP8:
            m_scale_at = tl.load(table_ptr + 3).to(tl.pointer_type(tl.float32)) + row
            v_scale_at = tl.load(table_ptr + 5).to(tl.pointer_type(tl.float32)) + row
            m = decode(m) * tl.load(m_scale_at, mask=row * GROUP < size, other=1.0)[:, None]
            root = decode(v) * tl.load(v_scale_at, mask=row * GROUP < size, other=1.0)[:, None]
            v = root * root
        m = to_float32(m) * beta1 + g * (1 - beta1)
        v = to_float32(v) * beta2 + g * g * (1 - beta2)
        p = p * (1 - lr * decay) - lr * (m / correction1) / (tl.sqrt_rn(v / correction2) + eps)
        tl.store(p_at, p, mask=inside)
        if FP8:
            noise = _noise(index, step)
            m_scale = block_scale(tl.max(magnitude_bits(m), axis=1), True)
            root = tl.sqrt_rn(v)
            v_scale = block_scale(tl.max(magnitude_bits(root), axis=1), True)
            tl.store(m_at, _encode(m, m_scale[:, None], noise), mask=inside)
            tl.store(v_at, _encode(root, v_scale[:, None], noise), mask=inside)
            tl.store(m_scale_at, m_scale, mask=row * GROUP < size)
            tl.store(v_scale_at, v_scale, mask=row * GROUP < size)
        else:
            tl.store(m_at, (round_to_bf16(m) if ROUND else m).to(MOMENT), mask=inside)
            tl.store(v_at, (round_to_bf16(v) if ROUND else v).to(MOMENT), mask=inside)


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[Moments],
    hyper: Hyper,
    clip: Tensor,
) -> None:
    """See `adamw.adamw_`; all tensors are contiguous, with the same dtypes for every parameter."""
    tensors: list[Tensors] = [
        (p, g, state.m, state.m_scale, state.v, state.v_scale)
        for p, g, state in zip(parameters, gradients, moments, strict=True)
    ]
    betas = (hyper.beta1, hyper.beta2)
    numbers = (hyper.step, hyper.lr, *betas, hyper.eps, hyper.decay, *hyper.corrections)
    rows = [
        [0 if t is None else t.data_ptr() for t in parts] + [parts[0].numel()]
        for parts in tensors
        if parts[0].numel()
    ]
    # Wide loads need addresses and sizes that 16 divides; other parameters get a second launch.
    aligned = [row for row in rows if all(number % 16 == 0 for number in row)]
    unaligned = [row for row in rows if any(number % 16 for number in row)]
    for selected in (aligned, unaligned):
        if selected:
            _launch(selected, tensors[0], clip, numbers, selected is aligned)


def _launch(
    rows: list[list[int]], like: Tensors, clip: Tensor, numbers: tuple[float, ...], even: bool
) -> None:
    device, (_, gradient, moment, scale, *_) = clip.device, like
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(
        device, non_blocking=True
    )
    chunks = _chunks(tuple(row[-1] for row in rows), device)
    _adamw_kernel[(len(chunks),)](
        table, chunks, clip, *numbers, GRADIENT=_TYPES[gradient.dtype],
        MOMENT=_TYPES[moment.dtype], FP8=scale is not None, ROUND=moment.dtype == torch.bfloat16,
        EVEN=even, ROWS=_ROWS, CHUNK=_CHUNK, num_warps=4,
    )  # fmt: skip


@lru_cache(maxsize=8)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Parameter index and chunk index of each program, int32 [programs, 2]."""
    counts = torch.tensor([triton.cdiv(size, _ROWS * GROUP.value * _CHUNK) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    return torch.stack(
        [owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]], dim=1
    ).to(device, torch.int32)
