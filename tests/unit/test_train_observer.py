"""train.observe_every: measures in closed form, the same bits of training, one line per layer."""

import json
import math
from pathlib import Path

import pytest
import torch

from infir2.cli import main
from infir2.config.schema import ShapeSection
from infir2.data import Batch
from infir2.errors import ConfigError
from infir2.model import Decoder
from infir2.numerics import convert_to_fp8, nonfinite_blocks, quantize
from infir2.numerics.observed import MEASURES, measure
from infir2.train.observer import first_tokens, observe
from infir2.train.trainer import score_batch

SHAPE = ShapeSection(
    hidden_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=136
)
LAYERS = [f"self_attn.{letter}_proj" for letter in "qkvo"]
LAYERS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def measured(x: torch.Tensor, scale_format: str = "pow2") -> dict[str, float]:
    values = measure(x, quantize(x, (1, 128), scale_format)).tolist()
    return dict(zip(MEASURES, values, strict=True))


def test_exact_values_have_no_error() -> None:
    x = torch.tensor([[448.0, -448.0, 1.0, 0.0] * 32])
    found = measured(x)  # amax / 448 = 1: each value is its code
    assert found["relative_error"] == 0
    assert found["underflow"] == 0
    assert found["cosine"] == pytest.approx(1, abs=1e-15)
    assert found["saturation"] == 0.5


def test_underflow_and_error_in_closed_form() -> None:
    # scale 1; 2**-10 is half of the smallest subnormal and rounds to even, to 0; 17 rounds to 16
    x = torch.zeros(1, 128)
    x[0, 0], x[0, 1:4], x[0, 4] = 448.0, 2.0**-10, 17.0
    found = measured(x)
    norm = math.sqrt(448**2 + 3 * 2**-20 + 17**2)
    assert found["underflow"] == pytest.approx(3 / 5)
    assert found["saturation"] == pytest.approx(1 / 128)
    assert found["relative_error"] == pytest.approx(math.sqrt(1 + 3 * 2**-20) / norm)
    dot = 448**2 + 16 * 17
    assert found["cosine"] == pytest.approx(dot / (math.sqrt(448**2 + 16**2) * norm))


def test_a_pow2_scale_is_rounded_up_and_so_saturates_less() -> None:
    x = torch.full((2, 128), 3.0)  # 3 / 448 is no power of two: the codes are 384
    assert measured(x)["saturation"] == 0
    assert measured(x, "fp32")["saturation"] == 1


def test_kurtosis_in_closed_form() -> None:
    two_values = torch.tensor([[5.0, -1.0] * 64])  # symmetric about 2: kurtosis 1
    assert measured(two_values)["kurtosis"] == pytest.approx(1)
    spike = torch.zeros(1, 128)
    spike[0, 0] = 1.0  # one of n with probability p: (1 - 3 p q) / (p q)
    p, q = 1 / 128, 127 / 128
    assert measured(spike)["kurtosis"] == pytest.approx((1 - 3 * p * q) / (p * q))


def test_a_tensor_of_zeros_has_no_defined_error() -> None:
    found = measured(torch.zeros(2, 128))
    assert math.isnan(found["relative_error"])
    assert found["saturation"] == 0


