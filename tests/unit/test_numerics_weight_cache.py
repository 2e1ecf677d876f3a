"""Cached codes end at a step of any torch optimizer, without a hook at import."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from infir2.numerics import Fp8Linear, convert_to_fp8, invalidate, quantize
from infir2.numerics.weight_cache import cached


def test_importing_the_package_registers_no_optimizer_hook() -> None:
    code = (
        "import torch.optim.optimizer as torch_optimizer, infir2.numerics, infir2.train.optimizer\n"
        "print(len(torch_optimizer._global_optimizer_pre_hooks), end=' ')\n"
        "print(len(torch_optimizer._global_optimizer_post_hooks))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["0", "0"]


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "foreach AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=1.0, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before_conversion", [False, True])
def test_converted_layers_never_use_stale_codes(name: str, before_conversion: bool) -> None:
    """`before_conversion`: an optimizer over FP32 parameters, which the converted layers share."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    optimizer = OPTIMIZERS[name](model.parameters()) if before_conversion else None
    convert_to_fp8(model)
    optimizer = optimizer or OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        model(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in model:
            if isinstance(layer, Fp8Linear):
                fresh = quantize(layer.weight.detach().bfloat16(), (128, 128))
                codes = layer.quantized_weight().codes
                assert torch.equal(codes.view(torch.uint8), fresh.codes.view(torch.uint8))


def test_a_step_leaves_the_counters_of_other_parameters_alone() -> None:
    layer, other = Fp8Linear(128, 64, bias=False), nn.Linear(128, 64, bias=False)
    optimizer = torch.optim.SGD([layer.weight, other.weight], lr=1.0, fused=True)
    alone = torch.optim.SGD([other.weight], lr=1.0, fused=True)
    for module in (layer, other):
        module(torch.randn(3, 128)).sum().backward()
    versions = [other.weight._version]
    for step in (alone.step, optimizer.step):
        before = layer.weight._version
        step()
        versions.append(other.weight._version)
    assert layer.weight._version > before
    assert versions[2] - versions[1] == versions[1] - versions[0]  # torch's own moves, if any


def test_a_value_is_computed_once_per_version_and_key() -> None:
    weight, calls = nn.Parameter(torch.ones(2)), []
    for key in ("a", "a", "b"):
        cached(weight, key, lambda key=key: calls.append(key))
    with torch.no_grad():
        weight.mul_(2)
    cached(weight, "a", lambda: calls.append("again"))
    assert calls == ["a", "b", "again"]


def test_a_module_is_invalidated_after_writes_through_data() -> None:
    model = convert_to_fp8(nn.Sequential(nn.Linear(128, 64, bias=False), nn.Linear(64, 128)))
    x = torch.randn(3, 128)
    model(x)
    for layer in model:
        layer.weight.data.zero_()
    invalidate(model)
    assert torch.equal(model(x), model[1].bias.expand(3, -1))
