"""The environment variables of the reference implementation set keys of a recipe."""

import re
from pathlib import Path

import pytest
from test_config_load import RECIPE

from infir2.config import load
from infir2.config.env_vars import variables_of
from infir2.config.keys import lookup
from infir2.config.schema import EvalRecipe, ModelSection, RlRecipe, TrainRecipe
from infir2.errors import ConfigError
from infir2.train.plan import planned_config


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(RECIPE)
    Path("e.toml").write_text("[[evaluate.problems]]\npath = 'p.jsonl'\nanswer_field = 'gold'\n")
    return "x.toml"


@pytest.mark.parametrize("recipe_class", [TrainRecipe, RlRecipe, EvalRecipe])
def test_every_variable_sets_a_key_that_exists(recipe_class: type[TrainRecipe]) -> None:
    assert all(lookup(recipe_class, key) for key in variables_of(recipe_class).values() if key)


def test_variables_of_training(recipe: str) -> None:
    environ = {
        "DATA_DIR": "data/sft",
        "HF_CHECKPOINT": "hf",
        "MAX_TOKENS_PER_GPU": "4096",
        "SAVE_DIR": "runs/s",
        "TOP_P": "0.5",
        "REF_LOAD": "",
    }
    loaded = load(TrainRecipe, [recipe], [], environ, "sft")
    data = loaded.recipe.data
    assert [(source.path, source.prompt_field) for source in data.sources] == [
        ("data/sft", "question")
    ]
    assert (loaded.recipe.model.path, data.micro_batch_tokens, loaded.recipe.run.dir) == (
        "hf",
        4096,
        "runs/s",
    )
    assert loaded.provenance["data.sources.0.path"] == "environment DATA_DIR"
    assert loaded.provenance["data.sources.0.prompt_field"] == "file:x.toml"
    assert len(loaded.notes) == 4
    assert "environment variable HF_CHECKPOINT sets model.path to 'hf'." in loaded.notes


def test_weights_and_tokenizer_from_two_directories(recipe: str) -> None:
    loaded = load(TrainRecipe, [recipe], [], {"HF_CHECKPOINT": "hf", "REF_LOAD": "dist"})
    assert (loaded.recipe.model.path, loaded.recipe.data.tokenizer) == ("dist", "hf")


@pytest.mark.parametrize("name", [".metadata", "latest_checkpointed_iteration.txt"])
def test_megatron_weights_name_the_command_that_converts_them(
    recipe: str, tmp_path: Path, name: str
) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / name).write_text("1")
    environ = {"HF_CHECKPOINT": "hf", "REF_LOAD": f"{tmp_path}/dist/"}
    command = f"`infir2 import megatron {tmp_path}/dist --to {tmp_path}/dist-hf --like hf`"
    for recipe_class in (TrainRecipe, RlRecipe):
        with pytest.raises(ConfigError, match=re.escape(command)):
            load(recipe_class, [recipe], [], environ)
    with pytest.raises(ConfigError, match="--like HF_DIR"):
        planned_config(ModelSection(path=f"{tmp_path}/dist"))


def test_variables_of_rl(recipe: str) -> None:
    environ = {
        "HF_CHECKPOINT": "hf-fp8",
        "REF_LOAD": "runs/sft",
        "ROLLOUT_MAX_RESPONSE_LEN": "16384",
    }
    loaded = load(RlRecipe, [recipe], ["--data.batch_samples=0"], environ).recipe
    assert (loaded.rollout.model, loaded.model.path, loaded.rl.max_response_tokens) == (
        "hf-fp8",
        "runs/sft",
        16384,
    )


def test_variables_of_evaluation(recipe: str) -> None:
    environ = {
        "MODEL_PATH": "m",
        "DATASET_LOCAL": "aime.jsonl",
        "EVAL_BATCH": "16",
        "EVAL_WORK_DIR": "runs/e",
        "MAX_NEW_TOKENS": "31000",
        "GENERATED_NUM": "32",
        "TEMPERATURE": "0.65",
        "TOP_P": "0.95",
        "API_PORT": "1",
    }
    loaded = load(EvalRecipe, ["e.toml"], [], environ)
    section = loaded.recipe.evaluate
    assert (section.samples, section.temperature, section.top_p, section.max_response_tokens) == (
        32,
        0.65,
        0.95,
        31000,
    )
    assert (section.problems[0].path, section.problems[0].answer_field) == ("aime.jsonl", "gold")
    assert (
        loaded.recipe.model.path,
        loaded.recipe.run.dir,
        loaded.recipe.rollout.max_running_requests,
    ) == ("m", "runs/e", 16)
    assert any(note.startswith("API_PORT is set but not needed") for note in loaded.notes)


def test_variables_of_an_evaluation_of_benchmarks() -> None:
    recipe = Path(__file__).parents[2] / "recipes/qwen2.5-7b/eval-gpqa.toml"
    environ = {"DATASET_LOCAL": "/data/gpqa", "TP_SIZE": "2", "GENERATED_NUM": "4"}
    loaded = load(EvalRecipe, [recipe], ["--rollout.engine=sglang", "--rollout.python=p"], environ)
    assert loaded.recipe.benchmarks.data == "/data/gpqa"
    assert loaded.recipe.evaluate.problems == ()
    assert (loaded.recipe.rollout.tensor_parallel, loaded.recipe.evaluate.samples) == (2, 4)


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_rollouts_are_counted_in_steps(size: str) -> None:
    recipes = Path(__file__).parents[2] / "recipes" / f"qwen2.5-{size}"
    assert load(RlRecipe, [recipes / "rl1.toml"], [], {}).recipe.schedule.total_steps == 10240
    fewer = load(RlRecipe, [recipes / "rl2.toml"], [], {"NUM_ROLLOUT": "136"})
    assert fewer.recipe.schedule.total_steps == 136


def test_options_override_variables(recipe: str) -> None:
    loaded = load(TrainRecipe, [recipe], ["--model.path=other"], {"HF_CHECKPOINT": "hf"})
    assert (loaded.recipe.model.path, loaded.provenance["model.path"]) == ("other", "option")


def test_load_dir_branches_unless_it_is_the_run_itself(recipe: str) -> None:
    other = load(TrainRecipe, [recipe], [], {"LOAD_DIR": "runs/cpt/checkpoints/step-300"})
    assert other.recipe.checkpoint.branch_from == "runs/cpt/checkpoints/step-300"
    same = load(TrainRecipe, [recipe], [], {"LOAD_DIR": "runs/x/", "SAVE_DIR": "runs/x"})
    assert same.recipe.checkpoint.branch_from == ""
    assert "resumes" in same.notes[-1]


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (
            {"MAX_TOKENS_PER_GPU": "many"},
            "environment MAX_TOKENS_PER_GPU: data.micro_batch_tokens must be an integer, not "
            "'many'.",
        ),
        (
            {"DATA_DIR": "a", "DATA_PATH": "b"},
            "environment DATA_DIR: DATA_DIR and DATA_PATH both set data.sources, to different "
            "values; unset one of them.",
        ),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    recipe: str, environ: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(TrainRecipe, [recipe], [], environ)
    assert str(error.value) == sentence
