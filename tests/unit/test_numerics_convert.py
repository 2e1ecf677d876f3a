"""Conversion of whole modules: which layers become FP8, and that foreign models train."""

import copy
import fnmatch
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import infir2
from infir2.config.schema import Fp8Section, ModelSection, RunSection, ShapeSection
from infir2.errors import ConfigError
from infir2.numerics import Fp8Linear, convert_to_fp8, quantize, relative_error, snr_db
from infir2.numerics.convert import ReplacedParameter
from infir2.train.build import build_model


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
    convert_to_fp8(model, scale_format="fp32", skip_modules=("layers.0.*", "*.up_proj"))
    assert fp8_names(model) == ["layers.1.down_proj"]
    assert model.layers[1].down_proj.scale_format == "fp32"
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_a_recipe_without_fp8_builds_plain_layers() -> None:
    shape = ShapeSection(hidden_size=64, ffn_size=64, num_heads=2, num_kv_heads=2, num_layers=1)
    for enabled, expected in ((False, 0), (True, 7)):
        section = Fp8Section(enabled=enabled)
        run = RunSection(dir="unused", device="cpu")
        model = build_model(ModelSection(shape=shape), section, run, vocab_size=20)
        assert len(fp8_names(model)) == expected


def test_a_mistyped_pattern_is_an_error_and_converts_nothing() -> None:
    model = Model()
    with pytest.raises(ConfigError, match=r"layers\.7"):
        convert_to_fp8(model, skip_modules=("layers.7.*",))
    assert fp8_names(model) == []
    assert len(fp8_names(convert_to_fp8(model))) == 4


@pytest.mark.parametrize(
    ("patterns", "left"),
    [("layers.0.*", 2), (["layers.0"], 2), (["layers"], 0), (["lm_head"], 4), (["*.up_proj"], 2)],
)
def test_a_pattern_may_name_the_module_around_and_stand_alone(patterns: Any, left: int) -> None:
    assert len(fp8_names(convert_to_fp8(Model(), skip_modules=patterns))) == left


def test_a_pattern_that_names_no_linear_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'embed_tokens' matches no Linear .* 'layers\.0\.up_pr"):
        convert_to_fp8(Model(), skip_modules=("embed_tokens",))


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv1d(3, 3, 1)),
        nn.Sequential(Subclass(3, 3)),
        nn.ModuleDict({"lm_head": nn.Linear(3, 3)}),
    ],
)
def test_a_model_without_a_linear_to_convert_is_an_error(module: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"has no nn\.Linear besides heads"):
        convert_to_fp8(module)


def test_converting_twice_changes_nothing_and_another_format_is_refused() -> None:
    model = convert_to_fp8(Model())
    layers = [m for m in model.modules() if isinstance(m, Fp8Linear)]
    assert all(
        a is b
        for a, b in zip(convert_to_fp8(model).modules(), model.modules(), strict=True)
        if isinstance(a, Fp8Linear)
    )
    assert [m for m in model.modules() if isinstance(m, Fp8Linear)] == layers
    with pytest.raises(ConfigError, match="FP8 already, with scale_format='pow2'"):
        convert_to_fp8(model, scale_format="fp32")


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to": lambda model: model.to(dtype=torch.bfloat16),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_of_the_model_keeps_the_masters_and_says_so(name: str) -> None:
    model = convert_to_fp8(Model())
    masters = [p for m in model.modules() if isinstance(m, Fp8Linear) for p in m.parameters()]
    before = [master.detach().clone() for master in masters]
    with pytest.warns(UserWarning, match="FP8 layers keep their FP32 masters"):
        CONVERSIONS[name](model)
    assert all(torch.equal(a, b) for a, b in zip(masters, before, strict=True))
    assert {master.dtype for master in masters} == {torch.float32}
    assert model.embed_tokens.weight.dtype != torch.float32
    assert all(m.weight.is_meta for m in model.to("meta").modules() if isinstance(m, Fp8Linear))


def test_loading_tensors_of_another_dtype_by_assignment_makes_fp32_masters() -> None:
    model, values = convert_to_fp8(Model()), Model().bfloat16().state_dict()
    model.load_state_dict(values, assign=True)
    layer = model.layers[0].up_proj
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    assert torch.equal(layer.weight, values["layers.0.up_proj.weight"].float())
    assert model.embed_tokens.weight.dtype == values["layers.0.up_proj.weight"].dtype


