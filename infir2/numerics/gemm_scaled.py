"""`a @ b.T` of two block-scaled FP8 matrices, by cuBLAS, DeepGEMM or emulation.

    out    = x [T, K]      @ W [N, K].T        a 1x128, b 128x128
    grad_x = grad [T, N]   @ W.T [K, N].T      a 1x128, b 128x128
    grad_W = grad.T [N, T] @ x.T [K, T].T      a 1x128, b 128x128 (or 1x128)

Only compute capability 9.0 (Hopper) has block-scaled GEMMs. Elsewhere, emulation dequantizes and
multiplies in FP32 (products of "pow2" operands are exact even if the process allows TF32). cuBLAS
needs sizes that 16 divides, so other sizes are padded with zero codes.

A process measures the backends once per shape and uses the fastest; INFIR2_GEMM = cublas | deepgemm
| emulation overrides the choice. Under torch.use_deterministic_algorithms nothing is measured and
the first backend that supports the operands is used, so that a run repeats bit for bit."""

import os
import statistics
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from infir2.errors import ConfigError
from infir2.numerics.deep_gemm_wheel import deep_gemm
from infir2.numerics.formats import BLOCKS, GROUP, TILE_BLOCK
from infir2.numerics.kernels.custom_op import operator

BACKENDS = ("cublas", "deepgemm", "emulation")
_ALIGNMENT = 16
_TIMED_CALLS = 7
_MAX_DEVIATION = 1e-2  # of another backend's product from cuBLAS's, relative; BF16 rounds by 2e-3


@dataclass(frozen=True)
class Operand:
    """A block-scaled matrix.

    Attributes:
        codes: float8_e4m3fn [R, K].
        scale: float32 [ceil(R / block_rows), ceil(K / 128)].
        block_rows: 1 or 128.
    """

    codes: Tensor
    scale: Tensor
    block_rows: int

    @property
    def scaling(self) -> F.ScalingType:
        """torch's name of this block shape."""
        return (
            F.ScalingType.BlockWise1x128 if self.block_rows == 1 else F.ScalingType.BlockWise128x128
        )

    def padded(self) -> "Operand":
        """Sizes that 16 does not divide padded with zero codes: rows to 16, columns to 128."""
        rows, columns = self.codes.shape
        more_rows, more_columns = (
            -rows % _ALIGNMENT,
            -columns % GROUP if columns % _ALIGNMENT else 0,
        )
        if not more_rows and not more_columns:
            return self
        codes = F.pad(self.codes.view(torch.uint8), (0, more_columns, 0, more_rows)).view(
            self.codes.dtype
        )
        scale = (
            F.pad(self.scale, (0, 0, 0, more_rows), value=1.0)
            if self.block_rows == 1
            else self.scale
        )
        return Operand(codes, scale, self.block_rows)

    def values(self) -> Tensor:
        """codes * scale [R, K] in float32."""
        rows, columns = self.codes.shape
        scale = self.scale.repeat_interleave(GROUP, dim=1)[:, :columns]
        if self.block_rows != 1:
            scale = scale.repeat_interleave(self.block_rows, dim=0)[:rows]
        return self.codes.float() * scale


@cache
def missing_block_scaling(device: torch.device) -> str | None:
    """Why this device has no block-scaled FP8 GEMM, as the end of a sentence; None if it has."""
    if device.type != "cuda":
        return f"{device.type} has no FP8 hardware"
    if torch.version.hip is not None:
        return "block-scaled FP8 is used on NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, "
            "and block-scaled FP8 needs 9.0 (Hopper)"
        )
    return None


