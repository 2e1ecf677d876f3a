"""FP8 bytes agree in export, file, engine and digest; loading rejects tensors that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infir2.config.schema import Fp8Section, ShapeSection
from infir2.errors import CheckpointError
from infir2.model import Decoder, write_hf
from infir2.model.hf_names import (
    exported_fp8_weights,
    exported_weights,
    load_weights,
    quantization_config,
    weights_digest,
)
from infir2.numerics import Fp8Linear, convert_to_fp8

SHAPE = ShapeSection(
    architecture="qwen2", hidden_size=96, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=200
)
STREAM = torch.arange(11), torch.arange(11), torch.tensor([0, 11])
KEPT = "model.layers.1.mlp.down_proj"


def make_model(tied: bool = True, fp8: Fp8Section | None = None, seed: int = 3) -> Decoder:
    model = Decoder.from_shape(
        SHAPE.model_copy(update={"tie_embeddings": tied}), vocab_size=50, seed=seed
    )
    return convert_to_fp8(model, fp8.scale_format, fp8.skip_modules) if fp8 else model


def write_fp8(directory: Path, model: Decoder, **changes: Any) -> Path:
    section = {**quantization_config(model), **changes}
    write_hf(
        directory,
        exported_fp8_weights(model),
        {**model.config.to_hf(), "quantization_config": section},
        max_shard_bytes=50_000,
    )
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
def test_trainer_file_and_engine_hold_the_same_bytes(
    tied: bool, scale_format: Any, tmp_path: Path
) -> None:
    trainer = make_model(tied, Fp8Section(scale_format=scale_format, skip_modules=(KEPT,)))
    engine = Decoder.from_hf(write_fp8(tmp_path / "fp8", trainer))
    assert weights_digest(exported_fp8_weights(engine)) == weights_digest(
        exported_fp8_weights(trainer)
    )
    kinds = {
        name: type(module)
        for name, module in engine.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert kinds.pop("lm_head", None) is (None if tied else torch.nn.Linear)
    assert kinds.pop(KEPT) is torch.nn.Linear
    assert set(kinds.values()) == {Fp8Linear}
    assert len(kinds) == 13
    assert torch.equal(engine(*STREAM), trainer(*STREAM))
    write_fp8(tmp_path / "again", engine)
    for path in (tmp_path / "fp8").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_sync_brings_an_engine_up_to_the_trainer() -> None:
    trainer, engine = make_model(fp8=Fp8Section()), make_model(fp8=Fp8Section(), seed=4)
    load_weights(engine, exported_fp8_weights(trainer))
    assert torch.equal(engine(*STREAM), trainer(*STREAM))
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(-1.5)
    assert not torch.equal(engine(*STREAM), trainer(*STREAM))
    load_weights(engine, exported_fp8_weights(trainer))
    assert torch.equal(engine(*STREAM), trainer(*STREAM))
    with pytest.raises(CheckpointError, match="no master"):
        list(exported_weights(engine))


def test_bf16_weights_are_rounded_masters_and_load_exactly() -> None:
    source, target = make_model(), make_model(seed=4)
    load_weights(target, exported_weights(source))
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.bfloat16().float())


def test_a_digest_sees_one_bit_the_dtype_and_the_shape() -> None:
    base = torch.zeros(4, 2)
    flipped = base.clone()
    flipped[0, 0] = -0.0
    variants = [base, flipped, base.view(2, 4), base.view(torch.int32)]
    digests = [weights_digest([("x", tensor)])["x"] for tensor in variants]
    assert len(set(digests)) == 4
    assert weights_digest([("x", base.t().contiguous().t())]) == weights_digest([("x", base)])


Pairs = dict[str, Tensor]
Q = "model.layers.0.self_attn.q_proj.weight"


def without(name: str) -> Any:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def replaced(name: str, tensor: Tensor) -> Any:
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm.weight"), "missing, such as model.norm.weight"),
        (without(Q), f"missing, such as {Q} .its codes or its scales"),
        (without(f"{Q}_scale_inv"), f"missing, such as {Q} .its codes or its scales"),
        (
            replaced("model.norm.weight", torch.ones(95)),
            r"shape \[95\], but the model needs \[96\]",
        ),
        (replaced("model.norm.weight", torch.ones(96, dtype=torch.int8)), "dtype torch.int8"),
        (
            replaced("model.layers.2.mlp.up_proj.weight", torch.ones(2)),
            "model.layers.2.mlp.up_proj.weight does not belong to the model",
        ),
        (
            replaced("model.norm.weight_scale_inv", torch.ones(1, 1)),
            "model.norm.weight_scale_inv belongs to an FP8 weight, but its layer is in high "
            "precision",
        ),
        (replaced(Q, torch.zeros(96, 95).to(torch.float8_e4m3fn)), f"{Q} cannot be loaded"),
        (replaced(f"{Q}_scale_inv", torch.ones(2, 1)), f"{Q} cannot be loaded"),
        (replaced(f"{Q}_scale_inv", torch.full((1, 1), 0.75)), "powers of two"),
        (replaced(f"{Q}_scale_inv", torch.zeros(1, 1)), f"{Q}_scale_inv .* not finite"),
        (replaced(f"{Q}_scale_inv", torch.full((1, 1), -1.0)), f"{Q}_scale_inv .* not finite"),
        (replaced(f"{Q}_scale_inv", torch.full((1, 1), torch.nan)), f"{Q}_scale_inv .* not fin"),
        (
            replaced(f"{Q}_scale_inv", torch.full((1, 1), torch.inf, dtype=torch.bfloat16)),
            f"{Q}_scale_inv .* not finite",
        ),
        (replaced(f"{Q}_scale_inv", torch.ones(1, 1, dtype=torch.int32)), "not a scale's"),
        (replaced(Q, torch.full((96, 96), torch.nan).to(torch.float8_e4m3fn)), f"{Q} has a NaN"),
        (replaced("lm_head.weight", torch.ones(50, 96)), "tie_word_embeddings"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change: Any, message: str) -> None:
    model = make_model(fp8=Fp8Section())
    tensors = change(dict(exported_fp8_weights(model)))
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tensors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_of_other_dtypes_load_with_their_values(dtype: torch.dtype) -> None:
    """Qwen3-FP8 stores weight_scale_inv in BF16, DeepSeek-V3.1 its exponents."""
    tensors = dict(exported_fp8_weights(make_model(fp8=Fp8Section())))
    stored = {
        name: tensor.to(dtype) if name.endswith("_scale_inv") else tensor
        for name, tensor in tensors.items()
    }
    model = make_model(fp8=Fp8Section())
    load_weights(model, stored.items())
    assert weights_digest(exported_fp8_weights(model)) == weights_digest(tensors.items())


def test_more_loading_rules() -> None:
    model = make_model(fp8=Fp8Section())
    tensors = dict(exported_fp8_weights(model))
    tied = [*tensors.items(), ("lm_head.weight", tensors["model.embed_tokens.weight"])]
    load_weights(model, [*tied, ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(12))])
    assert model.model.layers[0].self_attn.q_proj.weight is None  # it serves codes now
    with pytest.raises(CheckpointError, match="serves FP8 codes"):
        load_weights(model, exported_weights(make_model()))
    with pytest.raises(CheckpointError, match="occurs twice"):
        load_weights(make_model(), [("model.norm.weight", torch.ones(96))] * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method"),
        ({"activation_scheme": "static"}, "activation_scheme"),
        ({"weight_block_size": [64, 128]}, "weight_block_size"),
        ({"fmt": "e5m2"}, "fmt"),
        ({"scale_fmt": "int8"}, "scale_fmt"),
        ({"modules_to_not_convert": ["lm_head"]}, f"{KEPT} has no FP8 scales"),
        (
            {"modules_to_not_convert": ["lm_head", KEPT, "model.layers.0"]},
            "model.layers.0.self_attn.q_proj has FP8 scales",
        ),
    ],
)
def test_a_quantization_config_that_contradicts_the_files_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make_model(fp8=Fp8Section(skip_modules=(KEPT,)))
    with pytest.raises(CheckpointError, match=message):
        Decoder.from_hf(write_fp8(tmp_path / "fp8", model, **changes))


def test_an_fp8_section_needs_fp8_layers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fp8\.enabled"):
        quantization_config(make_model())
    directory = tmp_path / "bf16"
    write_hf(directory, exported_weights(make_model()), make_model().config.to_hf())
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"hidden_size": 64}))
    with pytest.raises(CheckpointError, match="has shape"):
        Decoder.from_hf(directory)
    (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": "fp8"}))
    with pytest.raises(CheckpointError, match="quantization_config must be an object"):
        Decoder.from_hf(directory)
