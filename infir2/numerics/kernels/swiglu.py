# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""SwiGLU and its backward, plain in BF16 or fused with the quantizers after them.

`infir2.numerics.swiglu` is the reference; its forward is FP64, these kernels are FP32:

    y     = bf16(silu(gate) * up),  codes = quantize(y)
    dgate = bf16(dy * up * (silu(gate) + sigmoid(gate) * (1 - silu(gate))))
    dup   = bf16(dy * silu(gate))

The backward returns the gradient of the fused projection, [T, 2F] = [dgate | dup], quantized like
every output gradient: 1x128 along the features and 1x128 along the tokens. The block grid restarts
at `up`. gate and up may be the two halves of one [T, 2F] matrix. Bytes per value of y: forward 5
(quantized) or 6 (BF16), transposed codes from gate and up 5, backward 10 (both variants).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.numerics.kernels.bf16_pairs import high, load_pairs, low, pack, write_pairs
from infir2.numerics.kernels.buffers import (
    as_bytes,
    empty_codes,
    empty_row_scales,
    empty_tile_scales,
    groups,
    rows_contiguous,
)
from infir2.numerics.kernels.codec import GROUP, INTERPRET, round_to_bf16
from infir2.numerics.kernels.custom_op import operator
from infir2.numerics.kernels.quantizers import ROWS_CONFIG
from infir2.numerics.kernels.tiles import (
    load_values,
    quantize_rows_of,
    store_tile,
    tile_of_program,
    write_rows,
    write_second_layout,
)

# Tuned by bench/kernels.py on an H100.
BACKWARD_CONFIG = {"BLOCK_ROWS": 16, "num_warps": 4}
BACKWARD_QUANTIZE_CONFIG = {"num_warps": 8, "maxnreg": 128}
TRANSPOSED_CONFIG = {"num_warps": 8, "maxnreg": 80}


