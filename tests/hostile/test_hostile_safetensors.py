"""A hostile safetensors file is exported or refused in one sentence."""

import itertools
import shutil

import cases
import pytest
from mutate_safetensors import mutants

from infir2.config.schema import ShapeSection
from infir2.model import Decoder, exported_weights, write_hf


@pytest.mark.parametrize("seed", range(2))
def test_mutants_end_in_an_export_or_a_sentence(tmp_path, capsys, seed):
    shape = ShapeSection(
        architecture="llama", hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=64
    )
    decoder = Decoder.from_shape(shape, vocab_size=40, seed=0)
    source, out = tmp_path / "a/source", tmp_path / "a/out"
    write_hf(source, exported_weights(decoder), decoder.config.to_hf())
    path = source / "model.safetensors"
    before = cases.files_below(tmp_path)
    for name, data in itertools.islice(mutants(path.read_bytes(), seed), 60):
        path.write_bytes(data)
        command = ["export", "megatron", str(source), "--to", str(out)]
        code = cases.check_command(command, capsys, name)
        assert out.exists() == (code == 0), name
        shutil.rmtree(out, ignore_errors=True)
        assert cases.files_below(tmp_path) == before, name
