"""FP8 exports that inference servers load: merged layers, a run's own settings."""

import json
from pathlib import Path

import pytest
import torch
from test_convert_export import make_run, read, skip_logits  # noqa: F401 (fixtures)

from infir2.cli import main
from infir2.config.schema import Fp8Section, ShapeSection
from infir2.convert import export_fp8, export_hf, verify_weights
from infir2.convert.serving import require_loadable, require_servable, unservable_layers
from infir2.errors import ConfigError
from infir2.model import Decoder

SIZES = {"hidden_size": 256, "num_layers": 2, "num_heads": 4, "ffn_size": 384}


def decoder(num_kv_heads: int = 1, **changes: int) -> Decoder:
    """With heads of 64: one kv head makes a k_proj and a v_proj of 64 rows."""
    shape = ShapeSection(**(SIZES | {"num_kv_heads": num_kv_heads} | changes))
    return Decoder.from_shape(shape, vocab_size=64, seed=1)


def merged_dtypes(directory: Path, layer: int, parts: tuple[str, ...]) -> set[bool]:
    """Whether each part is FP8, as vLLM and SGLang read it: by name and by dtype."""
    config = json.loads((directory / "config.json").read_text())
    skipped = set(config["quantization_config"]["modules_to_not_convert"])
    tensors = read(directory)
    states = set()
    for part in parts:
        name = f"model.layers.{layer}.{part}"
        is_fp8 = tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn
        assert is_fp8 == (name not in skipped) == (f"{name}.weight_scale_inv" in tensors)
        states.add(is_fp8)
    return states


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj")


def test_layers_that_servers_refuse_are_named_and_kept_in_bf16_on_request(
    tmp_path,
    make_run,  # noqa: F811
    capsys,
):
    export_hf(make_run(decoder()), tmp_path / "bf16")
    assert main(["export", "fp8", f"{tmp_path}/bf16", "--to", f"{tmp_path}/fp8"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert all(f"model.layers.*.{part}" in said for part in ATTENTION)
    assert "mlp" not in said
    assert "--servable" in said
    command = ["export", "fp8", f"{tmp_path}/bf16", "--to", f"{tmp_path}/served", "--servable"]
    assert main(command) == 0
    assert "RL with this export needs fp8.skip_modules" in capsys.readouterr().out
    for layer in (0, 1):
        assert merged_dtypes(tmp_path / "fp8", layer, ATTENTION) == {True}
        assert merged_dtypes(tmp_path / "served", layer, ATTENTION) == {False}
        assert merged_dtypes(tmp_path / "served", layer, FEED_FORWARD) == {True}


def test_sizes_that_servers_accept_say_nothing(tmp_path, make_run):  # noqa: F811
    model = decoder(num_kv_heads=2)
    assert not unservable_layers(model.config.to_hf(), Fp8Section())
    export_hf(make_run(model), tmp_path / "bf16")
    findings = export_fp8(tmp_path / "bf16", tmp_path / "fp8", servable=True)
    assert not any("BF16" in finding or "refuse" in finding for finding in findings)
    assert merged_dtypes(tmp_path / "fp8", 0, ATTENTION) == {True}


@pytest.mark.parametrize(
    ("changes", "skip_modules", "refused"),
    [
        ({"ffn_size": 320}, (), {"gate_proj", "up_proj", "down_proj"}),
        (
            {"hidden_size": 192, "num_heads": 2},
            ("*.mlp.*",),
            {"q_proj", "k_proj", "v_proj", "o_proj"},
        ),
        ({}, ("*.q_proj",), {"k_proj", "v_proj"}),  # one part in BF16, two in FP8
        ({}, ("model.layers.*.self_attn.[qkv]_proj",), set()),
    ],
)
def test_which_layers_are_refused(changes, skip_modules, refused):
    config = decoder(2, **changes).config.to_hf()
    names = unservable_layers(config, Fp8Section(skip_modules=skip_modules))
    assert {name.rpartition(".")[2] for name in names} == refused
    kept = Fp8Section(skip_modules=(*skip_modules, *names))
    assert not unservable_layers(config, kept)


def test_a_model_without_a_layer_to_serve_is_refused(tmp_path, make_run):  # noqa: F811
    model = decoder(hidden_size=192, num_heads=3)
    with pytest.raises(ConfigError, match="export it in BF16"):
        export_fp8(make_run(model), tmp_path / "fp8", servable=True)
    assert not (tmp_path / "fp8").exists()


def test_a_run_is_exported_with_its_own_settings(tmp_path, make_run):  # noqa: F811
    skip_modules = ("model.layers.0.mlp.*", "*.v_proj")
    run = make_run(decoder(), scale_format="fp32", skip_modules=skip_modules)
    for source in (run, run / "checkpoints" / "step-1"):
        out = tmp_path / f"fp8-{source.name}"
        assert main(["export", "fp8", str(source), "--to", str(out)]) == 0
        assert verify_weights(run, out)
    export_fp8(run, tmp_path / "other", "pow2", skip_modules=())
    config = json.loads((tmp_path / "other/config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]


def test_a_directory_that_servers_refuse_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(decoder().config.to_hf()))
    with pytest.raises(ConfigError, match="--servable, and train with"):
        require_servable("rollout.model", tmp_path, Fp8Section())
    require_servable("rollout.model", tmp_path, Fp8Section(enabled=False))


@pytest.mark.parametrize(
    ("changes", "accepted", "refused"),
    [
        (
            {"num_kv_heads": 2},
            (("fp8", 1), ("bf16", 2)),
            (
                ("fp8", 2, "down_proj in FP8 on 2 GPU, 256 x 192 on each"),
                ("bf16", 8, "4 attention"),
            ),
        ),
        (
            {"num_kv_heads": 4, "hidden_size": 512, "num_heads": 8, "ffn_size": 512},
            (("fp8", 1), ("fp8", 2)),
            (("fp8", 4, "k_proj in FP8 on 4 GPU, 64 x 512 on each"), ("fp8", 3, "among 3 GPUs")),
        ),
    ],
)
def test_what_servers_refuse_on_several_gpus(tmp_path, make_run, changes, accepted, refused):  # noqa: F811
    export_hf(make_run(decoder(**changes)), tmp_path / "bf16")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8", servable=True)
    for name, gpus in accepted:
        require_loadable("MODEL", tmp_path / name, gpus)
    for name, gpus, said in refused:
        with pytest.raises(ConfigError, match=said):
            require_loadable("MODEL", tmp_path / name, gpus)