def test_a_single_linear_and_meta_parameters() -> None:
    assert isinstance(convert_to_fp8(nn.Linear(4, 4)), Fp8Linear)
    with torch.device("meta"):
        model = Model()
    convert_to_fp8(model)
    assert model.layers[0].up_proj.weight.is_meta


def test_a_layer_used_twice_stays_one_layer() -> None:
    model = Model()
    model.layers[1].up_proj = model.layers[0].up_proj
    convert_to_fp8(model)
    assert isinstance(model.layers[0].up_proj, Fp8Linear)
    assert model.layers[1].up_proj is model.layers[0].up_proj


def test_sixteen_bit_models_get_fp32_masters() -> None:
    model = convert_to_fp8(Model().bfloat16())
    layer = model.layers[0].up_proj
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    assert model.embed_tokens.weight.dtype == torch.bfloat16


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "AdamW foreach": partial(torch.optim.AdamW, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, fused=True),
    "SGD": torch.optim.SGD,
    "SGD foreach": partial(torch.optim.SGD, foreach=True),
    "SGD fused": partial(torch.optim.SGD, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("call", ["step", "zero_grad"])
def test_an_optimizer_built_before_its_parameters_were_replaced_raises(
    name: str, call: str
) -> None:
    model = Model().bfloat16()
    optimizer = OPTIMIZERS[name](model.parameters())
    convert_to_fp8(model)
    model.layers[0].up_proj(torch.randn(3, 8)).sum().backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"build the optimizer .* after convert_to_fp8"):
            getattr(optimizer, call)()
    after = OPTIMIZERS[name](model.parameters())
    before = model.layers[0].up_proj.weight.detach().clone()
    after.step()
    after.zero_grad()
    assert not torch.equal(before, model.layers[0].up_proj.weight)


def test_an_optimizer_over_a_single_replaced_linear_raises() -> None:
    layer = nn.Linear(8, 16).bfloat16()
    optimizer = torch.optim.SGD(layer.parameters())
    convert_to_fp8(layer)
    with pytest.raises(RuntimeError, match="after convert_to_fp8"):
        optimizer.step()


def test_an_optimizer_over_shared_fp32_parameters_keeps_training_them() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    convert_to_fp8(model)
    before = model.layers[0].up_proj.weight.detach().clone()
    model.layers[0].up_proj(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.layers[0].up_proj.weight)


def test_parameters_that_stay_in_the_model_are_not_marked_as_replaced() -> None:
    model = Model().bfloat16()
    convert_to_fp8(model, skip_modules=("layers.0.*",))
    kept = [model.embed_tokens.weight, model.output.weight, model.layers[0].up_proj.weight]
    assert kept[0] is kept[1]
    for parameter in kept:
        assert type(parameter) is nn.Parameter
        assert parameter.grad is None


def test_linears_that_share_a_sixteen_bit_weight_still_share_their_master() -> None:
    model = Model().bfloat16()
    model.layers[1].up_proj.weight = model.layers[0].up_proj.weight
    convert_to_fp8(model)
    assert model.layers[1].up_proj.weight is model.layers[0].up_proj.weight
    assert model.layers[1].up_proj.bias is not model.layers[0].up_proj.bias


def test_a_replaced_parameter_frees_its_memory_and_a_copy_of_the_model_trains() -> None:
    model = Model().bfloat16()
    old = model.layers[0].up_proj.weight
    storage = StorageWeakRef(old.untyped_storage())
    convert_to_fp8(model)
    assert storage.expired()
    assert isinstance(old, ReplacedParameter)
    twin = copy.deepcopy(model)
    assert {type(parameter) for parameter in twin.parameters()} == {nn.Parameter}
    twin.layers[0].up_proj(torch.randn(3, 8)).sum().backward()
    torch.optim.AdamW(twin.parameters(), fused=True).step()


def test_the_package_offers_the_conversion_without_importing_torch() -> None:
    code = (
        "import sys, infir2; assert 'torch' not in sys.modules\n"
        "from infir2 import convert_to_fp8, Fp8Linear; print(convert_to_fp8.__module__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "infir2.numerics.convert"
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(infir2, "no_such_name")  # noqa: B009
    assert {"convert_to_fp8", "Fp8Linear"} <= set(dir(infir2))


def test_type_checkers_know_the_names_that_the_package_imports_late() -> None:
    stub = Path(infir2.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    assert {*re.findall(r"import (\w+) as", stub), "__version__"} == set(infir2.__all__)


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
    convert_to_fp8(model)
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
