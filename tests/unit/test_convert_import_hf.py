"""`import hf`: what transformers loads for us, and what it must not do."""

import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from infir2.cli import main
from infir2.convert import import_hf
from infir2.errors import CheckpointError

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import PretrainedConfig
class Config(PretrainedConfig):
    model_type = "own"
"""
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 32,
}


@pytest.mark.parametrize("config", [{"model_type": "own"}, QWEN2])
@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_the_models_own_code_is_never_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: dict,
    where: str,
) -> None:
    """Without the refusal transformers asks, and "y" runs the code."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "code.py").write_text(CODE)
    (model / "pytorch_model.bin").write_bytes(b"x")
    auto_map = {
        "AutoConfig": "code.Config",
        "AutoTokenizer": ["code.T", None],
        "AutoModelForCausalLM": "code.M",
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer_config.json").write_text("{}")
    content = json.loads((model / where).read_text())
    (model / where).write_text(json.dumps(content | {"auto_map": auto_map}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    assert main(["import", "hf", str(model), "--to", str(tmp_path / "out")]) == 3
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    assert "[y/N]" not in output.out + output.err
    assert not list(tmp_path.rglob("ran"))
    if config["model_type"] == "own" and where == "config.json":
        assert "code of the model's own, which is never run" in output.err


@pytest.mark.parametrize("missing", [("gguf",), ("accelerate",), ("gguf", "accelerate")])
def test_gguf_names_all_missing_packages_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name in missing else find_spec(name)
    )
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=f"pip install {' '.join(missing)}`"):
        import_hf(tmp_path / "m.gguf", tmp_path / "out")
