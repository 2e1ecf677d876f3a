"""`infir2 check`: what it finds before a run starts."""

import json
import re
from pathlib import Path

import pytest
import torch
from shipped_recipes import class_of, name_of, recipe_files

from infir2.cli import main
from infir2.config import dump, load
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe
from infir2.demo.world import make_demo_world
from infir2.errors import ConfigError
from infir2.parallel.mesh import Sizes
from infir2.preflight import memory
from infir2.preflight.checks import Preflight
from infir2.preflight.finding import Finding
from infir2.preflight.memory import memory_parts
from infir2.preflight.model import model_facts

RECIPE = """
[run]
dir = "{root}/run"
device = "cpu"
[model.shape]
hidden_size = 64
num_layers = 1
num_heads = 2
num_kv_heads = 1
ffn_size = 128
[data]
tokenizer = "{world}/tokenizer"
sequence_tokens = 128
micro_batch_tokens = 256
[schedule]
learning_rate = 1e-3
total_steps = 10
"""
CPT = '[[data.sources]]\npath = "{world}/cpt.jsonl"\n'


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("check") / "world"
    make_demo_world(directory, 1)
    return directory


@pytest.fixture
def recipe(tmp_path: Path, world: Path) -> Path:
    path = tmp_path / "x.toml"
    path.write_text((RECIPE + CPT).format(root=tmp_path, world=world))
    return path


def check(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, str]]:
    """Exit code, and the line of each check without its name: {"data": "ok ..."}."""
    code = main(["check", *(str(word) for word in words)])
    output = capsys.readouterr()
    lines = {
        line[6:16].strip(): f"{line[:5].strip()} {line[17:]}" for line in output.out.splitlines()
    }
    assert (code != 0) == ("infir2: error:" in output.err), output.err
    return code, lines


def test_a_good_recipe_passes_and_nothing_is_written(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = check(capsys, recipe, "--data.batch_sequences=2")
    assert code == 0
    assert list(lines) == [
        "recipe",
        "tokenizer",
        "data",
        "model",
        "parallel",
        "memory",
        "run dir",
        "disk",
        "machine",
    ]
    assert all(line.startswith(("ok", "warn")) for line in lines.values())
    assert "infir2 cpt" in lines["recipe"]
    assert "(min/median/99 %/max of 200 tried)" in lines["data"]
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["x.toml"]


def test_layers_that_servers_refuse_in_fp8_are_named(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [recipe, "--data.batch_sequences=2"]
    code, lines = check(capsys, *words)
    assert (code, lines["model"].split()[0]) == (0, "ok")  # training can do it
    assert "model.layers.*.self_attn.k_proj" in lines["model"]
    assert 'fp8.skip_modules = ["model.layers.*.' in lines["model"]
    for option in (
        "--model.shape.hidden_size=128",
        "--fp8.enabled=false",
        '--fp8.skip_modules=["*.self_attn.*", "*.mlp.*"]',
    ):
        sizes = ["--model.shape.num_heads=1"] if "hidden" in option else []
        _, lines = check(capsys, *words, option, *sizes)
        assert "refuse" not in lines["model"], option


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--schedule.learning_rate=2"], "schedule.learning_rate = 2 is outside the usual"),
        (["--schedule.learning_rate=1e-12"], "schedule.learning_rate = 1e-12 is outside"),
        (["--optimizer.weight_decay=10"], "optimizer.weight_decay = 10 is outside"),
        (["--optimizer.beta1=0.95", "--optimizer.beta2=0.9"], "beta1 = 0.95 is above optimizer.be"),
        (["--optimizer.eps=0.1"], "optimizer.eps = 0.1 is outside"),
        (["--schedule.warmup_steps=6"], "warmup_steps = 6 is more than half of total_steps = 10"),
        (["--schedule.warmup_fraction=0.9"], "schedule.warmup_fraction = 0.9 is outside"),
        (["--schedule.final_learning_rate=1e-5"], "final_learning_rate has no effect without"),
        (
            ["--schedule.kind=wsd", "--schedule.decay_from_step=2", "--schedule.decay_steps=3"],
            "the decay ends at step 5, before schedule.total_steps = 10",
        ),
        (["--rl.overlong_penalty=0.5"], "rl.overlong_penalty has no effect without"),
        (["--rl.temperature=100"], "rl.temperature = 100 is outside the usual 0.3 to 2"),
        (["--rl.clip_high=28"], "rl.clip_high = 28 is outside"),
        (["--evaluate.temperature=65"], "evaluate.temperature = 65 is outside"),
    ],
)
def test_a_value_that_is_hardly_meant_is_questioned(
    recipe: Path, options: list[str], sentence: str
) -> None:
    is_rl = options[0].startswith(("--rl", "--eval"))
    if not is_rl:
        options = [*options, "--data.batch_sequences=2"]
    loaded = load(RlRecipe if is_rl else TrainRecipe, [recipe], options, {})
    finding = Preflight(loaded, "rl" if is_rl else "cpt").resolved()
    assert finding.status == "warn"
    assert sentence in finding.detail


