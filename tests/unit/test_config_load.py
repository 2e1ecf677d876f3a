"""Recipes: merging, provenance, strictness, and one error sentence per mistake."""

import tomllib
from pathlib import Path

import pytest
from shipped_recipes import class_of, name_of, recipe_files, stage_of

from infir2.config import Loaded, load
from infir2.config.rules import violations
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe
from infir2.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
[run]
dir = "runs/x"
[model]
path = "models/base"
[data]
sequence_tokens = 128
micro_batch_tokens = 256
batch_samples = 4
[[data.sources]]
path = "a.jsonl"
prompt_field = "question"
[[data.sources]]
path = "b.jsonl"
[schedule]
learning_rate = 1e-4
total_steps = 10
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(RECIPE)
    return "x.toml"


def sft(
    *arguments: str, path: str = "x.toml", environ: dict[str, str] | None = None
) -> Loaded[TrainRecipe]:
    return load(TrainRecipe, [path], arguments, environ, "sft")


def test_later_layers_override_and_provenance_names_them(recipe: str) -> None:
    Path("base.toml").write_text("[run]\nseed = 1\nthreads = 2\ndevice = 'cpu'\n")
    Path("later.toml").write_text(
        "extends = 'base.toml'\n[run]\nseed = 2\n[data]\ntokenizer = 'toks'\n"
    )
    loaded = load(
        TrainRecipe, [recipe, "later.toml"], ["--run.threads=7"], {"SAVE_DIR": "runs/env"}
    )
    run = loaded.recipe.run
    assert (run.seed, run.threads, run.device, run.dir) == (2, 7, "cpu", "runs/env")
    origins = {
        key: loaded.provenance[key]
        for key in ("run.seed", "run.threads", "run.device", "run.dir", "model.path", "fp8.enabled")
    }
    assert origins == {
        "run.seed": "file:later.toml",
        "run.threads": "option",
        "run.device": "file:base.toml",
        "run.dir": "environment SAVE_DIR",
        "model.path": "file:x.toml",
        "fp8.enabled": "default",
    }


def test_extends_is_relative_to_the_file(recipe: str) -> None:
    Path("deep/er").mkdir(parents=True)
    Path("deep/base.toml").write_text('extends = "../x.toml"\n[run]\nseed = 3\n')
    Path("deep/er/leaf.toml").write_text('extends = "../base.toml"\n')
    loaded = sft(path="deep/er/leaf.toml")
    assert loaded.recipe.run.seed == 3
    assert loaded.provenance["model.path"] == "file:x.toml"
    assert loaded.provenance["run.seed"] == "file:deep/base.toml"


def test_circular_extends_is_an_error(recipe: str) -> None:
    Path("a.toml").write_text('extends = "b.toml"')
    Path("b.toml").write_text('extends = "a.toml"')
    with pytest.raises(ConfigError, match=r"^a\.toml: its extends lines form a circle"):
        sft(path="a.toml")


def test_a_list_of_tables_replaces_the_earlier_one_with_its_provenance(recipe: str) -> None:
    Path("later.toml").write_text('[[data.sources]]\npath = "c.jsonl"\n')
    loaded = load(TrainRecipe, [recipe, "later.toml"])
    assert [source.path for source in loaded.recipe.data.sources] == ["c.jsonl"]
    assert loaded.recipe.data.sources[0].prompt_field == "prompt"
    assert loaded.provenance["data.sources.0.prompt_field"] == "default"
    assert "data.sources.1.path" not in loaded.provenance


def test_options_of_each_kind(recipe: str) -> None:
    loaded = sft(
        "--data.sources.1.weight=2",
        "--data.sources.2.path=c.jsonl",
        "--fp8.skip_modules=model.layers.0.*,lm_head",
        "--fp8.enabled=false",
        "--fp8.scale_format=fp32",
        "--schedule.learning_rate=1",
        "--data.system_prompt=Say 1 = 1, please",
        "--model.path=2024",
        '--data.tokenizer="quo ted"',
    ).recipe
    assert [(source.path, source.weight) for source in loaded.data.sources] == [
        ("a.jsonl", 1.0),
        ("b.jsonl", 2.0),
        ("c.jsonl", 1.0),
    ]
    assert loaded.fp8.skip_modules == ("model.layers.0.*", "lm_head")
    assert (loaded.fp8.enabled, loaded.fp8.scale_format) == (False, "fp32")
    assert loaded.schedule.learning_rate == 1.0
    assert loaded.data.system_prompt == "Say 1 = 1, please"
    assert (loaded.model.path, loaded.data.tokenizer) == ("2024", "quo ted")


