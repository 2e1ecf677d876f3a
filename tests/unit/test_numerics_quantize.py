"""The bits of the reference: scales, codes, special values, transposition."""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infir2.numerics import (
    dequantize,
    nonfinite_blocks,
    quantize,
    quantize_reference,
    relative_error,
    transpose,
)
from infir2.numerics.formats import E4M3, Fp8Tensor, WeightRows
from infir2.numerics.quantize import encode_weights, largest_magnitudes
from infir2.numerics.quantize_reference import decode

BLOCKS = [(1, 128), (128, 128)]
FORMATS = ["pow2", "fp32"]
NORMALS = {
    (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
}
E4M3_VALUES = sorted(NORMALS | {m * 2.0**-9 for m in range(8)})


def codes_of(t: Fp8Tensor) -> torch.Tensor:
    return t.codes.view(torch.uint8)


def same_bytes(a: Fp8Tensor, b: Fp8Tensor) -> bool:
    return torch.equal(codes_of(a), codes_of(b)) and torch.equal(
        a.scale.view(torch.int32), b.scale.view(torch.int32)
    )


def nearest_even(y: float) -> float:
    """The nearest E4M3 value by exhaustive search; a tie goes to the even mantissa, every second
    one of the sorted values.
    """
    magnitude = min(abs(y), 448.0)
    distance = min(abs(v - magnitude) for v in E4M3_VALUES)
    best = [i for i, v in enumerate(E4M3_VALUES) if abs(v - magnitude) == distance]
    return math.copysign(E4M3_VALUES[next((i for i in best if i % 2 == 0), best[0])], y)


def expected_scale(amax: float, scale_format: str) -> float:
    """The recipe's rule in Python: FP32 division, then the exponent rounded up."""
    if amax == 0:
        return 1.0
    s = float(
        (torch.tensor(amax, dtype=torch.float64) / 448).float()
    )  # FP64 then FP32 is the correctly rounded quotient
    if scale_format == "fp32":
        return max(s, 2.0**-149)
    if s == 0:
        return 2.0**-126
    mantissa, exponent = math.frexp(s)
    return 2.0 ** max(-126, min(127, exponent - 1 if mantissa == 0.5 else exponent))


def test_codes_round_to_nearest_even_by_exhaustive_search() -> None:
    midpoints = [(a + b) / 2 for a, b in pairwise(E4M3_VALUES)]
    points = E4M3_VALUES + midpoints + torch.empty(500).uniform_(-9, 8.8).exp2_().tolist()
    values = torch.tensor([v for p in points for v in (p, -p)])
    rows = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    x = torch.cat(
        [rows, torch.full((len(rows), 1), 448.0)], dim=1
    )  # the largest magnitude makes the scale 1
    t = quantize(x)
    assert torch.equal(t.scale, torch.ones_like(t.scale))
    expected = torch.tensor([nearest_even(float(v)) for v in x.flatten()]).view_as(x)
    assert torch.equal(t.codes.float(), expected)


def test_decoding_agrees_with_the_cast_for_all_256_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(E4M3)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(
            decode(codes, dtype), codes.to(dtype), rtol=0, atol=0, equal_nan=True
        )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 140),
    columns=st.integers(1, 270),
    log2=st.integers(-148, 120),
    block=st.sampled_from(BLOCKS),
    scale_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_scales_follow_the_rule_and_errors_are_bounded(
    rows, columns, log2, block, scale_format, dtype, seed
) -> None:
    x = (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        .mul(2.0**log2)
        .to(dtype)
    )
    t = quantize(x, block, scale_format)
    assert t.shape == x.shape
    assert tuple(t.scale.shape) == (-(-rows // block[0]), -(-columns // 128))
    assert not torch.isnan(t.codes.float()).any()
    for i in range(t.scale.shape[0]):
        for j in range(t.scale.shape[1]):
            window = (slice(i * block[0], (i + 1) * block[0]), slice(j * 128, (j + 1) * 128))
            part = x[window].double()
            scale = expected_scale(float(part.abs().max()), scale_format)
            assert float(t.scale[i, j]) == scale
            error = (t.codes[window].double() * scale - part).abs()
            # half a step: 2**-4 of a normal value, half the smallest code of a subnormal one;
            # a scale that was rounded down clips up to half an ulp of itself
            clipped = 224 * 2.0**-149 if scale < 2.0**-126 else part.abs() * 2.0**-23
            assert torch.all(
                error
                <= torch.maximum(
                    part.abs() * 2.0**-4 * (1 + 2**-20), torch.tensor(scale * 2.0**-10)
                )
                + clipped
            )


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_is_quantized_by_itself_and_tails_take_no_part(block, scale_format) -> None:
    x = torch.randn(300, 333) * torch.randn(300, 333).exp()
    whole = quantize(x, block, scale_format)
    for i in range(whole.scale.shape[0]):
        for j in range(whole.scale.shape[1]):
            window = (slice(i * block[0], (i + 1) * block[0]), slice(j * 128, (j + 1) * 128))
            part = quantize(x[window], block, scale_format)
            assert torch.equal(codes_of(whole)[window], codes_of(part))
            assert torch.equal(whole.scale[i : i + 1, j : j + 1], part.scale)


def test_strides_do_not_matter() -> None:
    x = torch.randn(256, 200).bfloat16()
    assert same_bytes(quantize(x.t()), quantize(x.t().contiguous()))


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
def test_zero_blocks_and_zero_rows(block, scale_format) -> None:
    t = quantize(torch.zeros(3, 130), block, scale_format)
    assert torch.all(t.scale == 1)
    assert torch.all(codes_of(t) == 0)
    empty = quantize(torch.zeros(0, 130), block, scale_format)
    assert dequantize(empty).shape == (0, 130)
    assert dequantize(quantize(torch.zeros(130, 0), block, scale_format)).shape == (130, 0)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("smallest", [2.0**-149, 3 * 2.0**-149, 300 * 2.0**-149, 2.0**-127])
def test_subnormal_blocks_stay_finite_and_are_not_flushed(smallest, scale_format) -> None:
    x = torch.zeros(1, 128)
    x[0, 0], x[0, 1] = smallest, -smallest
    t = quantize(x, (1, 128), scale_format)
    value = dequantize(t)
    assert float(t.scale) > 0
    assert torch.isfinite(value).all()
    if scale_format == "fp32":
        assert torch.all((value - x).abs() <= x.abs() / 2)
    assert torch.all(value[0, 2:] == 0)


def test_largest_finite_values_survive() -> None:
    x = torch.full((1, 128), torch.finfo(torch.float32).max)
    for scale_format in FORMATS:
        t = quantize(x, (1, 128), scale_format)
        assert torch.isfinite(t.scale).all()
        assert torch.allclose(dequantize(t, torch.float64), x.double(), rtol=2**-4)


def test_a_single_outlier_costs_only_its_own_block() -> None:
    x = torch.randn(2, 256)
    calm = dequantize(quantize(x))
    x[0, 3] = 1e6
    wild = dequantize(quantize(x))
    assert torch.equal(wild[1], calm[1])
    assert torch.equal(wild[0, 128:], calm[0, 128:])
    assert float(wild[0, 3]) == pytest.approx(1e6, rel=2**-4)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("block", "scale_format"), [((1, 128), "pow2"), ((128, 128), "fp32")])
def test_nonfinite_blocks_are_nan_throughout_and_counted(bad, dtype, block, scale_format) -> None:
    x = torch.randn(130, 300).to(dtype)
    x[1, 5] = bad
    nonfinite_blocks.take(torch.device("cpu"))
    t = quantize(x, block, scale_format)
    assert nonfinite_blocks.take(torch.device("cpu")) == 1
    assert torch.isnan(t.scale).sum() == 1
    window = codes_of(t)[1:2, :128] if block[0] == 1 else codes_of(t)[:128, :128]
    assert torch.all(window == 0x7F)
    assert int((codes_of(t) == 0x7F).sum()) == window.numel()
    assert torch.isfinite(dequantize(t)).sum() == x.numel() - window.numel()


@pytest.mark.parametrize("deviation", [1e-9, 1e-7, 1e-30])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_tiny_gradients_are_not_flushed(deviation, scale_format) -> None:
    x = (torch.randn(64, 512) * deviation).bfloat16()
    t = quantize(x, (1, 128), scale_format)
    underflowed = (codes_of(t) & 0x7F == 0) & (x != 0)
    assert underflowed.sum() < 1e-3 * x.numel()
    assert relative_error(x, dequantize(t, torch.float64)) < 0.03


def test_pow2_survives_a_detour_over_bf16() -> None:
    x = torch.randn(200, 300) * (torch.randn(200, 1) * 4).exp()
    for block in BLOCKS:
        t = quantize(x, block, "pow2")
        again = quantize(dequantize(t, torch.bfloat16), block, "pow2")
        assert torch.equal(dequantize(again), dequantize(t))


def test_refuses_what_it_cannot_quantize() -> None:
    with pytest.raises(ValueError, match="matrix"):
        quantize(torch.zeros(4))
    with pytest.raises(ValueError, match="BF16, FP32 or FP16"):
        quantize(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="scale_format"):
        quantize(torch.zeros(4, 4), scale_format="ue8m0")
    with pytest.raises(ValueError, match="block"):
        quantize(torch.zeros(4, 4), block=(1, 64))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_transposing_tiles_moves_bytes_only(scale_format) -> None:
    x = torch.randn(300, 200).bfloat16()
    t = quantize(x, (128, 128), scale_format)
    assert same_bytes(transpose(transpose(t)), t)
    assert same_bytes(transpose(t), quantize(x.t(), (128, 128), scale_format))


@pytest.mark.parametrize("shape", [(256, 256), (300, 200), (1, 1), (129, 128), (0, 128), (7, 640)])
def test_transposing_rows_takes_the_largest_scale_of_rows_that_hold_something(shape) -> None:
    x = (torch.randn(shape) * (torch.randn(shape[0], 1) * 4).exp()).bfloat16()
    x[::3] = 0
    source = quantize(x)
    t = transpose(source)
    assert t.block == (128, 128)
    assert tuple(t.shape) == (shape[1], shape[0])
    for i in range(t.scale.shape[1]):
        for j in range(t.scale.shape[0]):
            rows, columns = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            codes, scale = source.codes[rows, columns].double(), source.scale[rows, j].double()
            held = scale[(codes != 0).any(dim=1)]
            tile = float(held.max()) if len(held) else 1.0
            assert float(t.scale[j, i]) == tile
            expected = (codes * (scale / tile)[:, None]).float().to(E4M3).t().contiguous()
            assert torch.equal(codes_of(t)[columns, rows], expected.view(torch.uint8))


def test_empty_rows_do_not_flush_a_small_tile() -> None:
    x = torch.randn(128, 128) * 2.0**-60
    x[5] = 0  # quantized with scale 1
    values = dequantize(transpose(quantize(x)))
    assert float((values.t() - x).norm() / x.norm()) < 0.03


def test_transposing_keeps_nan_and_refuses_fp32_rows() -> None:
    x = torch.randn(256, 128)
    x[3, 3] = math.nan
    t = transpose(quantize(x))
    assert torch.isnan(t.scale).tolist() == [[True, False]]
    assert torch.all(codes_of(t)[:, :128] == 0x7F)
    with pytest.raises(ValueError, match=r"quantize\(x.T"):
        transpose(quantize(x, (1, 128), "fp32"))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_matrix_of_several_chunks_has_the_bytes_of_its_parts(block) -> None:
    x = torch.randn(1024, 513, generator=torch.Generator().manual_seed(2)).bfloat16()
    x[0], x[500, 7], x[901, 512] = -0.0, torch.nan, torch.inf
    assert len(list(quantize_reference.chunks(x))) > 1
    whole = quantize(x, block)
    for start in range(0, 1024, 128):
        part = quantize(x[start : start + 128], block)
        assert torch.equal(codes_of(part), codes_of(whole)[start : start + 128])
        for dtype in (torch.float32, torch.float64):
            values = dequantize(whole, dtype)[start : start + 128]
            torch.testing.assert_close(
                values, dequantize(part, dtype), equal_nan=True, rtol=0, atol=0
            )


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(("first", "rows"), [(0, 130), (64, 70), (200, 131)])
def test_rows_of_a_weight_have_the_bytes_of_the_whole(
    scale_format: str, first: int, rows: int
) -> None:
    weight = torch.randn(331, 200, generator=torch.Generator().manual_seed(1))
    weight[70, 3], weight[300, 150] = torch.nan, -torch.inf
    part = weight[first : first + rows]
    whole = quantize_reference.quantize_weight(weight, scale_format)
    found = WeightRows(part, first, torch.zeros(3, 2), torch.empty(rows, 200, dtype=E4M3))
    largest_magnitudes([found])
    for block, group in product(range(3), range(2)):
        inside = part[torch.arange(first, first + rows) // 128 == block].bfloat16().float()
        values = inside[:, group * 128 : group * 128 + 128].abs()
        expected = values.nan_to_num(torch.inf, torch.inf).max() if values.numel() else 0
        assert found.scale[block, group] == expected
    encoded = WeightRows(part, first, whole.scale, found.codes)
    encode_weights([encoded], scale_format)
    assert torch.equal(found.codes.view(torch.uint8), codes_of(whole)[first : first + rows])
