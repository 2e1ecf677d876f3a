"""Sharded models on one GPU: FSDP2 over one NCCL rank, and two ranks that share the GPU.

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

from infir2.checkpoint import Store, open_checkpoint
from infir2.checkpoint.background import BackgroundSaver
from infir2.config.schema import OptimizerSection, ShapeSection
from infir2.data import Batch
from infir2.model import Decoder
from infir2.numerics import snr_db
from infir2.numerics.gemm_scaled import missing_block_scaling
from infir2.numerics.kernels import usable
from infir2.parallel.context import attend_to_prefix
from infir2.train.losses import next_token_loss
from infir2.train.trainer import Trainer

hopper = (
    torch.cuda.is_available()
    and usable(torch.device("cuda"))
    and missing_block_scaling(torch.device("cuda")) is None
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper, reason="block-scaled FP8 GEMMs need a Hopper GPU"),
]
ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("one") / "found.json"
    run_python(str(ROOT / "tests/gpu/one_gpu.py"), str(out))
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_a_model_sharded_over_one_rank_trains_like_unsharded(
    one_rank: dict[str, Any], name: str
) -> None:
    """The backward of attention sums in no fixed order, so losses agree but are not bit-equal."""
    result = one_rank[name]
    assert result["codes_equal"]
    assert result["weights"] == (21 if name == "fp8" else 0)
    assert result["sharded"][0] == pytest.approx(result["unsharded"][0], abs=1e-5)
    assert result["sharded"] == pytest.approx(result["unsharded"], rel=2e-3)
    assert result["resumed"] == pytest.approx(result["sharded"][3:], rel=2e-3)


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_the_host_waits_once_in_a_step(one_rank: dict[str, Any], name: str) -> None:
    assert one_rank[name]["synchronizations"] == {"dp": 1, "tp": 1, "cp": 1}


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_a_model_split_over_one_rank_trains_like_unsplit(
    one_rank: dict[str, Any], name: str
) -> None:
    for kind in ("tp", "cp"):
        assert one_rank[name][kind][0] == pytest.approx(one_rank[name]["unsharded"][0], rel=1e-3)
        assert one_rank[name][kind] == pytest.approx(one_rank[name]["unsharded"], rel=1e-2)


def test_layouts_of_two_ranks_on_one_gpu(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    run_python(
        str(ROOT / "bench/scale.py"),
        "--tiny",
        "--share-gpu",
        "--gpus",
        "2",
        "--sections",
        "equality,overlap",
        "--out",
        str(out),
    )
    result = json.loads(out.read_text(encoding="utf-8"))
    equality = result["equality: equality"]
    assert "failed" not in equality, equality["failed"]
    for layout in ("dp2", "tp2", "cp2"):
        assert equality[f"FP8 {layout}"]["bytes equal on all ranks"], layout
        for kind in ("FP8", "BF16"):
            row = equality[f"{kind} {layout}"]
            assert row["largest difference"] < 0.02, layout
            assert row["losses"][0] == pytest.approx(
                equality[f"{kind} single process"][0], rel=1e-3
            ), (
                kind,
                layout,
            )
            assert row["decibels of the first gradient"] > 25, (kind, layout)
    assert "failed" not in result["overlap: 8 blocks of 7B"], result


@pytest.mark.parametrize("background", [False, True])
def test_a_save_right_after_a_step_has_the_offloaded_moments_of_that_step(
    tmp_path: Path, background: bool
) -> None:
    shape = ShapeSection(
        hidden_size=256, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=128, ffn_size=512
    )
    trainer = Trainer(
        Decoder.from_shape(shape, vocab_size=64, seed=1, device="cuda"),
        OptimizerSection(offload=True),
        256,
    )
    # About half a second, so the update is still pending when the step returns.
    trainer.before_update = lambda: torch.cuda._sleep(10**9)
    ids, bounds = torch.arange(128) % 64, torch.tensor([0, 128], dtype=torch.int32)
    for _ in range(2):
        trainer.step(
            [Batch(ids, torch.arange(128), ids, torch.ones(128, dtype=torch.bool), bounds)],
            next_token_loss,
            1e-3,
        )
    store = Store(tmp_path)
    if background:
        saver = BackgroundSaver(store.save)
        saver.start(2, trainer.tensors(), {}).result()
        saver.close()
    else:
        store.save(2, trainer.tensors(), {})
    torch.cuda.synchronize()
    saved = open_checkpoint(tmp_path).tensors()
    for name, tensor in trainer.tensors().items():
        assert torch.equal(saved[name], tensor.cpu()), name


def test_attention_to_a_prefix_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(n, heads, 128, generator=generator).bfloat16().cuda().requires_grad_()
        for n, heads in ((256, 8), (640, 2), (640, 2))
    )

    def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        wide_q, wide_k, wide_v = (
            q.double() * 128**-0.5,
            k.double().repeat_interleave(4, 1),
            v.double().repeat_interleave(4, 1),
        )
        masked = torch.ones(256, 640, dtype=torch.bool, device="cuda").triu(640 - 256 + 1)
        weights = (
            torch.einsum("nah,mah->anm", wide_q, wide_k).masked_fill(masked, -torch.inf).softmax(-1)
        )
        return torch.einsum("anm,mah->nah", weights, wide_v).to(q.dtype)

    results = []
    for function in (lambda q, k, v: attend_to_prefix(q, k, v, None), definition):
        out = function(q, k, v)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for actual, expected in zip(*results, strict=True):
        assert snr_db(expected.float(), actual.float()) > 35.0
