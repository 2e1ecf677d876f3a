"""Import of torch distributed checkpoints that have Hugging Face's names, under any prefix."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from test_convert_export import make_decoder
from test_convert_megatron_import import hf_directory

from infir2.convert import import_megatron
from infir2.errors import CheckpointError


@pytest.mark.parametrize("prefix", ["", "model.", "app/model."])
def test_names_of_hugging_face_are_read(tmp_path, prefix):
    decoder = make_decoder("qwen2", tied=True)
    weights = {name: value.detach() for name, value in decoder.named_parameters()}
    stored = {prefix + name: value for name, value in weights.items()} | {
        f"{prefix}lm_head.weight": weights["model.embed_tokens.weight"]
    }
    stored |= {f"optim.exp_avg.{name}": torch.zeros_like(value) for name, value in weights.items()}
    like = hf_directory(tmp_path / "like", decoder.config)
    with warnings.catch_warnings(action="ignore"):
        dcp.save(dict(stored), storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    import_megatron(tmp_path / "dcp", tmp_path / "out", like)
    read = load_file(tmp_path / "out/model.safetensors")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) for name, value in weights.items())
    del stored[f"{prefix}model.norm.weight"]
    with warnings.catch_warnings(action="ignore"):
        dcp.save(
            dict(stored), storage_writer=dcp.FileSystemWriter(tmp_path / "partial"), no_dist=True
        )
    with pytest.raises(CheckpointError, match=r"has no tensor '.*model\.norm\.weight'"):
        import_megatron(tmp_path / "partial", tmp_path / "out2", like)
    assert not (tmp_path / "out2").exists()
