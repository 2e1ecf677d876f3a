"""Small and offloaded moments of a sharded model: training, saving and resuming."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from infir2.checkpoint import Store, open_checkpoint
from infir2.config.schema import OptimizerSection, ShapeSection
from infir2.data import Batch
from infir2.errors import ConfigError
from infir2.model import Decoder
from infir2.parallel.mesh import Layout, Sizes
from infir2.parallel.parallel_model import ParallelModel
from infir2.parallel.ranks import Ranks
from infir2.train.losses import next_token_loss
from infir2.train.plan import check_optimizer
from infir2.train.trainer import Trainer

SHAPE = ShapeSection(
    hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=96
)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def make(section: OptimizerSection, parallel_model: bool) -> Trainer:
    model = Decoder.from_shape(SHAPE, vocab_size=31, seed=1)
    layout = Layout(Sizes(), Ranks(), torch.device("cpu"))
    if parallel_model:
        layout.shard_mesh = init_device_mesh("cpu", (1,))
    return Trainer(model, section, 64, ParallelModel(model, layout))


def losses(trainer: Trainer, steps: range) -> list[float]:
    found = []
    for step in steps:
        ids = torch.randint(0, 31, (40,), generator=torch.Generator().manual_seed(step))
        batch = Batch(
            ids,
            torch.arange(40),
            ids.roll(-1),
            torch.ones(40, dtype=torch.bool),
            torch.tensor([0, 40], dtype=torch.int32),
        )
        found.append(trainer.step([batch], next_token_loss, 1e-2).loss)
    return found


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("keys", [{"moment_dtype": "bf16"}, {"offload": True}])
def test_a_sharded_model_trains_with_them_and_resumes(keys: dict, tmp_path: Path) -> None:
    section = OptimizerSection(**keys)
    expected = losses(make(section, parallel_model=False), range(6))
    trainer = make(section, parallel_model=True)
    assert losses(trainer, range(3)) == expected[:3]
    path = Store(tmp_path / "run").save(3, trainer.tensors(), {})
    again = make(section, parallel_model=True)
    again.load_tensors(open_checkpoint(path).tensors())
    assert losses(again, range(3, 6)) == expected[3:]


@pytest.mark.parametrize("keys", [{"moment_dtype": "fp8"}, {"grad_dtype": "bf16"}])
def test_keys_that_need_one_process_are_refused(keys: dict) -> None:
    with pytest.raises(ConfigError, match="need one process"):
        check_optimizer(SimpleNamespace(optimizer=OptimizerSection(**keys)), Sizes(dp=2))
