"""The curves of the three kinds of stage equal the recorded ones.

They are bit-equal on the machine that recorded them (same processor, torch and Python), and losses
are within 1e-3 elsewhere. They were bit-equal on two processors with torch 2.11 and 2.13.
`INFIR2_UPDATE_GOLDEN=1` records them again after a change that is meant to alter them.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from record import VARIABLES

GOLDEN = Path(__file__).with_name("curves.json")
Curve = list[list[float]]


def machine() -> str:
    """Processor and torch, which the bits depend on."""
    keys = ("model name", "cpu family", "model", "stepping")
    fields = dict(
        line.split(":", 1)
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        if ":" in line
    )
    processor = ", ".join(value.strip() for name, value in fields.items() if name.strip() in keys)
    return f"{processor}, torch {torch.__version__}, {platform.machine()}"


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    out = tmp_path_factory.mktemp("golden") / "curves.json"
    script = str(GOLDEN.with_name("record.py"))
    done = subprocess.run(
        [sys.executable, script, str(out)],
        env=os.environ | VARIABLES,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", ["cpt", "sft", "rl"])
def test_curves_are_the_recorded_ones(stage: str, curves: dict[str, Curve]) -> None:
    if os.environ.get("INFIR2_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"machine": machine(), "curves": curves}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    expected = golden["curves"][stage]
    if golden["machine"] == machine():
        assert curves[stage] == expected
    else:
        assert [loss for loss, _ in curves[stage]] == pytest.approx(
            [loss for loss, _ in expected], rel=1e-3, abs=1e-3
        )
        # A flipped FP8 code changes the gradient norm ten times as much as the loss.
        assert [norm for _, norm in curves[stage]] == pytest.approx(
            [norm for _, norm in expected], rel=1e-2
        )
