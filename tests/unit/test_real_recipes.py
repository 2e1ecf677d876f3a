"""Each recipe of recipes/real trains on a slice of its data, set by environment variables."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from infir2.cli import main
from infir2.config.schema import ShapeSection
from infir2.data import load_tokenizer
from infir2.model import Decoder, exported_weights, write_hf

ROOT = Path(__file__).parents[2]
DATA = ROOT / "../shared/data"
KINDS = {
    "corpus": ("cpt", "corpus/openlogic.jsonl.gz"),
    "gsm8k": ("sft", "train/gsm8k_train.jsonl.gz"),
    "math": ("sft", "train/math_prm800k_test4500_with_solutions.jsonl.gz"),
    "long-cot": ("sft", "train/longcot_limo291_r1distill32b.jsonl.gz"),
}
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data in ../shared/data")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with Qwen2.5's tokenizer."""
    directory = tmp_path_factory.mktemp("model") / "hf"
    tokenizer = DATA / "tokenizers/qwen2.5"
    shape = ShapeSection(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=64)
    decoder = Decoder.from_shape(shape, vocab_size=load_tokenizer(tokenizer).vocab_size, seed=0)
    write_hf(directory, exported_weights(decoder), decoder.config.to_hf(), tokenizer)
    return directory


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_trains_on_a_slice(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb, file = KINDS[name]
    with gzip.open(DATA / file, "rt", encoding="utf-8") as lines:
        rows = [line for line, _ in zip(lines, range(24), strict=False) if len(line) < 12_000][:6]
    (tmp_path / "slice.jsonl").write_text("".join(rows))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "slice.jsonl"))
    monkeypatch.setenv("HF_CHECKPOINT", str(model))
    size = "--data.batch_sequences=1" if verb == "cpt" else "--data.batch_samples=2"
    options = [
        f"--run.dir={tmp_path / 'run'}",
        size,
        "--data.sequence_tokens=256",
        "--data.micro_batch_tokens=256",
    ]
    options += ["--schedule.total_steps=2", "--train.epochs=0", "--data.on_too_long=truncate"] + [
        "--schedule.warmup_steps=0",
        "--schedule.decay_steps=1",
    ] * (verb == "cpt")
    assert main([verb, str(ROOT / f"recipes/real/{name}.toml"), *options]) == 0
    metrics = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert len([line for line in metrics if "loss" in line]) == 2
    shutil.rmtree(tmp_path / "run")


def test_the_recipes_are_those_tested() -> None:
    assert {path.stem for path in (ROOT / "recipes/real").glob("*.toml")} == {*KINDS, "base"}
