"""A hostile config.json ends every verb that reads it in one sentence, at once."""

import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutate_config import mutants
from readers import small_models

from infir2.cli import main
from infir2.config.schema import ModelSection, ShapeSection
from infir2.convert import selfcheck
from infir2.errors import ConfigError, UserError
from infir2.model import Decoder, memory
from infir2.preflight.model import model_facts

SECONDS = 20  # per verb, on a busy machine; usually 0.1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models(tmp_path_factory.mktemp("models"))


def ends_in_a_sentence(
    label: str, action: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> str:
    """Run the action, which succeeds or says one sentence in time; return the sentence."""
    started, sentence, code = time.perf_counter(), "", 0
    try:
        code = action()
    except UserError as error:
        sentence = str(error)
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("infir2: error: ")]
    assert time.perf_counter() - started < SECONDS, label
    assert "Traceback" not in output.err, (label, output.err)
    assert code != 70, label
    sentence = sentence or "".join(errors)
    assert len(sentence) < 1000, label
    assert sentence.isprintable(), label
    return sentence


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_mutants_of_a_config_end_in_a_result_or_a_sentence(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    seed: int,
) -> None:
    monkeypatch.setattr(selfcheck, "SMALL_MODEL_PARAMETERS", 0)
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(models / kind, model)
    good = json.loads((model / "config.json").read_text())
    verb = ["export", "fp8"] if kind == "bf16" else ["import", "fp8"]
    for label, data in itertools.islice(mutants(good, seed), 40):
        (model / "config.json").write_bytes(data)
        for action in (
            lambda: main([*verb, str(model), "--to", str(out)]),
            lambda: model_facts(ModelSection(path=str(model)), 1) and 0,
            lambda: Decoder.from_hf(model) and 0,
        ):
            ends_in_a_sentence(label, action, capsys)
        assert not list(tmp_path.glob("out.*")), label  # neither unverified nor failed
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize(
    "value",
    [20_000, 10**6, 10**9, 10**30, -1, 0, 1.5, 1e300, "28", None, True, False, [1], {"a": [2]}],
    ids=str,
)
@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"]
)
@pytest.mark.parametrize("kind", ["bf16", "fp8", "bin"])
def test_absurd_sizes_are_refused_before_anything_is_allocated(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    key: str,
    value: Any,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(models / kind, model)
    good = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(good | {key: value}))
    verb = {"bf16": ["export", "fp8"], "fp8": ["import", "fp8"], "bin": ["import", "hf"]}[kind]
    actions = [lambda: main([*verb, str(model), "--to", str(tmp_path / "out")])]
    if kind != "bin":
        actions += [
            lambda: model_facts(ModelSection(path=str(model)), 1) and 0,
            lambda: Decoder.from_hf(model) and 0,
        ]
    for action in actions:
        started = time.perf_counter()
        assert ends_in_a_sentence(f"{key} = {value}", action, capsys)
        assert time.perf_counter() - started < 5
    assert not (tmp_path / "out").exists()


def test_a_model_larger_than_the_memory_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first tensor is allocated; FP8 codes need a quarter of the masters' memory."""
    num_parameters = sum(p.numel() for p in Decoder.from_hf(models / "bf16").parameters())
    monkeypatch.setattr(memory, "host_memory", lambda: 3 * num_parameters)
    monkeypatch.setattr(Decoder, "to_empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(ConfigError, match=r"weights need .* GiB, and cpu has"):
        Decoder.from_hf(models / "bf16")
    shape = ShapeSection(hidden_size=128, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=128)
    with pytest.raises(ConfigError, match="weights need"):
        Decoder.from_shape(shape, vocab_size=32, seed=0)
    Decoder.from_hf(models / "fp8")