@triton.jit
def _sigmoid(x):
    if INTERPRET:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        # Two instructions with errors of one or two units in the last place. Unlike `exp` and `/`
        # they flush subnormals, which have no bit in the BF16 results. Not pure: keeping the
        # sigmoids in registers costs more than computing them again.
        return tl.inline_asm_elementwise(
            "{.reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"
            " add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t;}",
            "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _product(gate, up):
    """bf16(silu(gate) * up) in float32."""
    return round_to_bf16(gate * _sigmoid(gate) * up)


@triton.jit
def _gate_gradient(grad, gate, up):
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return grad * up * (silu + sigmoid * (1.0 - silu))


@triton.jit
def _up_gradient(grad, gate):
    return grad * (gate * _sigmoid(gate))


@triton.jit
def _load_pair(
    gate_ptr, up_ptr, first_row, group, rows, columns, gate_stride, up_stride, R: tl.constexpr
):
    gate = load_values(gate_ptr, first_row, group, rows, columns, gate_stride, R)
    return gate, load_values(up_ptr, first_row, group, rows, columns, up_stride, R)


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, codes_ptr, scale_ptr, rows, columns, gate_stride, up_stride,
    POW2: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    first_row, group = tile_of_program(rows, columns, BLOCK_ROWS)
    gate, up = _load_pair(
        gate_ptr, up_ptr, first_row, group, rows, columns, gate_stride, up_stride, BLOCK_ROWS
    )
    y = _product(gate, up)
    if QUANTIZE:
        write_rows(
            y, codes_ptr, scale_ptr, first_row, group, rows, columns, columns, POW2, BLOCK_ROWS
        )
    else:
        tile = y.to(codes_ptr.dtype.element_ty)
        store_tile(
            codes_ptr, tile, first_row, group * GROUP, rows, columns, columns, BLOCK_ROWS, GROUP
        )


@triton.jit
def _transposed_kernel(
    gate_ptr,
    up_ptr,
    codes_t_ptr,
    scale_t_ptr,
    rows,
    columns,
    gate_stride,
    up_stride,
    scale_t_stride,
    POW2: tl.constexpr,
):
    first_row, group = tile_of_program(rows, columns, 128)
    gate, up = _load_pair(
        gate_ptr, up_ptr, first_row, group, rows, columns, gate_stride, up_stride, 128
    )
    y = _product(gate, up)
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
def _backward_quantize_kernel(
    grad_ptr, gate_ptr, up_ptr, codes_ptr, scale_ptr, codes_t_ptr, scale_t_ptr,
    rows, columns, grad_stride, gate_stride, up_stride, POW2: tl.constexpr,
):  # fmt: skip
    # Two programs with adjacent ids per tile, one for each half: the L2 cache serves the second
    # read of grad and gate, and a program needs registers for one gradient tile instead of two.
    half = tl.program_id(0) % 2
    tile = tl.program_id(0) // 2
    num_groups = columns // GROUP
    first_row, group = tile // num_groups * 128, tile % num_groups
    gate = load_pairs(gate_ptr, first_row, group, rows, gate_stride)
    grad = load_pairs(grad_ptr, first_row, group, rows, grad_stride)
    if half == 0:
        up = load_pairs(up_ptr, first_row, group, rows, up_stride)
        values = pack(
            _gate_gradient(low(grad), low(gate), low(up)),
            _gate_gradient(high(grad), high(gate), high(up)),
        )
    else:
        values = pack(_up_gradient(low(grad), low(gate)), _up_gradient(high(grad), high(gate)))
    # [T, 2F] and [2F, T]: the half of `up` starts at column F, at row F, at scale group F / 128.
    codes_ptr += half * columns
    scale_ptr += half * num_groups * rows
    codes_t_ptr += (half * columns).to(tl.int64) * rows
    scale_t_ptr += half * columns
    write_pairs(
        values,
        codes_ptr,
        scale_ptr,
        codes_t_ptr,
        scale_t_ptr,
        first_row,
        group,
        rows,
        columns * 2,
        columns * 2,
        POW2,
    )


@triton.jit
def _backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    out_ptr,
    rows,
    columns,
    grad_stride,
    gate_stride,
    up_stride,
    BLOCK_ROWS: tl.constexpr,
):
    first_row, group = tile_of_program(rows, columns, BLOCK_ROWS)
    grad = load_values(grad_ptr, first_row, group, rows, columns, grad_stride, BLOCK_ROWS)
    gate, up = _load_pair(
        gate_ptr, up_ptr, first_row, group, rows, columns, gate_stride, up_stride, BLOCK_ROWS
    )
    grad_gate = round_to_bf16(_gate_gradient(grad, gate, up)).to(out_ptr.dtype.element_ty)
    grad_up = round_to_bf16(_up_gradient(grad, gate)).to(out_ptr.dtype.element_ty)
    first_column = group * GROUP
    store_tile(
        out_ptr, grad_gate, first_row, first_column, rows, columns, columns * 2, BLOCK_ROWS, GROUP
    )
    store_tile(
        out_ptr + columns,
        grad_up,
        first_row,
        first_column,
        rows,
        columns,
        columns * 2,
        BLOCK_ROWS,
        GROUP,
    )


def _launch_forward(
    gate: Tensor, up: Tensor, out: Tensor, scale: Tensor, pow2: bool, quantize: bool
) -> None:
    rows, columns = gate.shape
    if not rows:
        return
    gate, up = rows_contiguous(gate), rows_contiguous(up)
    grid = (triton.cdiv(rows, ROWS_CONFIG["BLOCK_ROWS"]) * groups(columns),)
    _forward_kernel[grid](
        gate,
        up,
        out,
        scale,
        rows,
        columns,
        gate.stride(0),
        up.stride(0),
        POW2=pow2,
        QUANTIZE=quantize,
        **ROWS_CONFIG,
    )