def test_an_option_can_replace_the_list(recipe: str) -> None:
    loaded = sft('--data.sources=[{path = "z.jsonl", weight = 3}]')
    assert [(source.path, source.weight) for source in loaded.recipe.data.sources] == [
        ("z.jsonl", 3.0)
    ]
    assert loaded.provenance["data.sources.0.path"] == "option"


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (
            "--data.tokenzier=x",
            "option --data.tokenzier: data.tokenzier is not a key; did you mean data.tokenizer?",
        ),
        ("--data.seed=1", "option --data.seed: data.seed is not a key; did you mean run.seed?"),
        (
            "--dataa.tokenizer=x",
            "option --dataa.tokenizer: dataa is not a section of this kind of recipe; did you "
            "mean data?",
        ),
        ("--run.seed.x=1", "option --run.seed.x: run.seed.x is not a key; did you mean run.seed?"),
        (
            "--data.sources.0.pth=x",
            "option --data.sources.0.pth: data.sources.0.pth is not a key; did you mean "
            "data.sources.0.path?",
        ),
        (
            "--data.sources.3.path=x",
            "option --data.sources.3.path: data.sources.3 is not an element of data.sources, "
            "which has 2; count from 0.",
        ),
        (
            "--schedule.total_steps=1e3",
            "option --schedule.total_steps: schedule.total_steps must be an integer (1000, without "
            "point and exponent), not 1000.0.",
        ),
        (
            "--schedule.learning_rate=true",
            "option --schedule.learning_rate: schedule.learning_rate must be a number, not True.",
        ),
        (
            "--schedule.learning_rate=nan",
            "option --schedule.learning_rate: schedule.learning_rate must be a finite number, not "
            "nan.",
        ),
        (
            "--fp8.enabled=False",
            "option --fp8.enabled: fp8.enabled must be true or false, not 'False'.",
        ),
        (
            "--schedule.kind=cos",
            "option --schedule.kind: schedule.kind must be 'wsd', 'cosine' or 'constant', not "
            "'cos'.",
        ),
        (
            "--run.seed=1\nthreads=2",
            "option --run.seed: run.seed must be an integer, not '1\\nthreads=2'.",
        ),
        (
            "--model.path=a\udcffb",
            "option --model.path: the value is not valid UTF-8, which a recipe cannot store; "
            "rename "
            "the file or directory.",
        ),
        ("--run.seed", "option --run.seed: write it as --run.seed=VALUE."),
        (
            "--run=3",
            "option --run: run is a section, so write [run] and keys under it, not a single value.",
        ),
        (
            "--data.batch_sequences=2",
            "option --data.batch_sequences: data.batch_sequences and data.batch_samples are both "
            "set; keep one and set the other to 0.",
        ),
    ],
)
def test_mistakes_get_one_sentence(recipe: str, option: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        sft(option)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.pre_activations", "model.pre_activation_dtype"),
        ("data.too_long", "data.on_too_long"),
        ("train.skip_nonfinite_steps", "train.max_nonfinite_steps"),
        ("optimizer.gradients", "optimizer.grad_dtype"),
        ("train.head_chunk_tokens", "train.loss_chunk_tokens"),
        ("parallel.pp", "parallel.tp"),  # removed: there is no pipeline parallelism
    ],
)
def test_a_renamed_key_is_unknown_and_the_new_one_is_suggested(
    recipe: str, old: str, new: str
) -> None:
    with pytest.raises(ConfigError) as error:
        sft(f"--{old}=x")
    assert str(error.value) == f"option --{old}: {old} is not a key; did you mean {new}?"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[data]\ntokenzier = 'x'",
            "y.toml: data.tokenzier is not a key; did you mean data.tokenizer?",
        ),
        ("[run]\nseed = '1'", "y.toml: run.seed must be an integer, not '1'."),
        (
            "[data.sources]\npath = 'x'",
            "y.toml: data.sources is a list of tables, so write [[data.sources]]",
        ),
        (
            "[[data.sources]]\nweight = 2",
            "y.toml: data.sources.0.path is missing; set it (a .jsonl",
        ),
        ("data = 3", "y.toml: data is a section, so write [data]"),
        ("[run\n", "y.toml: this is not valid TOML: Expected ']'"),
        ("extends = ['x.toml']", "y.toml: extends must be the name of one file"),
        ("extends = 'gone.toml'", "gone.toml: there is no such recipe file"),
    ],
)
def test_mistakes_in_a_file_name_the_file(recipe: str, text: str, sentence: str) -> None:
    Path("y.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load(TrainRecipe, [recipe, "y.toml"])
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_a_missing_section_says_which_keys_it_needs(recipe: str) -> None:
    Path("y.toml").write_text("[run]\ndir = 'r'\n")
    with pytest.raises(
        ConfigError,
        match=r"^y\.toml: section \[schedule\] is missing; set schedule\.learning_rate\.$",
    ):
        load(TrainRecipe, ["y.toml"])


SHAPE = [
    "--model.path=",
    "--data.tokenizer=t",
    "--model.shape.hidden_size=64",
    "--model.shape.num_layers=1",
    "--model.shape.ffn_size=8",
]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--model.path="], "model.path"),
        (["--run.dir="], "run.dir"),
        (["--data.sources=[]"], "data.sources"),
        (["--data.batch_samples=0"], "data.batch_sequences"),
        (["--data.sequence_tokens=512"], "data.micro_batch_tokens"),
        (["--schedule.total_steps=0"], "schedule.total_steps"),
        (["--schedule.final_learning_rate=1"], "schedule.final_learning_rate"),
        (["--schedule.decay_steps=2"], "schedule.decay_steps"),
        (["--schedule.kind=wsd", "--schedule.decay_steps=11"], "schedule.decay_steps"),
        (
            ["--schedule.kind=wsd", "--schedule.decay_steps=6", "--schedule.warmup_steps=5"],
            "schedule.decay_steps",
        ),
        (["--schedule.kind=wsd", "--schedule.decay_from_step=6"], "schedule.decay_from_step"),
        (
            ["--schedule.kind=wsd", "--schedule.decay_from_step=6", "--schedule.decay_steps=5"],
            "schedule.total_steps",
        ),
        (["--schedule.warmup_steps=11"], "schedule.warmup_steps"),
        (
            ["--schedule.warmup_steps=1", "--schedule.warmup_fraction=0.1"],
            "schedule.warmup_fraction",
        ),
        (
            [*SHAPE, "--model.shape.num_heads=4", "--model.shape.num_kv_heads=3"],
            "model.shape.num_kv_heads",
        ),
        (
            [*SHAPE, "--model.shape.num_heads=3", "--model.shape.num_kv_heads=3"],
            "model.shape.num_heads",
        ),
        (
            [*SHAPE, "--model.shape.num_heads=64", "--model.shape.num_kv_heads=1"],
            "model.shape.head_dim",
        ),
        (
            [
                *SHAPE,
                "--model.shape.num_heads=2",
                "--model.shape.num_kv_heads=1",
                "--data.tokenizer=",
            ],
            "data.tokenizer",
        ),
        (
            [*SHAPE, "--model.shape.num_heads=2", "--model.shape.num_kv_heads=1", "--model.path=m"],
            "model.path",
        ),
    ],
)
def test_combinations_that_cannot_work(recipe: str, options: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        sft(*options)
    assert key in str(error.value)
    assert str(error.value).startswith(("option --", "x.toml: "))


def test_cpt_rejects_a_batch_of_samples(recipe: str) -> None:
    with pytest.raises(ConfigError, match="batch_samples is for SFT"):
        load(TrainRecipe, [recipe], verb="cpt")


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--rl.over_sample_prompts=1", "rl.over_sample_prompts"),
        ("--rl.mini_batches=1000", "rl.mini_batches"),
        ("--rl.overlong_buffer_tokens=9000", "rl.overlong_buffer_tokens"),
        ("--rl.loss=ppo", "rl.loss"),
        ("--rl.clip_dual=0.5", "rl.clip_dual"),
        ("--rl.correction_floor=0.5", "rl.correction_floor"),
        ("--rl.correction=icepop", "rl.correction"),
        ("--rl.kl_coefficient=0.1", "rl.reference"),
        ("--rl.reference=here", "rl.reference"),
        ("--data.batch_samples=4", r"data\.batch_samples is not used by RL.*; remove it\.$"),
        ("--data.batch_sequences=4", "data.batch_sequences is not used by RL"),
        ("--data.validation_sources.0.path=v.jsonl", "data.validation_sources is not used by RL"),
        ("--train.epochs=1", "train.epochs is not used by RL"),
        ("--rollout.urls=['http://127.0.0.1:1']", "rollout.urls names servers"),
        ("--rollout.engines=2", "rollout.engines is for servers that infir2 starts"),
        ("--rollout.server_options=['--x']", "rollout.server_options is for servers"),
        ("--rollout.kv_cache_dtype=fp8_e4m3", "rollout.kv_cache_dtype = fp8_e4m3 would change"),
        ("--rollout.engine=sglang", "rollout.python is missing"),
        ("--rollout.engine=vllm --rollout.exact=true", "rollout.exact is for rollout.engine"),
        ("--rollout.exact=true --rl.max_off_policy_steps=1", "rollout.exact compares with"),
        ("--rl.top_p=0.9", r"rl.top_p is not a key: neither engines nor the trainer"),
        ("--rl.stop=['']", "rl.stop has an empty text"),
        ("--rl.template_options=['enable_thinking']", "rl.template_options are NAME=VALUE"),
        ("--rl.partial=true", "rl.partial needs rl.chunk_tokens"),
        ("--rl.chunk_tokens=8192", r"rl.chunk_tokens \(8192\) must be below"),
        ("--rl.group_size=1", "rl.group_size"),
        ("--rollout.sleep=true", "rollout.sleep is for SGLang and vLLM servers that infir2 starts"),
        ("--rollout.weight_transfer=nccl", "rollout.weight_transfer = nccl is for rollout.engine"),
        ("--rollout.engine=VLLM", "rollout.engine"),
    ],
)
def test_combinations_of_rl(recipe: str, option: str, key: str) -> None:
    options = ["--data.batch_samples=0"]  # of the SFT recipe
    assert load(RlRecipe, [recipe], options).recipe.rl.group_size == 16
    with pytest.raises(ConfigError, match=key):
        load(RlRecipe, [recipe], [*options, *option.split()])


