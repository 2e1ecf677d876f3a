"""Megatron-core checkpoints: Megatron's own logits, layouts, shapes and hostile files."""

import argparse
import contextlib
import enum
import json
import os
import pickle
import pickletools
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from infir2.config.schema import ShapeSection
from infir2.convert import import_megatron
from infir2.convert.megatron_import import MegatronCheckpoint, config_from_arguments
from infir2.errors import CheckpointError, ConfigError, OutputExistsError
from infir2.model import Decoder, ModelConfig

REAL = Path(__file__).resolve().parents[2] / "../shared/data/megatron"
REAL_SHAPE = ModelConfig(
    "qwen2",
    vocab_size=256,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=128,
    qkv_bias=True,
)


def hf_directory(path: Path, config: ModelConfig) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.skipif(not REAL.is_dir(), reason="the checkpoint written by megatron-core is missing")
def test_a_checkpoint_of_megatron_core_gives_its_logits(tmp_path):
    like = hf_directory(tmp_path / "like", REAL_SHAPE)
    import_megatron(REAL / "qwen2-tiny-tp1-stacked", tmp_path / "out", like)
    expected = load_file(REAL / "qwen2-tiny-expected.safetensors")
    decoder = Decoder.from_hf(tmp_path / "out", compute_dtype=torch.float32)
    (token_ids,) = expected["token_ids"]
    length = len(token_ids)
    logits = decoder(token_ids, torch.arange(length), torch.tensor([0, length], dtype=torch.int32))
    assert (logits - expected["logits"][0]).abs().max() < 2e-6
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_progress_is_in_bytes(tmp_path, monkeypatch):
    totals, advanced = [], []

    @contextlib.contextmanager
    def progress(_, total_bytes):
        totals.append(total_bytes)
        yield advanced.append

    monkeypatch.setattr("infir2.convert.megatron_import.byte_progress", progress)
    tensors = megatron_tensors(Decoder(REAL_SHAPE), stacked=True)
    like = hf_directory(tmp_path / "like", REAL_SHAPE)
    import_megatron(write_torch_dist(tmp_path / "m", tensors), tmp_path / "out", like)
    num_bytes = sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert totals == [num_bytes]
    assert sum(advanced) == num_bytes


def megatron_tensors(decoder: Decoder, stacked: bool) -> dict[str, Tensor]:
    """The decoder's parameters under Megatron's names, written independently of the importer."""
    weights = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    config = decoder.config
    layers: list[dict[str, Tensor]] = []
    for layer in range(config.num_layers):
        hf = {
            name.removeprefix(f"model.layers.{layer}."): t
            for name, t in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        entry = {
            "self_attention.linear_qkv.layer_norm_weight": hf["input_layernorm.weight"],
            "self_attention.linear_proj.weight": hf["self_attn.o_proj.weight"],
            "mlp.linear_fc1.layer_norm_weight": hf["post_attention_layernorm.weight"],
            "mlp.linear_fc1.weight": torch.cat(
                [hf["mlp.gate_proj.weight"], hf["mlp.up_proj.weight"]]
            ),
            "mlp.linear_fc2.weight": hf["mlp.down_proj.weight"],
        }
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            q, k, v = (hf[f"self_attn.{part}_proj.{kind}"] for part in "qkv")
            per_group = config.num_heads // config.num_kv_heads * config.head_dim
            pieces = []
            for group in range(config.num_kv_heads):
                rows = slice(group * config.head_dim, (group + 1) * config.head_dim)
                pieces += [q[group * per_group : (group + 1) * per_group], k[rows], v[rows]]
            entry[f"self_attention.linear_qkv.{kind}"] = torch.cat(pieces)
        if config.qk_norm:
            entry |= {
                f"self_attention.{part}_layernorm.weight": hf[f"self_attn.{part}_norm.weight"]
                for part in "qk"
            }
        layers.append(entry)
    tensors = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
    }
    if "lm_head.weight" in weights:
        tensors["output_layer.weight"] = weights["lm_head.weight"]
    for name in layers[0]:
        if stacked:
            tensors[f"decoder.layers.{name}"] = torch.stack([entry[name] for entry in layers])
        else:
            tensors |= {
                f"decoder.layers.{index}.{name}": entry[name] for index, entry in enumerate(layers)
            }
    tensors["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"] = torch.ones(3)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_torch_dist(path: Path, tensors: dict[str, Tensor], common: object = None) -> Path:
    with warnings.catch_warnings(action="ignore"):
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    torch.save(common or {"iteration": 7, "checkpoint_version": 3.0}, path / "common.pt")
    return path


