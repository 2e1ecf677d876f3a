"""An exported model stops in transformers where rollouts and evaluation stop."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from infir2.checkpoint import Store
from infir2.config.schema import Fp8Section, ShapeSection
from infir2.convert import export_fp8, export_hf
from infir2.data import load_tokenizer
from infir2.model import Decoder


def ids_of(directory: Path) -> dict[str, int]:
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in tokens}


def base_tokenizer(demo_dir: Path, to: Path, generation: dict[str, Any] | None) -> Path:
    """The demo's tokenizer as a base model ships it: eos is the end of a document."""
    shutil.copytree(demo_dir, to)
    path = to / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))
    (to / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    if generation is not None:
        (to / "generation_config.json").write_text(json.dumps(generation))
    return to


def run_of(tokenizer: Path, kind: str, favorite: int, eos: Any) -> Path:
    """A run whose model answers every token with the token `favorite`."""
    shape = ShapeSection(
        hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=64, tie_embeddings=False
    )
    decoder = Decoder.from_shape(shape, vocab_size=load_tokenizer(tokenizer).vocab_size, seed=0)
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():  # layers add nothing, every token has one state, and one logit is large
        for name, parameter in parameters.items():
            parameter.fill_(1.0 if "norm" in name or "embed_tokens" in name else 0.0)
        parameters["lm_head.weight"][favorite] = 1.0
    state = {
        "model_config": decoder.config.to_hf() | {"eos_token_id": eos},
        "tokenizer_dir": str(tokenizer),
        "fp8": json.loads(Fp8Section().model_dump_json()),
        "kind": kind,
    }
    store = Store(tokenizer.parent / "run")
    store.save(1, {f"parameters/{name}": value for name, value in parameters.items()}, state)
    store.close()
    return tokenizer.parent / "run"


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text())


@pytest.mark.parametrize("kind", ["sft", "rl"])
@pytest.mark.parametrize("generation", [None, {"eos_token_id": "base", "max_new_tokens": 12}])
def test_transformers_stops_at_the_end_of_a_turn(tmp_path, demo_dir, kind, generation):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = ids_of(demo_dir)
    base_eos = ids["<|endoftext|>"]
    settings = None if generation is None else generation | {"eos_token_id": base_eos}
    tokenizer_dir = base_tokenizer(demo_dir, tmp_path / "tokenizer", settings)
    run = run_of(tokenizer_dir, kind, ids["<|im_end|>"], base_eos)
    export_hf(run, tmp_path / "hf")
    export_fp8(tmp_path / "hf", tmp_path / "fp8")
    for directory in (tmp_path / "hf", tmp_path / "fp8"):
        stops = list(load_tokenizer(tokenizer_dir).eos_token_ids)
        assert read(directory, "config.json")["eos_token_id"] == stops
        assert read(directory, "generation_config.json") == (settings or {}) | {
            "eos_token_id": stops
        }
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            assert read(directory, name)["eos_token"] == "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = torch.tensor([[1, 2, 3]])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8)
    assert answer[0, 3:].tolist() == [ids["<|im_end|>"]] == [tokenizer.eos_token_id]
    again = load_tokenizer(tmp_path / "hf")
    assert again.eos_token_ids == load_tokenizer(tokenizer_dir).eos_token_ids
    assert again.eod_token_id == base_eos


def test_a_run_of_documents_keeps_the_tokenizers_eos(tmp_path, demo_dir):
    ids = ids_of(demo_dir)
    tokenizer_dir = base_tokenizer(demo_dir, tmp_path / "tokenizer", None)
    export_hf(run_of(tokenizer_dir, "cpt", 1, None), tmp_path / "hf")
    assert read(tmp_path / "hf", "tokenizer_config.json")["eos_token"] == "<|endoftext|>"
    assert ids["<|endoftext|>"] in read(tmp_path / "hf", "generation_config.json")["eos_token_id"]
    assert ids["<|im_end|>"] in read(tmp_path / "hf", "config.json")["eos_token_id"]


def test_ends_that_the_models_files_list_end_a_response_too(tmp_path, demo_dir):
    """Llama 3 lists `<|eom_id|>`; a number that is no control token is a mistake and is ignored."""
    ids = ids_of(demo_dir)
    declared = [ids["<|endoftext|>"], ids["<|im_start|>"], 1, 10**6]
    tokenizer_dir = base_tokenizer(
        demo_dir, tmp_path / "tokenizer", {"eos_token_id": declared, "temperature": 0.6}
    )
    expected = sorted({ids["<|endoftext|>"], ids["<|im_start|>"], ids["<|im_end|>"]})
    assert list(load_tokenizer(tokenizer_dir).eos_token_ids) == expected
    export_hf(run_of(tokenizer_dir, "sft", 1, declared[0]), tmp_path / "hf")
    settings = read(tmp_path / "hf", "generation_config.json")
    assert settings == {"eos_token_id": expected, "temperature": 0.6}
