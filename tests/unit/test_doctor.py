"""`infir2 doctor`: what it finds on this machine, and on machines that lack something."""

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from stages import make_world, options

from infir2.cli import main
from infir2.doctor import kernels, machine
from infir2.doctor.kernels import check_kernels, check_layer, check_speed
from infir2.doctor.machine import check_cpu, check_gpus, check_versions
from infir2.numerics.deep_gemm_wheel import DEEP_GEMM_RELEASES
from infir2.train import fast_path
from infir2.train.fast_path import missing_libraries

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_this_machine_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    names = ["versions", "cpu", "gpu", "kernels", "fast path", "FP8 layer", "jail", "extras"]
    assert list(found) == names
    assert found["FP8 layer"]["status"] == "ok"
    assert "emulated" in found["kernels"]["detail"]


def test_a_check_that_raises_is_a_failed_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr("infir2.doctor.examine.check_layer", broken)
    assert main(["doctor"]) == 1
    output = capsys.readouterr()
    assert "FAIL  FP8 layer  RuntimeError: CUDA error: no kernel image" in output.out
    assert "FP8 layer: not in order on this machine" in output.err
    assert "extras" in output.out


def test_a_layer_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(kernels.Fp8Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.02

    assert check_layer(CPU).status == "ok"
    monkeypatch.setattr(kernels, "Fp8Linear", Wrong)
    finding = check_layer(CPU)
    assert finding.status == "fail"
    assert "INFIR2_GEMM=emulation" in finding.detail


def nvidia_smi(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    result = subprocess.CompletedProcess((), 0, stdout=output)
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: result)


@pytest.mark.parametrize(
    ("cuda", "words"),
    [(None, "is a CPU build: pip install --force-reinstall"), ("13.0", "update the driver")],
)
def test_a_gpu_that_torch_does_not_see(
    cuda: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    nvidia_smi(monkeypatch, "NVIDIA H100 80GB HBM3, 580.1, 81559 MiB\n")
    finding = check_gpus()
    assert finding.status == "fail"
    assert "NVIDIA H100" in finding.detail
    assert words in finding.detail
    nvidia_smi(monkeypatch, "No devices were found\n")
    assert check_gpus().status == "ok"


def test_versions_outside_their_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_versions().status == "ok"
    real = machine._version
    monkeypatch.setattr(
        machine, "_version", lambda name: {"torch": "2.10.0+cu130"}.get(name) or real(name)
    )
    finding = check_versions()
    assert finding.status == "fail"
    assert finding.detail.startswith("torch is 2.10.0+cu130, not ")


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert "export OMP_NUM_THREADS=1" in check_cpu().detail


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine whose torch says that it has an H100, without any library of the fast path."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    for module in (fast_path, kernels):
        monkeypatch.setattr(module, "missing_block_scaling", lambda _: None)
        monkeypatch.setattr(module, "flash_attention_4", lambda: None)
    monkeypatch.setattr(kernels, "usable", lambda _: True)
    monkeypatch.setattr(fast_path, "deep_gemm", lambda: None)
    monkeypatch.setattr(fast_path, "find_spec", lambda _: object())
    return monkeypatch


def test_what_a_step_loses_without_a_library(hopper: pytest.MonkeyPatch) -> None:
    assert missing_libraries(GPU, fp8=True) == (
        "without FlashAttention 4 a step is 3 % slower (of 8,192 tokens; more with longer "
        "sequences): pip install 'infir2[gpu]'; without DeepGEMM a step is 2 to 3 % slower: "
        "pip install 'infir2[gpu]'"
    )
    assert "DeepGEMM" not in missing_libraries(GPU, fp8=False)
    assert missing_libraries(CPU, fp8=True) == ""
    assert check_speed(GPU).status == "warn"
    hopper.setattr(fast_path, "flash_attention_4", lambda: print)
    assert missing_libraries(GPU, fp8=True).startswith("without DeepGEMM")
    hopper.setattr(fast_path, "version", lambda _: "0.1.7")
    assert "(sgl-deep-gemm 0.1.7 does not load; a warning says why)" in check_speed(GPU).detail
    hopper.setattr(fast_path, "deep_gemm", lambda: object())
    assert missing_libraries(GPU, fp8=True) == ""
    assert check_speed(GPU).status == "ok"
    assert "DeepGEMM 0.1.7" in check_speed(GPU).detail


def test_the_extra_is_the_fast_path() -> None:
    """Every library that a run asks for, on the only system that has its wheel, in releases that
    fit the torch of the extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = {each.name: each for each in map(Requirement, project["optional-dependencies"]["gpu"])}
    assert wanted.keys() == {"torch", "triton", "flash-attn-4", "sgl-deep-gemm", "cuda-toolkit"}
    for name in ("flash-attn-4", "sgl-deep-gemm", "cuda-toolkit"):
        for system, machine_name, expected in [
            ("linux", "x86_64", True), ("linux", "aarch64", False), ("darwin", "x86_64", False),
        ]:  # fmt: skip
            environment = {"sys_platform": system, "platform_machine": machine_name}
            assert wanted[name].marker.evaluate(environment) is expected
    (release,) = wanted["sgl-deep-gemm"].specifier
    (fitting,) = (
        each for torch_release, each in DEEP_GEMM_RELEASES.items()
        if wanted["torch"].specifier.contains(f"{torch_release}.0")
    )  # fmt: skip
    assert SpecifierSet(fitting).contains(release.version)
    for name in ("README.md", "docs/install.md"):
        assert f"sgl-deep-gemm=={release.version}" in (ROOT / name).read_text("utf-8")


def test_which_kernels_are_used_and_why(hopper: pytest.MonkeyPatch) -> None:
    assert "block-scaled, by cuBLAS; quantizers, norms" in check_kernels(GPU).detail
    hopper.setattr(fast_path, "deep_gemm", lambda: object())
    assert "cuBLAS or DeepGEMM, the faster one per shape" in check_kernels(GPU).detail
    hopper.setattr(kernels, "missing_block_scaling", lambda _: "an A100 has no FP8")
    assert check_kernels(GPU).status == "warn"
    assert "emulated (an A100 has no FP8)" in check_kernels(GPU).detail


def test_a_run_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path / "world")
    said = "without X a step is 3 % slower: pip install X"
    monkeypatch.setattr("infir2.train.supervisor.missing_libraries", lambda device, fp8: said * fp8)
    for fp8 in ("true", "false"):
        words = options(world, tmp_path / fp8, "cpt")
        assert main([*words, "--train.stop_after_step=1", f"--fp8.enabled={fp8}"]) == 0
        assert (f"cpt: {said}" in capsys.readouterr().err) == (fp8 == "true")