def make_decoder(architecture: str, tied: bool) -> Decoder:
    shape = ShapeSection(
        architecture=architecture,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_size=96,
        tie_embeddings=tied,
    )
    decoder = Decoder.from_shape(shape, vocab_size=50, seed=1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter))
    return decoder


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("architecture", "tied"), [("qwen2", True), ("qwen3", False), ("llama", False)]
)
def test_every_parameter_is_imported(tmp_path, architecture, tied, stacked):
    decoder = make_decoder(architecture, tied)
    source = write_torch_dist(tmp_path / "megatron", megatron_tensors(decoder, stacked))
    import_megatron(source, tmp_path / "out", hf_directory(tmp_path / "like", decoder.config))
    read = load_file(tmp_path / "out" / "model.safetensors")
    expected = dict(decoder.named_parameters())
    assert set(read) == set(expected)
    for name, parameter in expected.items():
        assert torch.equal(read[name], parameter), name


def test_vocabulary_padding_is_dropped_and_an_output_layer_unties(tmp_path):
    decoder = make_decoder("qwen2", tied=True)
    tensors = megatron_tensors(decoder, stacked=True)
    padded = torch.cat([tensors["embedding.word_embeddings.weight"], torch.zeros(14, 64)])
    tensors |= {"embedding.word_embeddings.weight": padded, "output_layer.weight": padded * 2}
    import_megatron(
        write_torch_dist(tmp_path / "megatron", tensors),
        tmp_path / "out",
        hf_directory(tmp_path / "like", decoder.config),
    )
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(read["lm_head.weight"], decoder.head_weight * 2)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def arguments(**changes: object) -> argparse.Namespace:
    values = {
        "num_layers": 3,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
    }
    values |= {
        "norm_epsilon": 1e-6,
        "rotary_base": 1_000_000,
        "group_query_attention": True,
        "add_qkv_bias": True,
        "qk_layernorm": False,
    }
    return argparse.Namespace(
        **(values | {"max_position_embeddings": 512, "params_dtype": torch.bfloat16} | changes)
    )


def test_the_shape_comes_from_megatrons_own_arguments(tmp_path, monkeypatch):
    """Enums of megatron among them are skipped without importing megatron."""
    module = types.ModuleType("megatron")
    module.Backend = enum.Enum("Backend", {"flash": 1}, module=module.__name__, qualname="Backend")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    decoder = make_decoder("qwen2", tied=True)
    common = {
        "iteration": 7,
        "args": arguments(backend=module.Backend.flash, seeds=torch.arange(3)),
    }
    source = write_torch_dist(
        tmp_path / "megatron", megatron_tensors(decoder, stacked=True), common
    )
    monkeypatch.delitem(sys.modules, module.__name__)
    import_megatron(source, tmp_path / "out")
    read = Decoder.from_hf(tmp_path / "out", compute_dtype=torch.float32)
    assert read.config.num_kv_heads == 2
    assert read.config.max_positions == 512
    assert all(
        torch.equal(a, b) for a, b in zip(read.parameters(), decoder.parameters(), strict=True)
    )
    for changes, architecture in (
        ({"qk_layernorm": True, "add_qkv_bias": False}, "qwen3"),
        ({"add_qkv_bias": False}, "llama"),
    ):
        torch.save({"args": arguments(**changes)}, source / "common.pt")
        assert config_from_arguments(MegatronCheckpoint(source))["model_type"] == architecture