@operator("infir2::swiglu_quantize")
def swiglu_quantize(gate: Tensor, up: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """1x128 blocks of silu(gate) * up, [T, F] BF16: (codes [T, F], scale [T, ceil(F / 128)])."""
    codes, scale = _fake_swiglu_quantize(gate, up, pow2)
    _launch_forward(gate, up, as_bytes(codes), scale, pow2, True)
    return codes, scale


@swiglu_quantize.register_fake
def _fake_swiglu_quantize(gate: Tensor, up: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    rows, columns = gate.shape
    return empty_codes(gate, rows, columns), empty_row_scales(gate, rows, groups(columns))


@operator("infir2::swiglu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up [T, F] in BF16."""
    out = _fake_swiglu(gate, up)
    _launch_forward(gate, up, out, out, True, False)
    return out


@swiglu.register_fake
def _fake_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(tuple(gate.shape), dtype=gate.dtype, device=gate.device)


@operator("infir2::swiglu_transposed")
def swiglu_transposed(gate: Tensor, up: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """128x128 blocks of the transposed product, recomputed from gate and up [T, F].

    Returns (codes_t [F, T], scale_t) with the bytes of `transpose` ("pow2") or of
    `quantize(y.T, (128, 128))` ("fp32").
    """
    rows, columns = gate.shape
    codes_t, scale_t = _fake_swiglu_transposed(gate, up, pow2)
    if rows:
        gate, up = rows_contiguous(gate), rows_contiguous(up)
        grid = (groups(rows) * groups(columns),)
        strides = (gate.stride(0), up.stride(0), scale_t.stride(0))
        _transposed_kernel[grid](
            gate,
            up,
            as_bytes(codes_t),
            scale_t,
            rows,
            columns,
            *strides,
            POW2=pow2,
            **TRANSPOSED_CONFIG,
        )
    return codes_t, scale_t


@swiglu_transposed.register_fake
def _fake_swiglu_transposed(gate: Tensor, up: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    rows, columns = gate.shape
    return empty_codes(gate, columns, rows), empty_tile_scales(gate, columns, rows)


@operator("infir2::swiglu_backward_quantize")
def swiglu_backward_quantize(
    grad: Tensor, gate: Tensor, up: Tensor, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantized gradient g = [dgate | dup] and g.T, for grad, gate, up [T, F] BF16, F % 128 == 0.

    Returns:
        codes [T, 2F], scale [T, 2F / 128], codes_t [2F, T], scale_t [2F, ceil(T / 128)].
    """
    rows, columns = grad.shape
    assert columns % GROUP.value == 0, "the block grid of `up` starts at a multiple of 128"
    codes, scale, codes_t, scale_t = _fake_swiglu_backward_quantize(grad, gate, up, pow2)
    if rows:
        grad, gate, up = rows_contiguous(grad), rows_contiguous(gate), rows_contiguous(up)
        strides = (grad.stride(0), gate.stride(0), up.stride(0))
        outputs = (as_bytes(codes), scale, as_bytes(codes_t), scale_t)
        _backward_quantize_kernel[(2 * groups(rows) * groups(columns),)](
            grad, gate, up, *outputs, rows, columns, *strides, POW2=pow2, **BACKWARD_QUANTIZE_CONFIG
        )
    return codes, scale, codes_t, scale_t


@swiglu_backward_quantize.register_fake
def _fake_swiglu_backward_quantize(
    grad: Tensor, gate: Tensor, up: Tensor, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = grad.shape
    return (
        empty_codes(grad, rows, 2 * columns),
        empty_row_scales(grad, rows, 2 * groups(columns)),
        empty_codes(grad, 2 * columns, rows),
        empty_row_scales(grad, 2 * columns, groups(rows)),
    )


@operator("infir2::swiglu_backward")
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Gradient [dgate | dup] [T, 2F] in BF16 for grad, gate, up [T, F]."""
    rows, columns = grad.shape
    out = _fake_swiglu_backward(grad, gate, up)
    if rows:
        grad, gate, up = rows_contiguous(grad), rows_contiguous(gate), rows_contiguous(up)
        grid = (triton.cdiv(rows, BACKWARD_CONFIG["BLOCK_ROWS"]) * groups(columns),)
        strides = (grad.stride(0), gate.stride(0), up.stride(0))
        _backward_kernel[grid](grad, gate, up, out, rows, columns, *strides, **BACKWARD_CONFIG)
    return out


@swiglu_backward.register_fake
def _fake_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    rows, columns = grad.shape
    return torch.empty((rows, 2 * columns), dtype=grad.dtype, device=grad.device)
