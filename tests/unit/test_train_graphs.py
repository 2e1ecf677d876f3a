"""Where `train.cuda_graphs` is refused, and where it changes nothing (tests/gpu has the graphs)."""

import pytest
import torch

from infir2.config.schema import OptimizerSection, RlRecipe, ShapeSection, TrainRecipe
from infir2.data import Batch
from infir2.errors import ConfigError
from infir2.model import Decoder
from infir2.numerics import convert_to_fp8
from infir2.parallel.mesh import Sizes
from infir2.preflight.parallel import speed_notes
from infir2.train.losses import next_token_loss
from infir2.train.plan import check_graphs, uses_graphs
from infir2.train.trainer import Trainer

SECTIONS = {"schedule": {"learning_rate": 1e-3}, "train": {"cuda_graphs": True}}


def test_graphs_need_a_whole_model_on_each_gpu() -> None:
    recipe = TrainRecipe.model_validate(SECTIONS)
    check_graphs(recipe, Sizes())
    check_graphs(recipe, Sizes(dp_replicate=4))
    for sizes in (Sizes(dp=2), Sizes(tp=2), Sizes(cp=2), Sizes(dp_replicate=2, dp=2)):
        with pytest.raises(ConfigError, match="dp_replicate"):
            check_graphs(recipe, sizes)


def test_auto_takes_graphs_where_they_pay() -> None:
    recipe = TrainRecipe.model_validate({"schedule": {"learning_rate": 1e-3}})
    assert uses_graphs(recipe, Sizes(dp_replicate=4), 500_000_000)
    assert not uses_graphs(recipe, Sizes(), 1_500_000_000)
    for sizes in (Sizes(dp=2), Sizes(tp=2), Sizes(cp=2)):
        check_graphs(recipe, sizes)
        assert not uses_graphs(recipe, sizes, 135_000_000)
    rl = RlRecipe.model_validate({"schedule": {"learning_rate": 1e-3}})
    check_graphs(rl, Sizes())
    assert not uses_graphs(rl, Sizes(), 135_000_000)
    always = TrainRecipe.model_validate(SECTIONS)
    assert uses_graphs(always, Sizes(), 7_000_000_000)


def test_graphs_are_not_for_rl() -> None:
    with pytest.raises(ConfigError, match="is for cpt and sft"):
        check_graphs(RlRecipe.model_validate(SECTIONS), Sizes())


def test_a_cpu_computes_as_without() -> None:
    ids = torch.arange(128) % 50
    mask = torch.arange(128) < 127
    batch = Batch(ids, torch.arange(128), ids.roll(-1) * mask, mask, torch.tensor([0, 128]))
    losses = []
    for graph_tokens in (0, 128):
        shape = ShapeSection(
            hidden_size=128, num_layers=1, num_heads=2, num_kv_heads=2, ffn_size=128
        )
        model = convert_to_fp8(Decoder.from_shape(shape, 50, seed=0))
        trainer = Trainer(model, OptimizerSection(), 64, graph_tokens=graph_tokens)
        losses.append([trainer.step([batch], next_token_loss, 1e-3).loss for _ in range(4)])
    assert losses[0] == losses[1]


def test_check_says_what_makes_a_small_model_faster() -> None:
    recipe = TrainRecipe.model_validate({"schedule": {"learning_rate": 1e-3}})
    assert ["FP8 makes no model" in note for note in speed_notes(recipe, 135_000_000, Sizes())]
    off = TrainRecipe.model_validate(SECTIONS | {"train": {"cuda_graphs": False}})
    small = speed_notes(off, 135_000_000, Sizes())
    assert ["FP8 makes no model" in note or "cuda_graphs" in note for note in small] == [True] * 2
    assert len(speed_notes(off, 500_000_000, Sizes(dp=2))) == 1
    assert not speed_notes(off, 1_500_000_000, Sizes())