def batch(lengths: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor(lengths).cumsum(0)
    mask = torch.ones(len(ids), dtype=torch.bool)
    mask[ends - 1] = False
    labels = torch.where(mask, ids.roll(-1), 0)
    return Batch(ids, positions, labels, mask, torch.cat([torch.zeros(1), ends]).int())


def test_every_layer_has_a_row_and_operands_that_fp8_holds_well() -> None:
    model = convert_to_fp8(Decoder.from_shape(SHAPE, vocab_size=61, seed=3), "pow2")
    rows = observe(model, [batch([30, 50])], "pow2", 16)
    assert [row["layer"] for row in rows] == [
        f"model.layers.{number}.{name}" for number in range(2) for name in LAYERS
    ]
    for row in rows:
        assert row["fp8"]
        for operand in ("activation", "weight", "gradient"):
            assert 0.01 < row[f"{operand}_relative_error"] < 0.05, (row["layer"], operand)
            assert row[f"{operand}_cosine"] > 0.998
            assert row[f"{operand}_kurtosis"] > 1
    assert rows[4]["activation_cosine"] == rows[5]["activation_cosine"]  # gate and up share x


def test_the_observed_gradient_is_that_of_the_layers_output() -> None:
    """The kurtosis of the last layer's output gradient, from autograd alone."""
    model = Decoder.from_shape(SHAPE, vocab_size=61, seed=3, compute_dtype=torch.float32)
    data = batch([30, 50])
    rows = observe(model, [data], "pow2", 16)
    states: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    logprobs = score_batch(model, data, 1.0, 16).logprobs
    gradient = torch.autograd.grad(-logprobs.sum() / len(logprobs), states[0])[0].double()
    central = gradient - gradient.mean()
    expected = float(central.pow(4).mean() / central.pow(2).mean() ** 2)
    assert rows[-1]["layer"].endswith("1.mlp.down_proj")
    assert not rows[-1]["fp8"]
    assert rows[-1]["gradient_kurtosis"] == pytest.approx(expected, rel=1e-4)


def test_observing_changes_no_gradient_weight_random_state_or_count() -> None:
    model = convert_to_fp8(Decoder.from_shape(SHAPE, vocab_size=61, seed=3))
    model.model.layers[0].self_attn.q_proj.bias.data[0] = math.nan  # blocks that are not finite
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan  # counted by the step itself
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    nonfinite_blocks.take(torch.device("cpu"))
    quantize(torch.full((1, 128), math.inf))
    observe(model, [batch([30])], "pow2", 16)
    assert int(nonfinite_blocks.take(torch.device("cpu"))) == 2
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name


def test_the_first_tokens_of_a_batch_end_in_the_middle_of_a_sequence() -> None:
    cut = first_tokens(batch([30, 50]), 40)
    assert cut.cu_seqlens.tolist() == [0, 30, 40]
    assert len(cut.token_ids) == 40
    assert first_tokens(batch([30, 50]), 30).cu_seqlens.tolist() == [0, 30]
    assert first_tokens(batch([30, 50]), 4096).cu_seqlens.tolist() == [0, 30, 80]


def test_tokens_without_a_label_are_not_observed() -> None:
    data = batch([1])
    assert not data.num_trained_tokens
    assert observe(Decoder.from_shape(SHAPE, 61, seed=3), [data], "pow2", 16) == []


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    from infir2.demo.tokenizer import build_vocabulary, write_tokenizer

    text = "one two three four five six seven eight nine ten " * 30
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": text}) + "\n") * 8)
    write_tokenizer(tmp_path / "tokenizer", build_vocabulary([text]))
    path = recipe(
        tmp_path,
        f"""
[model.shape]
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
ffn_size = 64
[data]
tokenizer = "{tmp_path}/tokenizer"
sequence_tokens = 64
micro_batch_tokens = 128
batch_sequences = 2
sources = [{{path = "{tmp_path}/text.jsonl"}}]
[schedule]
learning_rate = 1e-3
total_steps = 6
[train]
validate_every = 0
[checkpoint]
save_every = 3
""",
    )
    return ["cpt", str(path), "--run.threads=1", "--run.device=cpu"]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_trains_the_same_bits_and_a_resumed_one_keeps_each_line_once(
    run: list[str], tmp_path: Path
) -> None:
    assert main([*run, f"--run.dir={tmp_path}/plain"]) == 0
    watched = [*run, f"--run.dir={tmp_path}/watched", "--train.observe_every=2"]
    assert main([*watched, "--train.stop_after_step=5"]) == 0
    assert main(watched) == 0
    losses = [
        [
            (row["loss"], row["gradient_norm"])
            for row in lines(tmp_path / name / "metrics.jsonl")
            if row["kind"] == "train"
        ]
        for name in ("plain", "watched")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    rows = lines(tmp_path / "watched/operands.jsonl")
    assert [row["step"] for row in rows] == [step for step in (2, 4, 6) for _ in range(14)]
    assert not (tmp_path / "plain/operands.jsonl").exists()


def test_several_processes_are_refused() -> None:
    from infir2.config.schema import TrainRecipe
    from infir2.parallel.mesh import Sizes
    from infir2.train.plan import check_observer

    section = TrainRecipe.model_validate(
        {"schedule": {"learning_rate": 1e-3}, "train": {"observe_every": 5}}
    )
    check_observer(section, Sizes(dp=1))
    with pytest.raises(ConfigError, match=r"train\.observe_every needs one process, not 2"):
        check_observer(section, Sizes(dp=2))
