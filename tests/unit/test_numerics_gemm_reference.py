"""The emulated GEMM operands equal what the codes stand for."""

import math

import pytest
import torch

from infir2.numerics import dequantize, nonfinite_blocks, quantize, transpose
from infir2.numerics.gemm_reference import (
    gradient_values,
    input_for_backward,
    input_values,
    quantize_input,
    round_to_e4m3_,
)

FORMATS = ["pow2", "fp32"]
SHAPES = [(256, 128), (300, 173), (1, 128), (0, 128), (128, 576), (7, 1)]


def gaussian(shape: tuple[int, int]) -> torch.Tensor:
    x = torch.randn(shape) * (torch.randn(shape[0], 1) * 3).exp()
    x[1::4] = 0
    return x.bfloat16()


def test_rounding_without_a_cast_equals_the_cast() -> None:
    values = torch.cat(
        [
            torch.randn(20000) * 100,
            torch.randn(20000) * 0.01,
            torch.arange(-449, 450) / 512,
            torch.arange(-448.0, 449.0),
        ]
    )
    values = torch.cat(
        [values.clamp(-448, 448), torch.tensor([448.0001, 463.9, -463.9, 0.0, -0.0, 2.0**-140])]
    )
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(round_to_e4m3_(values.clone(), torch.empty_like(values)), expected)
    assert torch.isnan(round_to_e4m3_(torch.tensor([math.nan]), torch.empty(1))).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_format", FORMATS)
def test_gradient_operands_equal_both_quantized_layouts(shape, scale_format) -> None:
    grad = gaussian(shape)
    rows, columns = gradient_values(grad, scale_format, by_row=True, by_column=True)
    assert torch.equal(rows, dequantize(quantize(grad, (1, 128), scale_format)))
    assert torch.equal(columns.t(), dequantize(quantize(grad.t(), (1, 128), scale_format)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_format", FORMATS)
def test_input_operands_equal_the_codes_of_forward_and_backward(shape, scale_format) -> None:
    x = gaussian(shape)
    codes, values = quantize_input(x, scale_format)
    assert torch.equal(values, dequantize(codes, torch.float64))
    saved = input_for_backward(x, codes)
    expected = transpose(codes) if scale_format == "pow2" else quantize(x.t(), (128, 128), "fp32")
    assert torch.equal(input_values(saved).t(), dequantize(expected))
    assert saved.nbytes <= 1.05 * x.numel() + 4 * (x.shape[0] + x.shape[1])


def test_only_the_requested_layouts_are_computed() -> None:
    grad = gaussian((130, 260))
    both = gradient_values(grad, "pow2", by_row=True, by_column=True)
    rows, nothing = gradient_values(grad, "pow2", by_row=True, by_column=False)
    assert nothing is None
    assert torch.equal(rows, both[0])
    nothing, columns = gradient_values(grad, "pow2", by_row=False, by_column=True)
    assert nothing is None
    assert torch.equal(columns, both[1])
    assert gradient_values(grad, "pow2", by_row=False, by_column=False) == (None, None)


def test_extreme_gradients_go_the_same_way() -> None:
    grad = torch.tensor([[3e38, -1e-45, 0.0, 1e-40], [1e30, 1e-30, -0.0, 5.0]])
    for scale_format in FORMATS:
        rows, columns = gradient_values(grad, scale_format, by_row=True, by_column=True)
        assert torch.equal(rows, dequantize(quantize(grad, (1, 128), scale_format)))
        assert torch.equal(columns.t(), dequantize(quantize(grad.t(), (1, 128), scale_format)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("power", [-149, -133, -126, -123, -118, -60, 0, 60, 95, 103, 110, 120])
def test_gradients_of_any_magnitude_go_the_same_way(power, dtype) -> None:
    """Blocks around this power of two: subnormals of both formats, ties, zeros, overflow, NaN."""
    torch.manual_seed(power)
    grad = torch.randn(300, 260) * 2.0 ** max(power, -126) * 2.0 ** min(0, power + 126)
    grad[::7] = -0.0
    grad[1::7] *= 2.0**-9
    grad[2::7] = (torch.randint(8, 16, (260,)) + 0.5) * 2.0 ** max(power, -126)
    for bad in (None, math.nan, -math.inf):
        if bad is not None:
            grad[131, 5] = bad
        whole = grad.to(dtype)
        rows, columns = gradient_values(whole, "pow2", by_row=True, by_column=True)
        expected = dequantize(quantize(whole)), dequantize(quantize(whole.t())).t()
        torch.testing.assert_close((rows, columns), expected, rtol=0, atol=0, equal_nan=True)
        saved = quantize(whole)
        expected = dequantize(transpose(saved)).t()
        torch.testing.assert_close(input_values(saved), expected, rtol=0, atol=0, equal_nan=True)


def test_nonfinite_gradients_reach_both_operands_and_the_counter() -> None:
    grad = torch.randn(256, 256)
    grad[2, 3] = math.inf
    nonfinite_blocks.take(torch.device("cpu"))
    rows, columns = gradient_values(grad, "pow2", by_row=True, by_column=True)
    assert nonfinite_blocks.take(torch.device("cpu")) == 2
    assert torch.isnan(rows).nonzero()[:, 0].unique().tolist() == [2]
    assert torch.isnan(columns).nonzero()[:, 1].unique().tolist() == [3]
    x = torch.randn(256, 128)
    x[2, 3] = math.nan
    assert torch.isnan(input_values(quantize(x))).any(dim=1).sum() == 128


@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
def test_a_gradient_in_fp64_is_quantized_as_in_fp32(scale_format: str) -> None:
    """Partial sums of tensor-parallel ranks come in FP64 on a CPU."""
    grad = torch.randn(130, 260)
    grad[5, 7] = torch.inf
    for wide, narrow in zip(
        gradient_values(grad.double(), scale_format, by_row=True, by_column=True),
        gradient_values(grad, scale_format, by_row=True, by_column=True),
        strict=True,
    ):
        assert wide is not None
        assert narrow is not None
        torch.testing.assert_close(wide, narrow, rtol=0, atol=0, equal_nan=True)
