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
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install 'infir2[gpu]')"
)
# What one block adds to a step: launches, allocations, views of forward, backward and update; and
# those of the whole step of a model of one block. The layers of 135M that share an input have
# blocks that do not align, so that each has GEMMs of its own.
BOUNDS = {
    "1.5B": {
        "FP8": ((13, 25, 58), (28, 50, 100), (12, 0, 0), (120, 103, 205)),
        "BF16": ((17, 12, 26), (17, 15, 24), (12, 0, 0), (111, 55, 97)),
    },
    "135M": {
        "FP8": ((23, 36, 82), (46, 70, 150), (12, 0, 0), (148, 134, 279)),
        "BF16": ((17, 12, 26), (17, 15, 24), (12, 0, 0), (111, 55, 97)),
    },
}


@pytest.mark.parametrize("model", BOUNDS)
def test_a_block_asks_no_more_of_a_gpu_than_it_did(model: str, tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    words = ["--blocks", "--model", model, "--out", str(out)]
    command = [sys.executable, str(ROOT / "bench/launches.py"), *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(out.read_text(encoding="utf-8"))
    for name, parts in BOUNDS[model].items():
        for part, bounds in zip(("forward", "backward", "update", "once"), parts, strict=True):
            row = counted[name][part]
            found = tuple(row[kind] for kind in ("launches", "allocations", "views"))
            within = [number <= bound for number, bound in zip(found, bounds, strict=True)]
            assert all(within), (name, part, found, bounds)


def test_the_record_of_the_allocator_names_the_lines_that_live_at_the_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from peak import at_peak

    def event(action: str, addr: int, size: int, line: int = 0) -> dict:
        frame = {"filename": "/x/infir2/numerics/ops_cuda.py", "line": line, "name": "forward"}
        return {"action": action, "addr": addr, "size": size, "frames": [frame]}

    trace = [
        event("alloc", 1, 8, 10),
        event("alloc", 2, 100, 20),
        event("free_completed", 2, 100),
        event("alloc", 3, 4, 30),
        event("alloc", 4, 4, 30),
        event("free_completed", 3, 4),
    ]
    assert at_peak(trace, 3) == (
        16,
        [(8, 1, "ops_cuda.py:10 forward"), (8, 2, "ops_cuda.py:30 forward")],
    )