def gemm_nt(
    a_codes: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scale: Tensor,
    a_block: tuple[int, int],
    b_block: tuple[int, int],
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """`dequantize(a) @ dequantize(b).T` [M, N], summed in FP32.

    Args:
        a_codes: float8_e4m3fn [M, K].
        a_scale: its scales, in any memory layout (the kernels write the one that needs no copy).
        b_codes: float8_e4m3fn [N, K].
        b_scale: its scales.
        a_block: (1, 128) or (128, 128).
        b_block: (1, 128) or (128, 128); hardware does not support (128, 128) for both.
        out_dtype: BF16 or FP32.
        backend: one of `BACKENDS`; None for INFIR2_GEMM, or the fastest for this shape.

    Raises:
        ValueError: shapes or blocks that do not match.
        ConfigError: an unknown backend, or one that does not support these operands on this device.
    """
    if tuple(a_block) not in BLOCKS or tuple(b_block) not in BLOCKS:
        raise ValueError(f"blocks must be (1, 128) or (128, 128); got {a_block} and {b_block}")
    if a_codes.shape[1] != b_codes.shape[1]:
        raise ValueError(
            f"a {list(a_codes.shape)} and b {list(b_codes.shape)} must have the same number of "
            "columns"
        )
    chosen = backend or os.environ.get("INFIR2_GEMM") or "auto"
    return _gemm_nt(a_codes, a_scale, b_codes, b_scale, a_block[0], b_block[0], out_dtype, chosen)


@operator("infir2::gemm_nt")
def _gemm_nt(
    a_codes: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scale: Tensor,
    a_rows: int,
    b_rows: int,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    a, b = Operand(a_codes, a_scale, a_rows), Operand(b_codes, b_scale, b_rows)
    if 0 in (a_codes.shape[0], b_codes.shape[0], a_codes.shape[1]):
        return a_codes.new_zeros((a_codes.shape[0], b_codes.shape[0]), dtype=out_dtype)
    usable = candidates(a, b, out_dtype)
    if backend == "auto":
        backend = usable[0] if len(usable) == 1 else _fastest(a, b, out_dtype, usable)
    elif backend not in BACKENDS:
        raise ConfigError(
            f"INFIR2_GEMM is {backend!r}; use one of {', '.join(BACKENDS)} or unset it"
        )
    elif backend not in usable and backend != "emulation":
        reason = (
            missing_block_scaling(a_codes.device)
            or f"it does not support {a_rows}x128 by {b_rows}x128 blocks into {out_dtype}"
        )
        raise ConfigError(
            f"INFIR2_GEMM asks for the {backend} GEMM, but {reason}; "
            "use emulation or BF16 layers, or unset it"
        )
    return _RUN[backend](a, b, out_dtype)


@_gemm_nt.register_fake
def _fake_gemm_nt(
    a_codes: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scale: Tensor,
    a_rows: int,
    b_rows: int,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return a_codes.new_empty((a_codes.shape[0], b_codes.shape[0]), dtype=out_dtype)


def candidates(a: Operand, b: Operand, out_dtype: torch.dtype) -> tuple[str, ...]:
    """Backends that support these operands on their device, the safest first.

    Emulation only if there is no other.
    """
    if missing_block_scaling(a.codes.device) or a.block_rows == b.block_rows == TILE_BLOCK[0]:
        return ("emulation",)
    # DeepGEMM compiles no kernels for shapes that do not fill a tile.
    filled = a.codes.shape[0] >= 64 and b.codes.shape[0] % 64 == 0 and a.codes.shape[1] % GROUP == 0
    if (
        filled
        and a.block_rows == 1
        and (b.block_rows == 1) == (out_dtype == torch.float32)
        and deep_gemm() is not None
    ):
        return ("cublas", "deepgemm")
    return ("cublas",)


def _cublas(a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
    rows, columns = a.codes.shape[0], b.codes.shape[0]
    a, b = a.padded(), b.padded()
    out = F.scaled_mm(
        a.codes, b.codes.t(), _cublas_scale(a), a.scaling, _cublas_scale(b), b.scaling,
        output_dtype=out_dtype,
    )  # fmt: skip
    return out if out.shape == (rows, columns) else out[:rows, :columns].contiguous()


def _cublas_scale(operand: Operand) -> Tensor:
    """The scales in the memory layout that cuBLAS reads; a copy only if they have another.

    1x128: strides (1, R). 128x128: transposed, [P, R / 128] with strides (1, P), where P is K / 128
    padded to a multiple of 4.
    """
    scale = operand.scale
    if operand.block_rows == 1:
        strides = (1, scale.shape[0])
        return (
            scale
            if scale.stride() == strides
            else torch.empty_strided(scale.shape, strides, device=scale.device).copy_(scale)
        )
    blocks, num_groups = scale.shape
    wide = -(-num_groups // 4) * 4
    fits = (
        scale.storage_offset() + blocks * wide
        <= scale.untyped_storage().nbytes() // scale.element_size()
    )
    if scale.stride() == (wide, 1) and fits:
        return scale.as_strided((wide, blocks), (1, wide))
    return F.pad(scale, (0, wide - num_groups)).contiguous().t()


def _deepgemm(a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
    module = deep_gemm()
    assert module is not None
    rows, columns = a.codes.shape[0], b.codes.shape[0]
    a, b = a.padded(), b.padded()
    left, right = (
        (a.codes, a.scale),
        (b.codes, b.scale.contiguous() if b.block_rows != 1 else b.scale),
    )
    if b.block_rows == 1:  # this kernel adds to its output
        out = a.codes.new_zeros((a.codes.shape[0], b.codes.shape[0]), dtype=out_dtype)
        module.fp8_gemm_nt(left, right, out, c=out, recipe=(1, 1, GROUP), disable_ue8m0_cast=True)
    else:
        out = a.codes.new_empty((a.codes.shape[0], b.codes.shape[0]), dtype=out_dtype)
        module.fp8_gemm_nt(left, right, out, disable_ue8m0_cast=True)
    return out if out.shape == (rows, columns) else out[:rows, :columns].contiguous()


def _emulation(a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
    return (a.values() @ b.values().t()).to(out_dtype)


_RUN: dict[str, Callable[[Operand, Operand, torch.dtype], Tensor]] = {
    "cublas": _cublas,
    "deepgemm": _deepgemm,
    "emulation": _emulation,
}


_chosen: dict[Hashable, str] = {}


def _fastest(a: Operand, b: Operand, out_dtype: torch.dtype, usable: tuple[str, ...]) -> str:
    if torch.are_deterministic_algorithms_enabled():
        return usable[0]
    sizes = tuple(_rounded(size) for size in (a.codes.shape[0], b.codes.shape[0], a.codes.shape[1]))
    key = (a.codes.device, sizes, a.block_rows, b.block_rows, out_dtype, usable)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():  # timing would break the capture
            return usable[0]
        _chosen[key] = min(usable, key=lambda name: _milliseconds(name, a, b, out_dtype))
    return _chosen[key]


def _rounded(size: int) -> int:
    """`size` rounded up to four significant bits: packed batches of similar size share a choice."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def _require_agreement(name: str, a: Operand, b: Operand, out_dtype: torch.dtype) -> None:
    """Raise ValueError if a backend's product is not cuBLAS's, in about 256 rows."""
    if name == "cublas":
        return
    every = max(1, a.codes.shape[0] // 256)
    expected, product = (_RUN[each](a, b, out_dtype)[::every].double() for each in ("cublas", name))
    if not expected.isfinite().all():  # a step that is skipped tells nothing about a library
        return
    deviation = (product - expected).norm() / expected.norm().clamp_min(1e-30)
    if not deviation <= _MAX_DEVIATION:  # also NaN
        raise ValueError(f"its product deviates from cuBLAS's by {deviation:.1e}")


def _milliseconds(name: str, a: Operand, b: Operand, out_dtype: torch.dtype) -> float:
    """Median time of one product; infinite, with a warning, if the backend fails."""
    times = []
    try:
        for _ in range(_TIMED_CALLS + 2):  # two to compile and to warm up
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            _RUN[name](a, b, out_dtype)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        _require_agreement(name, a, b, out_dtype)
    except Exception as error:  # no compiler, or no support for the shape: use the other backend
        warnings.warn(
            f"the {name} GEMM failed on {[*a.codes.shape]} x {[*b.codes.shape]} "
            f"and is not used: {error}",
            stacklevel=2,
        )
        return float("inf")
    return statistics.median(times[2:])
