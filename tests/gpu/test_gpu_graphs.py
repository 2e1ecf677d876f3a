"""Training with CUDA graphs has the bits of training without."""

from collections.abc import Iterator

import pytest
import torch

from infir2.config.schema import OptimizerSection, ShapeSection
from infir2.data import Batch
from infir2.model import Decoder
from infir2.numerics import convert_to_fp8
from infir2.train.losses import next_token_loss
from infir2.train.trainer import Trainer

TOKENS = 1024
SHAPE = ShapeSection(hidden_size=512, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=1024)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def batch(number: int, tokens: int = TOKENS) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 1000, (tokens,), generator=generator)
    cuts = sorted({0, tokens, *torch.randint(1, tokens, (5,), generator=generator).tolist()})
    bounds = torch.tensor(cuts)
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff())
    return Batch(
        token_ids=ids,
        positions=torch.arange(tokens) - starts,
        labels=ids.roll(-1),
        loss_mask=torch.rand(tokens, generator=generator) < 0.8,
        cu_seqlens=bounds,
    )


def trained(
    fp8: str, graph_tokens: int, recompute: str, sizes: tuple[int, ...]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = Decoder.from_shape(SHAPE, 1024, seed=0, device="cuda")
    model.recompute = recompute
    if fp8:
        model = convert_to_fp8(model, fp8)
    trainer = Trainer(model, OptimizerSection(), 512, graph_tokens=graph_tokens)
    losses = []
    for step in range(6):
        batches = [batch(10 * step + i, size) for i, size in enumerate(sizes)]
        losses.append(trainer.step(batches, next_token_loss, 1e-3).loss)
        losses.append(trainer.mean_loss([batch(900)]))
    graphs = model.block_graphs
    assert graph_tokens == 0 or (graphs is not None and graphs._pairs)
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("fp8", ["", "pow2", "fp32"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("sizes", [(TOKENS,), (TOKENS, TOKENS, TOKENS), (TOKENS, 300)])
def test_the_bits_are_those_without_graphs(
    fp8: str, recompute: str, sizes: tuple[int, ...]
) -> None:
    losses, weights = trained(fp8, 0, recompute, sizes)
    # a batch of 300 tokens runs eagerly and adds to the graphs' gradients
    of_graphs, weights_of_graphs = trained(fp8, TOKENS, recompute, sizes)
    assert of_graphs == losses
    for name, weight in weights.items():
        assert torch.equal(weights_of_graphs[name], weight), name


def test_padding_changes_sums_only() -> None:
    losses, _ = trained("pow2", 0, "none", (900, 1000))
    of_graphs, _ = trained("pow2", TOKENS, "none", (900, 1000))
    assert of_graphs == pytest.approx(losses, rel=2e-3)
