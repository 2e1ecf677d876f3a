# ruff: noqa: N803 (constants of a kernel are upper case)
# mypy: disable-error-code="no-untyped-def"
"""Device functions of the FP8 conversions, with the bits of `infir2.numerics.quantize_reference`.

Magnitudes are compared as integers: the bits of |x| have the order of |x|, and Inf and NaN are
large values, whereas float maxima drop NaNs. Codes are uint8, so that layouts and selects need not
support the FP8 type.

Under the interpreter (TRITON_INTERPRET=1) casts to FP8 round wrongly, casts to BF16 truncate, casts
from BF16 lose subnormals (Triton 3.6 to 3.9), and `fma` rounds twice; there `INTERPRET` selects
integer arithmetic and plain division. Both variants compute the same bits.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
GROUP = tl.constexpr(128)
INF_BITS = tl.constexpr(0x7F800000)
E4M3_MAX_BITS = tl.constexpr(0x43E00000)  # 448.0
E4M3_MIN_NORMAL_BITS = tl.constexpr(0x3C800000)  # 2**-6


@triton.jit
def magnitude_bits(x):
    """Bits of |x| as int32; x float32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def to_float32(x):
    """x (BF16, FP16 or FP32) in float32, exactly."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to_bf16(x):
    """x rounded to the nearest BF16 value (ties to even), kept in float32."""
    if INTERPRET:
        bits = magnitude_bits(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        # Inf and NaN keep their bits: the carry could turn one into a finite number.
        magnitude = tl.where(bits >= INF_BITS, bits, rounded)
        return (magnitude | (x.to(tl.int32, bitcast=True) & -2147483648)).to(
            tl.float32, bitcast=True
        )
    else:
        return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def block_scale(amax_bits, POW2: tl.constexpr):
    """Scales of blocks from the bits of their largest magnitude (int32).

    The scale is 1 for zero and NaN for Inf or NaN.
    """
    if POW2:
        # ceil(log2(amax / 448)) without the division: 448 = 1.75 * 2**8, so the exponent of amax
        # falls by 8 and rises by one where the mantissa exceeds 1.75. The rounding of amax / 448
        # never crosses that boundary.
        scale_bits = tl.maximum(((amax_bits + 0x1FFFFF) >> 23) - 8, 1) << 23
    else:
        quotient_bits = tl.div_rn(amax_bits.to(tl.float32, bitcast=True), 448.0).to(
            tl.int32, bitcast=True
        )
        scale_bits = tl.maximum(quotient_bits, 1)
    scale_bits = tl.where(amax_bits == 0, 0x3F800000, scale_bits)
    scale_bits = tl.where(amax_bits >= INF_BITS, 0x7FC00000, scale_bits)
    return scale_bits.to(tl.float32, bitcast=True)


@triton.jit
def reciprocal_of_power(scale):
    """Exact 1 / scale for scale = 2**e with e in [-126, 127]; NaN stays NaN."""
    inverse = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(scale == scale, inverse, scale)


@triton.jit
def quotient(x, scale):
    """x / scale rounded as IEEE division rounds it; scale broadcasts against x, both float32."""
    if INTERPRET:
        return tl.div_rn(x, scale)
    else:
        # One division per block instead of one per value: with r = RN(1 / s), a first correction
        # makes the quotient faithful and a second one rounds it correctly (Markstein). Tiny scales
        # are multiplied by 2**96, which is exact, so that 1 / s does not overflow and no remainder
        # becomes subnormal.
        lift = tl.where(scale < 5.421010862427522e-20, 7.922816251426434e28, 1.0)
        divisor = scale * lift
        inverse = tl.broadcast_to(tl.div_rn(1.0, divisor), x.shape)
        divisor = tl.broadcast_to(divisor, x.shape)
        dividend = x * lift
        q = dividend * inverse
        q = tl.fma(tl.fma(-q, divisor, dividend), inverse, q)
        q = tl.fma(tl.fma(-q, divisor, dividend), inverse, q)
        return tl.where((x == 0.0) & (scale == scale), x, q)  # the corrections lose the sign of -0


@triton.jit
def encode(x, scale, POW2: tl.constexpr):
    """E4M3 bytes (uint8) of x / scale, nearest even, saturating; 0x7F where scale is NaN.

    scale broadcasts against x.
    """
    if POW2:
        scaled = x * reciprocal_of_power(scale)
    else:
        scaled = quotient(x, scale)
    return cast_to_e4m3(scaled)


@triton.jit
def cast_to_e4m3(x):
    """E4M3 bytes (uint8) of x, nearest even, saturating; 0x7F for NaN."""
    if INTERPRET:
        return _encode_by_bits(x)
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # cvt.rn.satfinite


@triton.jit
def _encode_by_bits(x):
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, E4M3_MAX_BITS)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960  # exponent bias 127 -> 7
    # Adding 1.5 * 2**23 rounds to a multiple of 2**-9, the spacing of the subnormals.
    subnormal = (magnitude.to(tl.float32, bitcast=True) * 512.0 + 12582912.0) - 12582912.0
    code = tl.where(magnitude < E4M3_MIN_NORMAL_BITS, subnormal.to(tl.int32), normal)
    code = tl.where((bits & 0x7FFFFFFF) > INF_BITS, 0x7F, code | ((bits >> 24) & 0x80))
    return code.to(tl.uint8)


@triton.jit
def decode(codes):
    """float32 values of E4M3 bytes (uint8); undefined for NaN bytes, whose scale is NaN anyway."""
    return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def rescale_tile(codes, row_scale):
    """(codes, scale) of a 128x128 tile from 1x128 "pow2" codes [128, 128] (uint8) and scales [128].

    The tile's scale is the largest one of its rows whose codes are not all zero, 1 if there is no
    such row, and NaN if one of them is NaN.
    """
    occupied = tl.max((codes & 0x7F).to(tl.int32), axis=1) != 0
    # As bits, NaN is the largest scale.
    tile_bits = tl.max(tl.where(occupied, magnitude_bits(row_scale), 0), axis=0)
    tile_bits = tl.where(tile_bits == 0, 0x3F800000, tile_bits)
    tile_scale = tile_bits.to(tl.float32, bitcast=True)
    ratio = tl.where(occupied, row_scale, 0.0) * reciprocal_of_power(tile_scale)
    return cast_to_e4m3(decode(codes) * ratio[:, None]), tile_scale