def test_the_tracker_file_names_the_iteration(tmp_path):
    decoder = make_decoder("llama", tied=False)
    write_torch_dist(tmp_path / "all" / "iter_0000007", megatron_tensors(decoder, stacked=True))
    (tmp_path / "all" / "latest_checkpointed_iteration.txt").write_text("7\n")
    like = hf_directory(tmp_path / "like", decoder.config)
    import_megatron(tmp_path / "all", tmp_path / "out", like)
    with pytest.raises(OutputExistsError):
        import_megatron(tmp_path / "all", tmp_path / "out", like)
    (tmp_path / "all" / "latest_checkpointed_iteration.txt").write_text("8\n")
    with pytest.raises(CheckpointError, match="not a Megatron torch_dist checkpoint"):
        import_megatron(tmp_path / "all", tmp_path / "out2", like)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"decoder.layers.mlp.linear_fc2.weight": None},
            r"nothing for 'model\.layers\.0\.mlp\.down_proj\.weight'",
        ),
        ({"decoder.layers.mlp.experts.weight": torch.ones(3, 2)}, "linear_fc|experts"),
        ({"decoder.layers.mlp.linear_fc2.weight": torch.ones(2, 64, 96)}, "has 2 layers, not 3"),
        (
            {"decoder.layers.mlp.linear_fc2.weight": torch.ones(3, 64, 80)},
            r"is \[64, 80\], not \[64, 96\]",
        ),
        (
            {"decoder.layers.self_attention.linear_qkv.weight": torch.ones(3, 100, 64)},
            "do not fit the config's heads",
        ),
        ({"decoder.final_layernorm.weight": torch.full((64,), torch.nan)}, "NaN or Inf"),
        (
            {"decoder.layers.self_attention.linear_proj.bias": torch.ones(3, 64)},
            r"o_proj\.bias' is not in",
        ),
        ({"decoder.mtp.weight": torch.ones(3)}, "decoder.mtp.weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(tmp_path, change, message):
    decoder = make_decoder("qwen2", tied=True)
    tensors = {
        name: t
        for name, t in (megatron_tensors(decoder, stacked=True) | change).items()
        if t is not None
    }
    source = write_torch_dist(tmp_path / "megatron", tensors)
    with pytest.raises(CheckpointError, match=message):
        import_megatron(source, tmp_path / "out", hf_directory(tmp_path / "like", decoder.config))
    assert not (tmp_path / "out").exists()


def test_an_unknown_shape_is_a_configuration_error(tmp_path):
    source = write_torch_dist(
        tmp_path / "megatron", megatron_tensors(make_decoder("llama", False), stacked=True)
    )
    with pytest.raises(ConfigError, match="--like"):
        import_megatron(source, tmp_path / "out")


class Attack:
    """Unpickling this with `pickle.load` makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.sentinel),)


def test_hostile_pickles_are_refused_with_the_name_and_do_nothing(tmp_path):
    sentinel = tmp_path / "sentinel"
    source = write_torch_dist(
        tmp_path / "megatron", megatron_tensors(make_decoder("llama", False), stacked=True)
    )
    good = (source / ".metadata").read_bytes()
    like = hf_directory(tmp_path / "like", make_decoder("llama", False).config)
    (source / ".metadata").write_bytes(pickle.dumps(Attack(sentinel)))
    with pytest.raises(CheckpointError, match=r"\.metadata: asks for 'posix\.mkdir'"):
        import_megatron(source, tmp_path / "out", like)
    (source / ".metadata").write_bytes(good)
    torch.save({"args": Attack(sentinel)}, source / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: asks for 'posix\.mkdir'"):
        import_megatron(source, tmp_path / "out")
    shard = next(source.glob("*.distcp"))
    size = shard.stat().st_size
    torch.save({"x": Attack(sentinel)}, shard)
    shard.write_bytes(shard.read_bytes().ljust(size, b"\0"))
    with pytest.raises(CheckpointError, match="damaged or missing"):
        import_megatron(source, tmp_path / "out", like)
    assert not sentinel.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "torch.load",
        "torch.hub.load",
        "os.system",
        "functools.partial",
    ],
)
def test_names_outside_the_list_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    path = tmp_path / "x"
    path.mkdir()
    (path / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    # Python 3.11.0 to 3.11.3 write members of enums by getattr, which is read and never called.
    refusal = "is not the metadata" if name == "builtins.getattr" else f"'{name}'"
    with pytest.raises(CheckpointError, match=refusal):
        MegatronCheckpoint(path)


@pytest.mark.parametrize("target", [b"cpathlib\nPosixPath\n", b"cpathlib\nPosixPath\n)\x81"])
def test_a_pickle_cannot_set_attributes_of_a_path(tmp_path, target):
    """Neither of the class, with which a file is written elsewhere, nor of a shard's own path."""
    decoder = make_decoder("llama", False)
    source = write_torch_dist(tmp_path / "megatron", megatron_tensors(decoder, stacked=True))
    attributes = {"name": "../../escape", "_str": "../../secret"}
    attack = target + pickletools.optimize(pickle.dumps(attributes, 2))[2:-1] + b"b"
    like = hf_directory(tmp_path / "like", decoder.config)
    good = (source / ".metadata").read_bytes()
    replaced = good.replace(b"\x8c\x0c__0_0.distcp", attack)  # the text of relative_path
    assert replaced != good
    (source / ".metadata").write_bytes(replaced)
    with pytest.raises(CheckpointError, match=r"sets attributes|is not the metadata"):
        import_megatron(source, tmp_path / "out", like)
    assert Path("a/b").name == "b"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("escape", ["../secret", "/etc/passwd", "sub/../../secret", "..", ""])
def test_a_shard_outside_the_checkpoint_is_refused(tmp_path, escape):
    source = write_torch_dist(
        tmp_path / "megatron", megatron_tensors(make_decoder("llama", False), stacked=True)
    )
    metadata = pickle.loads((source / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = escape
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        MegatronCheckpoint(source)


def test_a_tensor_larger_than_its_files_is_refused_before_allocation(tmp_path):
    decoder = make_decoder("llama", False)
    source = write_torch_dist(tmp_path / "megatron", megatron_tensors(decoder, stacked=True))
    metadata = pickle.loads((source / ".metadata").read_bytes())
    metadata.state_dict_metadata["embedding.word_embeddings.weight"].size = torch.Size((2**40, 64))
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="more than all its files hold"):
        import_megatron(source, tmp_path / "out", hf_directory(tmp_path / "like", decoder.config))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_truncated_pickle_is_an_error_with_its_name(tmp_path, name):
    source = write_torch_dist(
        tmp_path / "megatron", megatron_tensors(make_decoder("llama", False), stacked=True)
    )
    data = (source / name).read_bytes()
    (source / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=name):
        import_megatron(source, tmp_path / "out")