def test_an_environment_leaves_groups_unfinished_that_may_go_on(recipe: str) -> None:
    options = ["--data.batch_samples=0", "--rl.partial=true", "--rl.environment=calculator"]
    assert load(RlRecipe, [recipe], options).recipe.rl.partial


def test_evaluation_needs_a_model_and_problems(recipe: str) -> None:
    Path("e.toml").write_text("[[evaluate.problems]]\npath = 'p.jsonl'\n")
    assert (
        load(EvalRecipe, ["e.toml"], ["--model.path=m", "--run.dir=r"])
        .recipe.evaluate.problems[0]
        .path
        == "p.jsonl"
    )
    with pytest.raises(ConfigError, match=r"e\.toml: model\.path is missing"):
        load(EvalRecipe, ["e.toml"])
    with pytest.raises(ConfigError, match=r"evaluate\.problems is empty"):
        load(EvalRecipe, ["e.toml"], ["--model.path=m", "--evaluate.problems=[]"])
    with pytest.raises(ConfigError, match=r"run\.dir is missing"):
        load(EvalRecipe, ["e.toml"], ["--model.path=m"])


@pytest.mark.parametrize("path", recipe_files(), ids=name_of)
def test_every_shipped_recipe_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe_class, stage = class_of(path), stage_of(path)
    options = ["--model.path=m", "--run.dir=r"] if stage == "eval" else []
    verb = stage if stage in ("cpt", "sft") else ""
    loaded = load(recipe_class, [path], options, verb=verb)
    assert not list(violations(loaded.recipe))


def test_every_base_recipe_is_valid_toml() -> None:
    bases = list((ROOT / "recipes").rglob("base.toml"))
    assert bases
    for path in bases:
        tomllib.loads(path.read_text())
