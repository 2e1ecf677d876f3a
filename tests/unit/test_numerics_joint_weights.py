"""Weights that are quantized together have the codes, values and counts that they have alone."""

import math

import pytest
import torch

from infir2.numerics import Fp8Linear, nonfinite_blocks, quantize_weights
from infir2.numerics import joint_weights as joint
from infir2.numerics.quantize import dequantize, quantize_weight

SHAPES = [(128, 128), (64, 128), (300, 128), (128, 512), (100, 130), (7, 130)]
CPU = torch.device("cpu")


def layers_of(scale_format: str) -> list[Fp8Linear]:
    torch.manual_seed(0)
    layers = []
    for n, k in SHAPES:
        layer = Fp8Linear(k, n, scale_format=scale_format)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(n, k) * torch.exp2(torch.randint(-140, 120, (n, 1))))
        layers.append(layer)
    return layers


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
def test_the_bits_are_those_of_each_weight_alone(scale_format) -> None:
    layers = layers_of(scale_format)
    with torch.no_grad():
        layers[1].weight[3, 4] = math.nan
        layers[2].weight[299, 0] = math.inf
    nonfinite_blocks.take(CPU)
    with torch.inference_mode():
        quantize_weights(torch.zeros(1, 128, dtype=torch.bfloat16), [layers[:2], layers[2:]])
    assert nonfinite_blocks.take(CPU) == 2
    for layer in layers:
        alone = quantize_weight(layer.weight, scale_format)
        codes = layer.quantized_weight()
        assert same(codes.codes, alone.codes)
        assert same(codes.scale, alone.scale)
        for dtype in (torch.float64, torch.float32):
            assert same(layer.weight_values(dtype), dequantize(alone, dtype))
            assert layer.weight_values(dtype).is_contiguous()
        assert layer.quantizations == 1


def test_only_weights_that_changed_are_quantized() -> None:
    layers = layers_of("pow2")
    joint.quantize_together(layers)
    before = layers[1].quantized_weight()
    with torch.no_grad():
        layers[0].weight.mul_(2)
        layers[3].weight.mul_(2)
    joint.quantize_together(layers)
    assert [layer.quantizations for layer in layers] == [2, 1, 1, 2, 1, 1]
    assert layers[1].quantized_weight() is before
    expected = quantize_weight(layers[3].weight, "pow2")
    assert same(layers[3].quantized_weight().codes, expected.codes)


def test_large_weights_plain_layers_and_loaded_codes_are_left_alone(monkeypatch) -> None:
    small, large = Fp8Linear(128, 128), Fp8Linear(256, 256)
    served = Fp8Linear(128, 128)
    codes = small.quantized_weight()
    served.load_codes(codes.codes, codes.scale)
    monkeypatch.setattr(joint, "_SMALL", 128 * 128)
    joint.quantize_together([torch.nn.Linear(128, 128), served, large, Fp8Linear(128, 64)])
    assert large.quantizations == served.quantizations == 0
    assert same(served.quantized_weight().codes, codes.codes)
