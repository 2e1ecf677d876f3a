"""Which release of DeepGEMM is loaded, and which compiler it finds."""

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from infir2.numerics import deep_gemm_wheel


@pytest.mark.parametrize(
    ("torch_release", "release", "fits"),
    [
        ("2.11.0+cu130", "0.0.1", True),
        ("2.11.0+cu130", "0.1.5", True),
        ("2.11.0+cu130", "0.1.5.post3", False),
        ("2.11.0+cu130", "0.1.7", False),
        ("2.12.1", "0.1.5", False),
        ("2.13.0+cu130", "0.1.7", True),
        ("2.13.0+cu130", "0.1.5", False),
        ("2.13.0+cu130", "0.2.5", False),
    ],
)
def test_a_wheel_built_for_another_torch_is_not_loaded(
    torch_release: str, release: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its missing symbol would end the process, without an exception."""
    module = ModuleType("deep_gemm")
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    monkeypatch.setattr(torch, "__version__", torch_release)
    monkeypatch.setattr(deep_gemm_wheel, "version", lambda _: release)
    found = deep_gemm_wheel.deep_gemm.__wrapped__
    if fits:
        assert found() is module
        return
    with pytest.warns(UserWarning, match=f"sgl-deep-gemm {release} was built for another torch"):
        assert found() is None


def test_deep_gemm_without_a_compiler_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "deep_gemm.py").write_text("assert None is not None")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    with pytest.warns(UserWarning, match=r"it needs nvcc: pip install .*\); using cuBLAS"):
        assert deep_gemm_wheel.deep_gemm.__wrapped__() is None


@pytest.mark.parametrize("kind", ["wheels", "CUDA_HOME", "nvcc", "toolkit", "nothing"])
def test_the_compiler_of_the_wheels_is_for_machines_without_a_toolkit(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "deep_gemm.py").write_text("import os\nhome = os.environ.get('CUDA_HOME')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(deep_gemm_wheel, "_TOOLKIT", tmp_path / "toolkit")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    wheels = tmp_path / "nvidia/cu13"
    programs = {"wheels": [wheels], "nvcc": [wheels, tmp_path], "nothing": []}
    for home in programs.get(kind, [wheels, tmp_path / "toolkit"]):
        (home / "bin").mkdir(parents=True)
        (home / "bin/nvcc").write_text("#!/bin/sh")
        (home / "bin/nvcc").chmod(0o755)
    if kind == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", "/mine")
    module = deep_gemm_wheel.deep_gemm.__wrapped__()
    expected = {"wheels": str(wheels), "CUDA_HOME": "/mine"}
    assert module.home == expected.get(kind)
    assert os.environ.get("CUDA_HOME") == ("/mine" if kind == "CUDA_HOME" else None)
