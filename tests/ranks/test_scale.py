"""bench/scale.py on two CPU processes with a tiny model: every section has results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = "equality,throughput,gather,overlap"


def scale(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "bench/scale.py"), *words]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("scale") / "scale.json"
    printed = scale(
        "--tiny", "--device", "cpu", "--gpus", "2", "--sections", SECTIONS, "--out", str(out)
    )
    assert "first gradient 300 dB" in printed
    report = json.loads(out.read_text(encoding="utf-8"))
    results = {name.partition(":")[0]: value for name, value in report.items() if ": " in name}
    assert not [value["failed"] for value in results.values() if "failed" in value]
    return results


@pytest.mark.costly
def test_losses_and_bytes_are_those_of_one_process(found: dict[str, Any]) -> None:
    for layout in ("dp2", "copies2", "tp2", "cp2"):
        assert found["equality"][f"FP8 {layout}"]["bytes equal on all ranks"]
        assert found["equality"][f"FP8 {layout}"]["largest difference"] < 5e-3
        assert found["equality"][f"BF16 {layout}"]["largest difference"] < 1e-3
        assert found["equality"][f"FP8 {layout}"]["decibels of the first gradient"] > (
            100 if layout in ("dp2", "copies2") else 45
        )
        assert found["equality"][f"BF16 {layout}"]["decibels of the first gradient"] > (
            100 if layout in ("dp2", "copies2") else 45
        )
    assert found["equality"]["FP8 dp2"]["largest difference"] < 1e-6
    assert found["equality"]["FP8 single process, repeated"][
        "decibels of the first gradient"
    ] == pytest.approx(300), "a CPU is deterministic"


@pytest.mark.costly
def test_figures_of_speed_and_traffic(found: dict[str, Any]) -> None:
    for name in ("FP8", "BF16", "FP8, gate/up in FP8"):
        row = found["throughput"][name]
        assert row["total"] > row["forward"] > 0
        assert row["tokens_per_second"] == pytest.approx(256e3 / row["total"])
    gathered = {name: found["gather"][name]["bytes"] for name in ("FP8", "BF16")}
    assert 0.5 < gathered["FP8"] / gathered["BF16"] < 0.51, (
        "one byte instead of two, and the vectors beside them"
    )
    assert found["overlap"]["FP8"]["communication_ms"] > 0


def test_the_plan_names_every_layout_and_needs_no_gpu() -> None:
    plan = scale("--dry-run", "--gpus", "8")
    for layout in ("dp8", "tp8", "cp8", "hsdp2x4", "dp4-tp2", "cp2-tp4", "dp4-cp2", "dp2-cp2-tp2"):
        assert layout in plan
    assert "NCCL_NVLS_ENABLE=0" in plan
