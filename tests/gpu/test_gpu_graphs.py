"""Training with CUDA graphs has the bits of training without."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install 'infir2[gpu]')")

from infir2.config.schema import OptimizerSection, ShapeSection
from infir2.data import Batch
from infir2.model import Decoder, block_graphs
from infir2.model.block_graphs import BlockGraphs
from infir2.numerics import convert_to_fp8, relative_error
from infir2.numerics.gemm_scaled import missing_block_scaling
from infir2.numerics.kernels import usable
from infir2.train.losses import next_token_loss
from infir2.train.trainer import Trainer

hopper = (
    torch.cuda.is_available()
    and usable(torch.device("cuda"))
    and missing_block_scaling(torch.device("cuda")) is None
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper, reason="needs a Hopper GPU"),
    pytest.mark.filterwarnings("error:training without CUDA graphs"),
]
TOKENS = 1024
SHAPE = ShapeSection(hidden_size=512, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=1024)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def batch(number: int, tokens: int = TOKENS, sequences: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 1000, (tokens,), generator=generator)
    inner = torch.randperm(tokens - 1, generator=generator)[: sequences - 1] + 1
    cuts = sorted({0, tokens, *inner.tolist()})
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
    fp8: str, graph_tokens: int, recompute: str, sizes: tuple[int, ...], later: int = 6
) -> tuple[list[float], dict[str, torch.Tensor], Decoder]:
    """Losses and weights after six steps of batches of `sizes`, from the fourth on of `later`
    sequences each."""
    model = Decoder.from_shape(SHAPE, 1024, seed=0, device="cuda")
    model.recompute = recompute
    if fp8:
        model = convert_to_fp8(model, fp8)
    trainer = Trainer(model, OptimizerSection(), 512, graph_tokens=graph_tokens)
    losses = []
    for step in range(6):
        sequences = 6 if step < 3 else later
        batches = [batch(10 * step + i, size, sequences) for i, size in enumerate(sizes)]
        losses.append(trainer.step(batches, next_token_loss, 1e-3).loss)
        losses.append(trainer.mean_loss([batch(900)]))
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}, model


@pytest.mark.parametrize("fp8", ["", "pow2", "fp32"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("sizes", [(TOKENS,), (TOKENS, TOKENS, TOKENS), (TOKENS, 300, TOKENS)])
def test_the_bits_are_those_without_graphs(
    fp8: str, recompute: str, sizes: tuple[int, ...]
) -> None:
    losses, weights, _ = trained(fp8, 0, recompute, sizes)
    # a batch of 300 tokens runs eagerly and adds to the graphs' gradients
    of_graphs, weights_of_graphs, model = trained(fp8, TOKENS, recompute, sizes)
    assert model.block_graphs is not None
    assert len(model.block_graphs._pairs) == min(2, len(sizes))
    assert of_graphs == losses
    for name, weight in weights.items():
        assert torch.equal(weights_of_graphs[name], weight), name


@pytest.mark.parametrize("later", [6, 63, 64])  # with their padding 7, 64 and 65, which do not fit
def test_padding_changes_sums_only(later: int) -> None:
    losses, weights, _ = trained("pow2", 0, "none", (900, 1000), later)
    of_graphs, weights_of_graphs, _ = trained("pow2", TOKENS, "none", (900, 1000), later)
    assert of_graphs == pytest.approx(losses, rel=2e-3)
    for name, weight in weights.items():
        assert relative_error(weight, weights_of_graphs[name]) < 2e-2, name


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_padding_has_the_same_bits_without_a_capture(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as after a resume, whose first micro-batches run eagerly
    losses, weights, model = trained("pow2", TOKENS, recompute, (900, 1000, 300))
    assert model.block_graphs is not None
    assert len(model.block_graphs._pairs) == 2
    monkeypatch.setattr(block_graphs, "_EAGER_BATCHES", 1000)
    eager, weights_of_eager, model = trained("pow2", TOKENS, recompute, (900, 1000, 300))
    assert model.block_graphs is not None
    assert not model.block_graphs._pairs
    assert eager == losses
    for name, weight in weights.items():
        assert torch.equal(weights_of_eager[name], weight), name


def test_a_failed_capture_leaves_what_eager_steps_need(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, weights, _ = trained("pow2", 0, "none", (TOKENS, TOKENS))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no capture here")

    monkeypatch.setattr(BlockGraphs, "_recording", fail)
    with pytest.warns(UserWarning, match="without CUDA graphs: no capture here"):
        of_graphs, weights_of_graphs, _ = trained("pow2", TOKENS, "none", (TOKENS, TOKENS))
    assert of_graphs == losses
    assert all(torch.equal(weights_of_graphs[name], weight) for name, weight in weights.items())
