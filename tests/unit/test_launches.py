"""What a training step asks of a GPU, counted on torch's meta device (bench/launches.py).

A launch costs the host 20 to 70 microseconds and a new tensor 6, so a step of a small model or of
several GPUs takes as long as its launches. Lower a bound when a change makes it possible; a change
that needs more has to be worth it.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Counted = dict[str, dict[str, dict[str, float]]]
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install 'infir2[gpu]')"
)
# What one block adds to a step: launches, allocations, views.
BOUNDS = {
    "FP8": {"forward": (13, 25, 58), "backward": (28, 50, 100)},
    "BF16": {"forward": (17, 12, 26), "backward": (17, 15, 24)},
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    out = tmp_path_factory.mktemp("launches") / "counts.json"
    command = [sys.executable, str(ROOT / "bench/launches.py"), "--blocks", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_block_asks_no_more_of_a_gpu_than_it_did(counted: Counted, name: str, part: str) -> None:
    found = tuple(counted[name][part][kind] for kind in ("launches", "allocations", "views"))
    bounds = BOUNDS[name][part]
    assert all(number <= bound for number, bound in zip(found, bounds, strict=True)), (
        found,
        bounds,
    )
