# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""RMSNorm, plain in BF16 or fused with the quantizer after it, and its backward.

`infir2.numerics.rms_norm` is the reference; it sums in FP64, these kernels in FP32:

    rstd    = 1 / sqrt(mean(x ** 2) + eps)          FP32
    y       = bf16(x * rstd * bf16(weight))         rounded once
    codes   = quantize(y)
    dx      = bf16(rstd * (dy * w - x * rstd * mean(dy * w * x * rstd)))
    dweight = sum over tokens of dy * x * rstd

Bytes per value: forward 3 (quantized) or 4 (BF16), transposed codes from x 3, backward 6.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.kernels.buffers import (
    as_bytes,
    empty_codes,
    empty_row_scales,
    empty_tile_scales,
    groups,
    rows_contiguous,
)
from infir2.numerics.kernels.codec import (
    GROUP,
    block_scale,
    encode,
    magnitude_bits,
    round_to_bf16,
    to_float32,
)
from infir2.numerics.kernels.custom_op import operator
from infir2.numerics.kernels.tiles import (
    load_values,
    quantize_rows_of,
    tile_of_program,
    write_second_layout,
)

# Values of a program's tile, and its warps; tuned by bench/kernels.py on an H100.
FORWARD_CONFIG = {"values": 2048, "num_warps": 4}
BACKWARD_CONFIG = {"values": 4096, "num_warps": 8, "programs_per_processor": 8}
TRANSPOSED_CONFIG = {"num_warps": 8, "maxnreg": 80}
_INTERPRETED_PROGRAMS = 3


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, codes_ptr, scale_ptr, rstd_ptr, rows, columns, x_stride, eps,
    POW2: tl.constexpr, QUANTIZE: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    group = tl.arange(0, G)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None, :, :]
    x = to_float32(
        tl.load(
            x_ptr + row.to(tl.int64)[:, None, None] * x_stride + column[None, :, :],
            mask=inside,
            other=0,
        )
    )
    weight = round_to_bf16(to_float32(tl.load(weight_ptr + column, mask=column < columns, other=0)))
    mean = tl.sum(tl.sum(x * x, axis=2), axis=1) / columns
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = round_to_bf16(x * rstd[:, None, None] * weight[None, :, :])
    at = row.to(tl.int64)[:, None, None] * columns + column[None, :, :]
    if QUANTIZE:
        scale = block_scale(tl.max(magnitude_bits(y), axis=2), POW2)
        tl.store(codes_ptr + at, encode(y, scale[:, :, None], POW2), mask=inside)
        scale_at = scale_ptr + group.to(tl.int64)[None, :] * rows + row[:, None]
        tl.store(scale_at, scale, mask=(row < rows)[:, None] & (group * GROUP < columns)[None, :])
    else:
        tl.store(codes_ptr + at, y.to(codes_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _transposed_kernel(
    x_ptr,
    rstd_ptr,
    weight_ptr,
    codes_t_ptr,
    scale_t_ptr,
    rows,
    columns,
    x_stride,
    scale_t_stride,
    POW2: tl.constexpr,
):
    first_row, group = tile_of_program(rows, columns, 128)
    x = load_values(x_ptr, first_row, group, rows, columns, x_stride, 128)
    row = first_row + tl.arange(0, 128)
    column = group * GROUP + tl.arange(0, GROUP)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0)
    weight = round_to_bf16(to_float32(tl.load(weight_ptr + column, mask=column < columns, other=0)))
    y = round_to_bf16(x * rstd[:, None] * weight[None, :])
    codes, scale = quantize_rows_of(y, POW2)
    write_second_layout(
        y,
        codes,
        scale,
        codes_t_ptr,
        scale_t_ptr,
        first_row,
        group,
        rows,
        columns,
        scale_t_stride,
        POW2,
    )


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, rstd_ptr, weight_ptr, residual_ptr, grad_x_ptr, partial_ptr,
    rows, columns, grad_stride, x_stride, residual_stride, rows_per_program,
    HAS_RESIDUAL: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    column = tl.arange(0, C)
    weight = round_to_bf16(to_float32(tl.load(weight_ptr + column, mask=column < columns, other=0)))
    grad_weight = tl.zeros((C,), dtype=tl.float32)
    end = tl.minimum((pid + 1) * rows_per_program, rows)
    for first in range(pid * rows_per_program, end, R):
        row = first + tl.arange(0, R)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        wide = row.to(tl.int64)[:, None]
        x = to_float32(tl.load(x_ptr + wide * x_stride + column[None, :], mask=inside, other=0))
        grad = to_float32(
            tl.load(grad_ptr + wide * grad_stride + column[None, :], mask=inside, other=0)
        )
        rstd = tl.load(rstd_ptr + row, mask=row < end, other=0)[:, None]
        normed = x * rstd
        scaled = grad * weight[None, :]
        mean = tl.sum(scaled * normed, axis=1) / columns
        grad_weight += tl.sum(grad * normed, axis=0)
        grad_x = round_to_bf16((scaled - normed * mean[:, None]) * rstd)
        if HAS_RESIDUAL:
            residual = tl.load(
                residual_ptr + wide * residual_stride + column[None, :], mask=inside, other=0
            )
            grad_x = round_to_bf16(grad_x + to_float32(residual))
        tl.store(
            grad_x_ptr + wide * columns + column[None, :],
            grad_x.to(grad_x_ptr.dtype.element_ty),
            mask=inside,
        )
    tl.store(partial_ptr + pid.to(tl.int64) * columns + column, grad_weight, mask=column < columns)


def _forward_shape(columns: int) -> tuple[int, int]:
    """(rows, groups of 128) of one program's tile; both powers of two."""
    wide = triton.next_power_of_2(groups(columns))
    return max(1, FORWARD_CONFIG["values"] // (wide * GROUP.value)), wide


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    scale: Tensor,
    rstd: Tensor,
    pow2: bool,
    quantize: bool,
) -> None:
    rows, columns = x.shape
    if not rows:
        return
    # Without fused multiply-adds the quantized and the BF16 variant of the kernel have equal bits.
    tile_rows, wide = _forward_shape(columns)
    _forward_kernel[(triton.cdiv(rows, tile_rows),)](
        x, weight, out, scale, rstd, rows, columns, x.stride(0), eps,
        POW2=pow2, QUANTIZE=quantize, R=tile_rows, G=wide,
        num_warps=FORWARD_CONFIG["num_warps"], enable_fp_fusion=False,
    )  # fmt: skip


@operator("infir2::rms_norm_quantize")
def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """1x128 blocks of the normalized x [T, D] BF16.

    Returns codes [T, D], scale [T, ceil(D / 128)] and rstd [T] float32.
    """
    x = rows_contiguous(x)
    codes, scale, rstd = _fake_rms_norm_quantize(x, weight, eps, pow2)
    _launch_forward(x, weight, eps, as_bytes(codes), scale, rstd, pow2, True)
    return codes, scale, rstd


@rms_norm_quantize.register_fake
def _fake_rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    return empty_codes(x, rows, columns), empty_row_scales(x, rows, groups(columns)), rstd


@operator("infir2::rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalized x [T, D] in BF16 and rstd [T] float32."""
    x = rows_contiguous(x)
    y, rstd = _fake_rms_norm(x, weight, eps)
    _launch_forward(x, weight, eps, y, rstd, rstd, True, False)
    return y, rstd


@rms_norm.register_fake
def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    return y, torch.empty((rows,), dtype=torch.float32, device=x.device)


@operator("infir2::rms_norm_transposed")
def rms_norm_transposed(
    x: Tensor, rstd: Tensor, weight: Tensor, pow2: bool
) -> tuple[Tensor, Tensor]:
    """128x128 blocks of the transposed normalized x, recomputed from x [T, D] and rstd [T].

    Returns (codes_t [D, T], scale_t) with the bytes of `transpose` ("pow2") or of
    `quantize(y.T, (128, 128))` ("fp32"). So a linear after a norm does not save its input for the
    weight gradient: the norm's backward saves x anyway.
    """
    rows, columns = x.shape
    x = rows_contiguous(x)
    codes_t, scale_t = _fake_rms_norm_transposed(x, rstd, weight, pow2)
    if rows:
        grid = (groups(rows) * groups(columns),)
        _transposed_kernel[grid](
            x,
            rstd,
            weight,
            as_bytes(codes_t),
            scale_t,
            rows,
            columns,
            x.stride(0),
            scale_t.stride(0),
            POW2=pow2,
            **TRANSPOSED_CONFIG,
        )
    return codes_t, scale_t


@rms_norm_transposed.register_fake
def _fake_rms_norm_transposed(
    x: Tensor, rstd: Tensor, weight: Tensor, pow2: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return empty_codes(x, columns, rows), empty_tile_scales(x, columns, rows)


@operator("infir2::rms_norm_backward")
def rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(grad_x [T, D] BF16, grad_weight [D] float32) for grad and x [T, D] BF16.

    `residual` [T, D] BF16, another gradient of x, is added to grad_x as autograd would add it. Runs
    on the same GPU model have equal bits.
    """
    rows, columns = x.shape
    grad, x = rows_contiguous(grad), rows_contiguous(x)
    residual = None if residual is None else rows_contiguous(residual)
    grad_x, grad_weight = _fake_rms_norm_backward(grad, x, rstd, weight, residual)
    if not rows:
        return grad_x, grad_weight.zero_()
    wide = triton.next_power_of_2(columns)
    tile_rows = max(1, BACKWARD_CONFIG["values"] // wide)
    programs = min(triton.cdiv(rows, tile_rows), _resident_programs(x.device))
    rows_per_program = triton.cdiv(triton.cdiv(rows, tile_rows), programs) * tile_rows
    programs = triton.cdiv(rows, rows_per_program)
    partial = torch.empty((programs, columns), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        grad, x, rstd, weight, grad if residual is None else residual, grad_x, partial,
        rows, columns, grad.stride(0), x.stride(0), 0 if residual is None else residual.stride(0),
        rows_per_program, HAS_RESIDUAL=residual is not None, R=tile_rows, C=wide,
        num_warps=BACKWARD_CONFIG["num_warps"],
    )  # fmt: skip
    return grad_x, torch.sum(partial, dim=0, out=grad_weight)


@rms_norm_backward.register_fake
def _fake_rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    grad_x = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    return grad_x, torch.empty((columns,), dtype=torch.float32, device=x.device)


def _resident_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        * BACKWARD_CONFIG["programs_per_processor"]
    )
