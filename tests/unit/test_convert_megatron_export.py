"""export megatron: megatron-core loads it and computes our logits; import gives the same bytes."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_convert_export import make_decoder, make_run  # noqa: F401 (a fixture)

from infir2.cli import main
from infir2.config.schema import ShapeSection
from infir2.convert import export_hf, export_megatron, import_megatron
from infir2.convert import megatron_export as module
from infir2.errors import CheckpointError, OutputExistsError
from infir2.model import Decoder

JUDGE = Path(__file__).parent / "judges/megatron_load.py"
TOKEN_IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 90]


@pytest.mark.parametrize(
    ("architecture", "tied"), [("qwen2", True), ("qwen3", False), ("llama", False)]
)
def test_export_then_import_equals_export_hf(tmp_path, make_run, architecture, tied):  # noqa: F811
    run = make_run(make_decoder(architecture, tied=tied))
    assert main(["export", "hf", str(run), "--to", str(tmp_path / "hf")]) == 0
    for source, name in ((run, "from-run"), (tmp_path / "hf", "from-hf")):
        assert main(["export", "megatron", str(source), "--to", str(tmp_path / name)]) == 0
        back = str(tmp_path / f"{name}-back")
        assert main(["import", "megatron", str(tmp_path / name), "--to", back]) == 0  # no --like
        import_megatron(tmp_path / name / "release", tmp_path / f"{name}-like", tmp_path / "hf")
        for back in (f"{name}-back", f"{name}-like"):
            expected, actual = (
                load_file(tmp_path / directory / "model.safetensors") for directory in ("hf", back)
            )
            assert expected.keys() == actual.keys()
            for key, tensor in expected.items():
                assert actual[key].dtype == torch.bfloat16
                assert torch.equal(actual[key].view(torch.int16), tensor.view(torch.int16)), key
        assert (tmp_path / f"{name}-like" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "from-run-back/config.json").read_text())
    expected_config = json.loads((tmp_path / "hf/config.json").read_text())
    different = {key for key in expected_config if config.get(key) != expected_config[key]}
    assert different <= {"bos_token_id", "eos_token_id", "pad_token_id"}


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")
@pytest.mark.parametrize(("architecture", "tied"), [("qwen2", True), ("qwen3", False)])
def test_megatron_core_computes_our_logits(tmp_path, make_run, architecture, tied):  # noqa: F811
    decoder = make_decoder(architecture, tied=tied)
    run = make_run(decoder)
    export_hf(run, tmp_path / "hf")
    export_megatron(run, tmp_path / "out")
    shape = dataclasses.asdict(decoder.config) | {"token_ids": TOKEN_IDS}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    command = [
        sys.executable,
        str(JUDGE),
        str(tmp_path / "out/release"),
        str(tmp_path / "shape.json"),
        str(tmp_path / "judged"),
    ]
    judged = subprocess.run(command, capture_output=True, text=True)
    assert judged.returncode == 0, judged.stderr
    assert json.loads(judged.stdout.splitlines()[-1]) == {
        "checkpoint_version": 3.0,
        "num_layers": 2,
    }
    loaded = load_file(tmp_path / "judged")
    for name, tensor in loaded.items():
        assert not (tensor == 12345.0).any(), f"{name} was not loaded"
    ours = Decoder.from_hf(tmp_path / "hf", compute_dtype=torch.float32)
    count = len(TOKEN_IDS)
    with torch.no_grad():
        logits = ours(
            torch.tensor(TOKEN_IDS),
            torch.arange(count),
            torch.tensor([0, count], dtype=torch.int32),
        )
    assert (logits - loaded["logits"]).abs().max() < 1e-4 * logits.abs().max()


def test_memory_holds_one_layer(tmp_path, make_run, monkeypatch):  # noqa: F811
    run = make_run(make_decoder())
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError, match="there"):
        export_megatron(run, tmp_path / "there")
    sizes: list[int] = []
    resolve = module._Planner.resolve_data

    def resolved(self, item):
        sizes.append(0)
        data = resolve(self, item)
        sizes[-1] = data.numel() if isinstance(data, torch.Tensor) else 0
        return data

    monkeypatch.setattr(module._Planner, "resolve_data", resolved)
    export_megatron(run, tmp_path / "out")
    assert max(sizes) == 2 * 320 * 192  # gate and up of one layer
    broken = make_decoder()
    with torch.no_grad():
        dict(broken.named_parameters())["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        export_megatron(make_run(broken, "broken"), tmp_path / "bad")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken",
        "out",
        "run",
        "there",
        "tokenizer",
    ]


def test_every_parameter_of_every_variant_is_written_once() -> None:
    shape = ShapeSection(
        architecture="llama", hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2, ffn_size=64
    )
    config = dataclasses.replace(
        Decoder.from_shape(shape, vocab_size=9, seed=0).config,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Decoder(config).named_parameters()}
    chunks = list(module._chunks(shapes, 1))
    assert sorted(name for chunk in chunks for name in chunk.names) == sorted(shapes)


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path, make_run):  # noqa: F811
    """But not what a living one writes to the same output."""
    run = make_run(make_decoder())
    script = (
        "import os, sys; from infir2.convert import megatron_export as module;"
        "module.torch.save = lambda *_: (print('writing', flush=True), sys.stdin.read());"
        f"module.export_megatron({str(run)!r}, {str(tmp_path / 'out')!r})"
    )
    command = [sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as living:
        for process in (killed, living):
            assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.glob(".out.*"))) == 2
        killed.kill()
        killed.wait()
        export_megatron(run, tmp_path / "out")
        assert len(list(tmp_path.glob(".out.*"))) == 1
        living.kill()
    shutil.rmtree(tmp_path / "out")
    export_megatron(run, tmp_path / "out")
    assert not list(tmp_path.glob(".out.*"))
