"""The resolved recipe loads to an equal recipe, and decides what a resumed run may change."""

from pathlib import Path

import pytest
from test_config_load import RECIPE

from infir2.config import changed_keys, check_resume, dump, is_safe, load
from infir2.config.keys import leaf_keys
from infir2.config.load import Loaded
from infir2.config.resume import SAFE_KEYS
from infir2.config.schema import RlRecipe, TrainRecipe
from infir2.errors import ConfigError


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded[TrainRecipe]:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(RECIPE)
    return load(TrainRecipe, ["x.toml"])


def test_a_dump_loads_to_an_equal_recipe(loaded: Loaded[TrainRecipe]) -> None:
    odd = [
        '--data.system_prompt="a \\"b\\" # \\\\ \\n\\u007f é 🙂"',
        "--fp8.skip_modules=a,b",
        "--optimizer.eps=1e-20",
        "--run.seed=7",
    ]
    first = load(TrainRecipe, ["x.toml"], odd, {"SAVE_DIR": "runs/\u2028odd"})
    Path("resolved.toml").write_text(dump(first), encoding="utf-8")
    again = load(TrainRecipe, ["resolved.toml"])
    assert again.recipe == first.recipe
    assert {key for key, origin in again.provenance.items() if origin != "file:resolved.toml"} == {
        "model.shape"
    }


def test_a_dump_with_a_shape_and_without_sources_of_validation(loaded: Loaded[TrainRecipe]) -> None:
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96}
    options = [
        "--model.path=",
        "--data.tokenizer=t",
        *(f"--model.shape.{name}={value}" for name, value in shape.items()),
    ]
    first = load(TrainRecipe, ["x.toml"], options)
    Path("resolved.toml").write_text(dump(first))
    assert load(TrainRecipe, ["resolved.toml"]).recipe == first.recipe


def test_a_dump_names_the_origin_of_each_value(loaded: Loaded[TrainRecipe]) -> None:
    text = dump(load(TrainRecipe, ["x.toml"], ["--run.threads=3"], {"HF_CHECKPOINT": "hf"}))
    lines = text.splitlines()
    for line in (
        "threads = 3  # option",
        'path = "hf"  # environment HF_CHECKPOINT',
        'path = "b.jsonl"  # file:x.toml',
        "seed = 1236  # default",
    ):
        assert line in lines


def test_changes_are_named_key_by_key(loaded: Loaded[TrainRecipe]) -> None:
    new = load(
        TrainRecipe,
        ["x.toml"],
        ["--run.seed=2", "--data.sources.2.path=c", "--data.sources.0.weight=5"],
    ).recipe
    changes = changed_keys(loaded.recipe, new)
    assert changes["run.seed"] == (1236, 2)
    assert changes["data.sources.0.weight"] == (1.0, 5.0)
    assert changes["data.sources.2.path"] == (None, "c")
    assert changed_keys(new, new) == {}


def test_keys_that_change_the_computation_are_not_safe() -> None:
    names = [key.name for key in leaf_keys(RlRecipe)]
    assert all(
        any(name == safe or name.startswith(f"{safe}.") for name in names) for safe in SAFE_KEYS
    )
    unsafe = {name for name in names if not is_safe(name)}
    assert {
        "run.seed",
        "data.tokenizer",
        "data.sources.0.weight",
        "model.path",
        "model.shape.num_layers",
        "fp8.enabled",
    } <= unsafe
    assert {
        "schedule.learning_rate",
        "optimizer.beta1",
        "rl.temperature",
        "data.batch_samples",
        "data.sequence_tokens",
    } <= unsafe
    assert (
        not {
            "train.stop_after_step",
            "checkpoint.keep",
            "evaluate.samples",
            "data.micro_batch_tokens",
        }
        & unsafe
    )


def test_resume_rejects_a_different_run_and_names_both_values(loaded: Loaded[TrainRecipe]) -> None:
    recipe_path = Path("recipe.toml")
    recipe_path.write_text(dump(loaded))
    safe = load(TrainRecipe, ["x.toml"], ["--train.log_every=5"])
    assert check_resume(safe, recipe_path) == ["resumed with train.log_every = 5 (was 1)"]
    unsafe = load(
        TrainRecipe,
        ["x.toml"],
        ["--run.seed=2", "--schedule.learning_rate=3e-4", "--train.log_every=5"],
    )
    with pytest.raises(
        ConfigError,
        match=r"run\.seed = 1236, and now it is 2 \(and 1 more: "
        r"schedule\.learning_rate\).*--accept-changes",
    ):
        check_resume(unsafe, recipe_path)
    accepted = Loaded(unsafe.recipe, unsafe.provenance, accept_changes=True)
    assert len(check_resume(accepted, recipe_path)) == 3