@pytest.mark.parametrize("path", recipe_files(), ids=name_of)
def test_no_value_of_a_recipe_is_questioned(path: Path) -> None:
    kind = class_of(path)
    named = ["--model.path=m", "--run.dir=r"] if kind is EvalRecipe else []
    assert Preflight(load(kind, [path], named, {}), "check").resolved().status == "ok"


def test_the_schedule_is_set_against_the_rows(
    recipe: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sft", recipe, f"--data.sources.0.path={world}/sft1.jsonl", "--data.batch_samples=5"]
    num_rows = sum(1 for _ in (world / "sft1.jsonl").open())
    _, lines = check(capsys, *words)
    assert f"10 steps of 5 rows, {50 / num_rows:.2g} passes over {num_rows:,}" in lines["data"]
    few = tmp_path / "few.jsonl"
    few.write_text("".join((world / "sft1.jsonl").read_text().splitlines(keepends=True)[:4]))
    code, lines = check(capsys, *words, f"--data.sources.0.path={few}")
    assert (code, lines["data"].startswith("warn")) == (0, True)
    assert "over 4: fewer than one step needs" in lines["data"]


def test_findings_are_data(recipe: Path) -> None:
    loaded = load(TrainRecipe, [recipe], ["--data.batch_sequences=2", "--data.tokenizer=/nowhere"])
    findings = {finding.check: finding for finding in Preflight(loaded, "cpt").findings()}
    assert findings["tokenizer"].status == "fail"
    assert findings["data"] == Finding("data", "skipped", "needs the tokenizer")
    assert findings["disk"].status == "ok"
    assert str(findings["data"]) == "skip  data       needs the tokenizer"


def test_the_verb_follows_from_sections_and_rows(
    recipe: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = check(
        capsys, recipe, f"--data.sources.0.path={world}/sft1.jsonl", "--data.batch_sequences=2"
    )
    assert (code, lines["recipe"].split(",")[0]) == (0, "ok infir2 sft")
    _, lines = check(capsys, "sft", recipe, "--data.batch_sequences=2")
    assert "no field `messages`" in lines["data"]
    evaluation = recipe.with_name("e.toml")
    evaluation.write_text(f'[[evaluate.problems]]\npath = "{world}/heldout.jsonl"\n')
    code, lines = check(
        capsys, evaluation, "--model.path=/nowhere/run", "--run.dir=/nowhere/scores"
    )
    assert lines["recipe"].startswith("ok infir2 eval")
    assert lines["model"].startswith("FAIL model.path: /nowhere/run does not exist")


def test_the_findings_as_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", str(recipe), "--data.batch_sequences=2", "--data.tokenizer=/nowhere"]
    assert main([*words, "--json"]) == 1
    output = capsys.readouterr()
    findings = {finding["check"]: finding for finding in json.loads(output.out)}
    assert findings["tokenizer"]["status"] == "fail"
    assert findings["disk"]["status"] == "ok"
    assert "of the checks failed (tokenizer" in output.err


def test_a_failed_check_is_named_and_dependent_checks_are_skipped(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = check(capsys, recipe, "--data.batch_sequences=2", "--data.tokenizer=/nowhere")
    assert code == 1
    assert lines["tokenizer"].startswith("FAIL data.tokenizer: /nowhere has no tokenizer.json")
    assert lines["data"].startswith("skip")
    assert lines["disk"].startswith("ok")


def test_unusable_rows_are_counted_with_an_example(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "1 + 1 = 2"}] * 97 + [{"text": ""}, {"text": None}, {"text": "3 + 4 = 7"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [recipe, f"--data.sources.0.path={data}", "--data.batch_sequences=2"]
    code, lines = check(capsys, *words)
    assert code == 1
    assert lines["data"].startswith(
        f"FAIL {data}: 2 of 100 rows tried are unusable (1 empty, 1 null_field; {data}:98:"
    )
    code, lines = check(capsys, *words, "--data.max_quarantined_fraction=0.02")
    assert code == 0
    assert "2 of 100 rows tried are unusable" in lines["data"]


def test_text_that_the_tokenizer_loses_is_a_warning(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "1 + 1 = 2"}) + "\n" + json.dumps({"text": "数学"}) + "\n")
    code, lines = check(capsys, recipe, f"--data.sources.0.path={data}", "--data.batch_sequences=2")
    assert code == 0
    assert lines["data"].startswith("warn")
    assert "1 whose text changes" in lines["data"]


def test_a_run_directory_that_cannot_be_used(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file, not a directory")
    code, lines = check(capsys, recipe, "--data.batch_sequences=2")
    assert code == 1
    assert lines["run dir"].startswith("FAIL run.dir:")


def test_a_changed_recipe_is_found_before_the_run_starts(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from infir2.checkpoint import Store
    from infir2.model import Decoder

    options = ["--data.batch_sequences=2"]
    with_run = tmp_path / "run"
    loaded = load(TrainRecipe, [recipe], options)
    assert loaded.recipe.model.shape is not None
    model = Decoder.from_shape(loaded.recipe.model.shape, vocab_size=200, seed=1)
    tensors = {
        f"parameters/{name}": parameter.detach() for name, parameter in model.named_parameters()
    }
    store = Store(with_run)
    path = store.save(7, tensors, {"model_config": model.config.to_hf()})
    store.close()
    shard = path / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))  # the checks read no tensor
    (with_run / "recipe.toml").write_text(dump(loaded))
    code, lines = check(capsys, recipe, *options)
    assert (code, lines["run dir"]) == (0, f"ok {with_run} resumes after step 7")
    assert f"{path}: qwen2" in lines["model"]
    code, lines = check(capsys, recipe, *options, "--run.seed=2")
    assert code == 1
    assert "run.seed = 1236, and now it is 2" in lines["run dir"]
    code, lines = check(capsys, recipe, *options, "--run.seed=2", "--accept-changes")
    assert code == 0
    assert lines["run dir"].startswith("warn")


def test_a_model_too_large_for_the_machine_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        recipe,
        "--data.batch_sequences=2",
        "--model.shape.hidden_size=65536",
        "--model.shape.num_layers=200",
    ]
    code, lines = check(capsys, *words)
    assert code == 1
    assert "lower data.micro_batch_tokens" in lines["memory"]
    assert "model.recompute = 'full'" in lines["memory"]
    assert "infir2 plan" in lines["memory"]
    assert lines["disk"].startswith("FAIL run.dir:")
    _, lines = check(capsys, *words, "--model.recompute=full")
    assert "model.recompute" not in lines["memory"]


def test_a_tokenizer_larger_than_the_model_is_refused_before_the_first_step(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(recipe), "--data.batch_sequences=2", "--model.shape.vocab_size=50"]
    code, lines = check(capsys, *words)
    assert (code, lines["model"][:4]) == (1, "FAIL")
    assert "tokens and the model 50 rows" in lines["model"]
    assert main(["cpt", *words]) == 2
    error = capsys.readouterr().err
    assert "tokens and the model 50 rows" in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_memory_follows_the_keys_that_save_it(recipe: Path) -> None:
    def activations(*options: str) -> dict[str, int]:
        loaded = load(
            TrainRecipe,
            [recipe],
            ["--data.batch_sequences=2", "--model.shape.num_layers=8", *options],
        ).recipe
        return memory_parts(loaded, model_facts(loaded.model, 100), "cuda")

    plain = activations()
    assert activations("--model.recompute=full")["activations"] < plain["activations"] / 3
    assert activations("--fp8.enabled=false")["activations"] > plain["activations"]
    assert activations("--data.micro_batch_tokens=512")["activations"] == 2 * plain["activations"]
    assert activations("--optimizer.moment_dtype=fp8")["optimizer"] < plain["optimizer"] / 3
    wide = [
        activations(f"--train.loss_chunk_tokens={chunk}", "--model.shape.vocab_size=150000")
        for chunk in (32, 128, 256)
    ]
    assert wide[0]["head and working memory"] == wide[1]["head and working memory"] // 4
    # Of several chunks, the logits of the one before are still there.
    assert wide[1]["head and working memory"] == 128 * 150_000 * 10
    assert wide[2]["head and working memory"] == 256 * 150_000 * 6


def test_memory_is_that_of_the_longest_response(
    recipe: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt and response longer than a micro-batch is alone in its forward pass."""

    def activations(device: str, *options: str) -> int:
        loaded = load(RlRecipe, [recipe], ["--rl.max_prompt_tokens=100", *options]).recipe
        return memory_parts(loaded, model_facts(loaded.model, 100), device)["activations"]

    for device in ("cpu", "cuda"):
        fits = activations(device, "--rl.max_response_tokens=156")
        assert fits == activations(device, "--rl.max_response_tokens=10")
        assert activations(device, "--rl.max_response_tokens=412") == 2 * fits
    words = ["rl", recipe, f"--data.sources.0.path={world}/rl1.jsonl", "--rollout.model=/nowhere"]
    _, lines = check(capsys, *words, "--rl.max_response_tokens=10", "--rl.max_prompt_tokens=100")
    assert "in passes of 256 tokens" in lines["memory"]
    _, lines = check(capsys, *words, "--rl.max_response_tokens=900", "--rl.max_prompt_tokens=100")
    assert "in passes of up to 1,000 tokens" in lines["memory"]
    assert "data.micro_batch_tokens (256) is alone in its pass" in lines["memory"]


def test_memory_that_graphs_need_too_much_is_refused_with_the_key(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(memory, "device_memory", lambda _: 1000)
    for value, named in (("auto", True), ("false", False)):
        options = [f"--train.cuda_graphs={value}", "--data.batch_sequences=1"]
        loaded = load(TrainRecipe, [recipe], options).recipe
        with pytest.raises(ConfigError) as refused:
            memory.check_memory(loaded, model_facts(loaded.model, 100), Sizes())
        assert ("set train.cuda_graphs = false" in str(refused.value)) == named


def test_the_kv_cache_takes_what_the_requests_need_and_at_most_its_bound(
    recipe: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rl", recipe, f"--data.sources.0.path={world}/rl1.jsonl", "--rollout.model=/nowhere"]
    words += ["--rl.max_response_tokens=156", "--rl.max_prompt_tokens=100"]

    def cache(*options: str) -> float:
        _, lines = check(capsys, *words, *options)
        match = re.search(r"KV cache ([\d.]+)", lines["memory"])
        assert match, lines["memory"]
        return float(match[1])

    many = cache("--rollout.max_running_requests=4000")
    assert cache("--rollout.max_running_requests=2000") == pytest.approx(many / 2, abs=0.01)
    assert cache("--rollout.max_running_requests=4000", "--rollout.cache_gib=0.05") == 0.05
    code, lines = check(capsys, *words, "--rollout.cache_gib=0.00001")
    assert code != 0
    assert "one sequence of 256 tokens needs" in lines["memory"]
    _, lines = check(capsys, *words, "--rollout.cache_gib=0.00001", "--rollout.engine=infir2")
    assert "KV cache" not in lines["memory"], "a server has memory of its own"


def test_gpu_memory_has_one_name_for_gradients(recipe: Path) -> None:
    """At the start of the backward, and at its end where few tokens make that the peak."""
    for tokens in (128, 2**20):
        options = ["--data.batch_sequences=1", f"--data.micro_batch_tokens={tokens}"]
        options.append("--train.cuda_graphs=false")  # which would keep activations
        loaded = load(TrainRecipe, [recipe], [*options, "--model.shape.hidden_size=1024"]).recipe
        parts = memory_parts(loaded, model_facts(loaded.model, 100), "cuda")
        assert (parts["activations"] == 0) == (tokens == 128)
        assert parts["gradients"] > 0
        assert "grad_dtype" not in parts


def test_memory_is_that_of_one_process_of_several(recipe: Path) -> None:
    wide = [
        "--data.batch_sequences=2",
        "--model.shape.hidden_size=1024",
        "--model.shape.ffn_size=4096",
        "--model.shape.num_layers=24",
    ]
    loaded = load(TrainRecipe, [recipe], wide).recipe
    facts = model_facts(loaded.model, 100)
    for device in ("cuda", "cpu"):
        one, eight = (
            sum(memory_parts(loaded, facts, device, Sizes(dp=dp)).values()) for dp in (1, 8)
        )
        assert eight < one / 2
    half = memory_parts(
        load(TrainRecipe, [recipe], [*wide, "--optimizer.moment_dtype=bf16"]).recipe,
        facts,
        "cuda",
        Sizes(dp=8),
    )
    assert half["optimizer"] == memory_parts(loaded, facts, "cuda", Sizes(dp=8))["optimizer"] // 2


@pytest.mark.parametrize(
    ("options", "word", "sentence"),
    [
        (
            ["--parallel.dp=4", "--optimizer.grad_dtype=bf16"],
            "FAIL",
            'optimizer.grad_dtype = "bf16" need one process, not 4',
        ),
        (
            ["--parallel.dp=2", "--optimizer.moment_dtype=fp8"],
            "FAIL",
            'optimizer.moment_dtype = "fp8"',
        ),
        (["--parallel.dp=4"], "warn", "4 ranks read data and a step has 2 sequences"),
        (
            ["--parallel.dp=1", "--parallel.cp=4"],
            "warn",
            "parallel.cp = 4 pads micro-batches of 256 tokens to 1024",
        ),
        (["--parallel.dp=2"], "ok", "for 2 processes"),
        (["--optimizer.moment_dtype=fp8"], "ok", "for one process"),
    ],
)
def test_limits_of_several_processes(
    recipe: Path, capsys: pytest.CaptureFixture[str], options: list[str], word: str, sentence: str
) -> None:
    code, lines = check(capsys, recipe, "--data.batch_sequences=2", *options)
    assert code == (word == "FAIL")
    assert lines["parallel"].startswith(word)
    assert sentence in lines["parallel"]


def test_damaged_model_files_are_found_without_reading_weights(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    from infir2.model import Decoder, exported_weights, write_hf

    loaded = load(TrainRecipe, [recipe], ["--data.batch_sequences=2"]).recipe
    assert loaded.model.shape is not None
    model = Decoder.from_shape(loaded.model.shape, vocab_size=200, seed=1)
    write_hf(tmp_path / "hf", exported_weights(model), model.config.to_hf())
    text = recipe.read_text()
    recipe.write_text(text[: text.index("[model.shape]")] + text[text.index("[data]") :])
    words = [recipe, "--data.batch_sequences=2", f"--model.path={tmp_path}/hf"]
    code, lines = check(capsys, *words)
    assert (code, lines["model"].split()[0]) == (0, "ok")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, file
    )
    code, lines = check(capsys, *words)
    assert "1 weights are missing, such as model.norm.weight" in lines["model"]
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, file)
    code, lines = check(capsys, *words)
    assert (code, "model.norm.weight is [3], and its config calls for [64]" in lines["model"]) == (
        1,
        True,
    )


def test_the_jail_is_checked_for_rl_and_a_broken_one_is_reported(
    recipe: Path, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import infir2.verify
    from infir2.verify import JailError, Verdict

    words = ["rl", recipe, f"--data.sources.0.path={world}/rl1.jsonl", "--rollout.model=/nowhere"]
    monkeypatch.setattr(infir2.verify, "run_code", lambda *_: Verdict("ok"))
    _, lines = check(capsys, *words)
    assert lines["jail"].startswith(
        "FAIL the jail does not work on this machine: an honest program gave ok, a cheat ok"
    )

    def refuse(*_: object) -> Verdict:
        raise JailError("this machine refuses a jail")

    monkeypatch.setattr(infir2.verify, "run_code", refuse)
    _, lines = check(capsys, *words)
    assert lines["jail"] == "warn this machine refuses a jail"
    monkeypatch.undo()
    _, lines = check(capsys, *words)
    assert lines["jail"].startswith(
        ("ok honest ok, cheat error, endless loop timeout", "warn this machine refuses")
    )


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--rl.reward=no_module_here:f", "No module named 'no_module_here'"),
        ("--rl.environment=no_module_here:F", "No module named 'no_module_here'"),
        ("--rl.reward=http://example.com/x", "set INFIR2_REWARD_KEY"),
        ("--rl.reward=reasoning_gym:no_such_task", "reasoning_gym:no_such_task"),
    ],
)
def test_a_reward_that_is_not_there_fails_before_the_run(
    recipe: Path, world: Path, capsys: pytest.CaptureFixture[str], option: str, sentence: str
) -> None:
    words = ["rl", recipe, f"--data.sources.0.path={world}/rl1.jsonl", "--rollout.model=/nowhere"]
    _, lines = check(capsys, *words, option)
    assert lines["rewards"].startswith("FAIL")
    assert sentence in lines["rewards"]
    assert lines["verifier"].startswith("ok")
