"""Conversion of whole modules: which layers become FP8, and that foreign models train."""

import fnmatch
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from infir2.config.schema import Fp8Section
from infir2.errors import ConfigError
from infir2.numerics import Fp8Linear, convert_to_fp8, quantize, relative_error, snr_db


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.output = nn.Linear(8, 10, bias=False)
        self.output.weight = self.embed_tokens.weight
        self.lm_head = nn.Linear(8, 10)


def fp8_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, Fp8Linear)]


def test_heads_and_listed_modules_stay_in_skip_modules() -> None:
    model = Model()
    parameters = dict(model.named_parameters())
    convert_to_fp8(model, Fp8Section(scale_format="fp32", skip_modules=("layers.0.*", "*.up_proj")))
    assert fp8_names(model) == ["layers.1.down_proj"]
    assert model.layers[1].down_proj.scale_format == "fp32"
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_disabled_changes_nothing_and_a_mistyped_pattern_is_an_error() -> None:
    model = Model()
    assert fp8_names(convert_to_fp8(model, Fp8Section(enabled=False))) == []
    with pytest.raises(ConfigError, match=r"layers\.7"):
        convert_to_fp8(model, Fp8Section(skip_modules=("layers.7.*",)))
    assert fp8_names(model) == []
    assert len(fp8_names(convert_to_fp8(model, Fp8Section()))) == 4


def test_a_single_linear_and_meta_parameters() -> None:
    assert isinstance(convert_to_fp8(nn.Linear(4, 4), Fp8Section()), Fp8Linear)
    with torch.device("meta"):
        model = Model()
    convert_to_fp8(model, Fp8Section())
    assert model.layers[0].up_proj.weight.is_meta


def test_a_layer_used_twice_stays_one_layer() -> None:
    model = Model()
    model.layers[1].up_proj = model.layers[0].up_proj
    convert_to_fp8(model, Fp8Section())
    assert isinstance(model.layers[0].up_proj, Fp8Linear)
    assert model.layers[1].up_proj is model.layers[0].up_proj


def test_sixteen_bit_models_get_fp32_masters() -> None:
    model = convert_to_fp8(Model().bfloat16(), Fp8Section())
    layer = model.layers[0].up_proj
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    assert model.embed_tokens.weight.dtype == torch.bfloat16


@dataclass(frozen=True)
class OwnConfig:
    enabled: bool = True
    scale_format: str = "pow2"
    skip_modules: tuple[str, ...] = ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_a_hugging_face_model_trains(dtype) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
    }
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, **shape)).to(dtype)
    token_ids = torch.randint(0, 96, (2, 24))
    reference = model(token_ids).logits.float()
    convert_to_fp8(model, OwnConfig())
    assert len(fp8_names(model)) == 14
    assert not fnmatch.filter(fp8_names(model), "*lm_head*")
    assert 15 < snr_db(reference, model(token_ids).logits.float()) < 60
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, fused=True
    )  # which moves no version counter
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    losses = []
    for _ in range(12):
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in layers:
            fresh = quantize(layer.weight.detach().bfloat16(), (128, 128))
            assert torch.equal(
                layer.quantized_weight().codes.view(torch.uint8), fresh.codes.view(torch.uint8)
            )
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0


def test_error_measures() -> None:
    reference = torch.ones(100)
    assert relative_error(reference, reference) == 0.0
    assert snr_db(reference, reference) == float("inf")
    assert snr_db(reference, reference * 1.1) == pytest.approx(20.0, abs=1e-4)
    assert relative_error(torch.zeros(2), torch.ones(2)) == float("inf")
