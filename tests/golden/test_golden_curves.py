"""The loss curves of the three kinds of stage are those in the repository.

Bit-equal on the machine that wrote them (same processor, torch and Python), losses within 1e-3 elsewhere; seen bit-equal on two
processors with torch 2.11 and 2.13. `INFIR2_UPDATE_GOLDEN=1` writes them anew after a change that is meant to move them.
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
    """What the bits depend on."""
    wanted = ("model name", "cpu family", "model", "stepping")
    found = dict(
        line.split(":", 1)
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        if ":" in line
    )
    processor = ", ".join(value.strip() for name, value in found.items() if name.strip() in wanted)
    return f"{processor}, torch {torch.__version__}, {platform.machine()}"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
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
def test_curves_are_the_recorded_ones(stage: str, found: dict[str, Curve]) -> None:
    if os.environ.get("INFIR2_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"machine": machine(), "curves": found}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    wanted = golden["curves"][stage]
    if golden["machine"] == machine():
        assert found[stage] == wanted
    else:
        assert [loss for loss, _ in found[stage]] == pytest.approx(
            [loss for loss, _ in wanted], rel=1e-3, abs=1e-3
        )
        # a flipped code shows ten times as much in the norm of the gradients as in the loss
        assert [norm for _, norm in found[stage]] == pytest.approx(
            [norm for _, norm in wanted], rel=1e-2
        )
