"""Sharded models on one GPU: FSDP2 over one rank of NCCL, and layouts of two ranks that share the GPU.

About a minute on a Hopper GPU: python -m pytest tests/gpu/test_gpu_parallel.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install 'infir2[gpu]')")

from infir2.numerics import snr_db
from infir2.numerics.gemm_backends import missing_block_scaling
from infir2.numerics.kernels import usable
from infir2.parallel.context import attend_to_prefix

hopper = torch.cuda.is_available() and usable(torch.device("cuda")) and missing_block_scaling(torch.device("cuda")) is None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hopper, reason="block-scaled FP8 GEMMs need a Hopper GPU")]
ROOT = Path(__file__).resolve().parents[2]


def python(*words: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("one") / "found.json"
    python(str(ROOT / "tests/gpu/one_gpu.py"), str(out))
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_a_model_sharded_over_one_rank_trains_as_unsharded(one_rank: dict[str, Any], name: str) -> None:
    """Attention's backward adds in any order, so that losses agree and are not equal."""
    found = one_rank[name]
    assert found["bytes"]
    assert found["weights"] == (21 if name == "fp8" else 0)
    assert found["sharded"][0] == pytest.approx(found["alone"][0], abs=1e-5)
    assert found["sharded"] == pytest.approx(found["alone"], rel=2e-3)
    assert found["resumed"] == pytest.approx(found["sharded"][3:], rel=2e-3)


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_the_host_waits_once_in_a_step(one_rank: dict[str, Any], name: str) -> None:
    assert one_rank[name]["waits"] == 1


def test_layouts_of_two_ranks_on_one_gpu(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    python(str(ROOT / "bench/scale.py"), "--tiny", "--share-gpu", "--gpus", "2", "--sections", "equality,overlap", "--out", str(out))
    found = json.loads(out.read_text(encoding="utf-8"))
    equality = found["equality: equality"]
    assert "failed" not in equality, equality["failed"]
    for layout in ("dp2", "tp2", "cp2"):
        assert equality[f"FP8 {layout}"]["bytes equal on all ranks"], layout
        assert equality[f"FP8 {layout}"]["largest difference"] < 0.02, layout
        assert equality[f"BF16 {layout}"]["largest difference"] < 0.02, layout
    assert "failed" not in found["overlap: 8 blocks of 7B"], found


def test_attention_to_a_prefix_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(n, heads, 128, generator=generator).bfloat16().cuda().requires_grad_() for n, heads in ((256, 8), (640, 2), (640, 2))
    )

    def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        wide_q, wide_k, wide_v = q.double() * 128**-0.5, k.double().repeat_interleave(4, 1), v.double().repeat_interleave(4, 1)
        unseen = torch.ones(256, 640, dtype=torch.bool, device="cuda").triu(640 - 256 + 1)
        weights = torch.einsum("nah,mah->anm", wide_q, wide_k).masked_fill(unseen, -torch.inf).softmax(-1)
        return torch.einsum("anm,mah->nah", weights, wide_v).to(q.dtype)

    results = []
    for function in (lambda q, k, v: attend_to_prefix(q, k, v, None), definition):
        out = function(q, k, v)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for found, expected in zip(*results, strict=True):
        assert snr_db(expected.float(), found.float()) > 35.0
