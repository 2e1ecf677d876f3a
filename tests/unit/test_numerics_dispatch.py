"""Every operation has two definitions with one signature, and one function chooses between them."""

import inspect
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from infir2.numerics import (
    adamw,
    adamw_reference,
    head,
    head_reference,
    ops,
    ops_reference,
    quantize_reference,
)

# The package's attribute of that name is the function.
conversions = import_module("infir2.numerics.quantize")


def cuda_definitions() -> dict[type, tuple[ModuleType, ModuleType]]:
    from infir2.numerics import head_cuda, ops_cuda
    from infir2.numerics.kernels import adamw as adamw_kernels
    from infir2.numerics.kernels import api

    return {
        ops.Operations: (ops_reference, ops_cuda),
        head.HeadOperations: (head_reference, head_cuda),
        conversions.Conversions: (quantize_reference, api),
        adamw.AdamWUpdate: (adamw_reference, adamw_kernels),
    }


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_both_definitions_of_an_operation_have_its_signature() -> None:
    for protocol, modules in cuda_definitions().items():
        names = [name for name in vars(protocol) if not name.startswith("_")]
        assert names
        for name in names:
            _, *expected = inspect.signature(getattr(protocol, name)).parameters
            for module in modules:
                found = list(inspect.signature(getattr(module, name)).parameters)
                assert found == expected, f"{module.__name__}.{name}"


def test_the_reference_computes_on_a_cpu_without_importing_the_kernels() -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    assert ops.definitions_for(x) is ops_reference
    assert head._definitions_for(x) is head_reference
    assert conversions._definitions_for(x) is quantize_reference
    assert adamw._definition_for(x) is adamw_reference


def test_kernels_compute_with_bf16_values_on_a_gpu_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    for has_kernels in (False, True):
        monkeypatch.setattr(ops, "usable", lambda device, answer=has_kernels: answer)
        assert ops.runs_on_kernels(OnGpu(torch.bfloat16)) == has_kernels
        assert not ops.runs_on_kernels(OnGpu(torch.float32))
        assert ops.runs_on_kernels(OnGpu(torch.float32), torch.bfloat16) == has_kernels
