"""`infir2 plan`: every measured step of docs/results within its bounds, and what the plan says."""

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from infir2.cli import main
from infir2.config import load
from infir2.config.schema import RlRecipe, TrainRecipe
from infir2.engines.server_room import require_room
from infir2.errors import ConfigError
from infir2.parallel.mesh import Sizes
from infir2.planner.estimate import Job
from infir2.planner.gpus import find_gpu, package_json
from infir2.planner.layouts import candidates
from infir2.planner.model import shape_of
from infir2.planner.rows import Row, measured_rows
from infir2.planner.step_time import step_seconds
from infir2.planner.work import Load, Work, step_work
from infir2.preflight.gpu_memory import gpu_ledger, linear_parameters, num_parameters

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
TIME_BOUND, MEMORY_BOUND = 0.15, 0.10


def rows_of_the_documents() -> list[Row]:
    """Read from docs/results now, so that a step measured later is judged too."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from calibrate import all_rows
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return all_rows()


ROWS = rows_of_the_documents()


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.source} {row.name}" for row in ROWS])
def test_a_measured_step_is_met(row: Row) -> None:
    assert abs(row.predicted_milliseconds() / row.milliseconds - 1) <= TIME_BOUND
    if row.peak_gib:
        assert abs(row.predicted_gib() / row.peak_gib - 1) <= MEMORY_BOUND


def test_the_package_has_the_rows_of_the_documents() -> None:
    """Compared as JSON, where a tuple is a list."""
    documents = [json.loads(json.dumps(asdict(row))) for row in ROWS]
    packaged = [json.loads(json.dumps(asdict(row))) for row in measured_rows()]
    assert len(documents) >= 30
    assert packaged == documents, "after a new measurement: python bench/calibrate.py --write"


def test_rows_that_a_fit_has_not_seen_are_met_too() -> None:
    errors = package_json("constants.json")["largest_error"]
    assert errors["held_out"] <= TIME_BOUND
    assert errors["memory"] <= MEMORY_BOUND


def test_few_constants() -> None:
    constants = package_json("constants.json")["constants"]
    assert len(constants) <= len(ROWS) / 2.5
    assert all(value > 0 for value in constants.values())


def plan(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def plan_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    return json.loads(plan(capsys, *words, "--json"))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("qwen2.5-*/[crs]*.toml")), ids=str)
def test_every_recipe_of_a_real_model_is_planned(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if path.name == "base.toml":
        return
    text = plan(capsys, path, "--gpu=h100", "--gpus=8", "--nodes=4")
    for word in ("memory a GPU", "step   ", "tokens/s", "the run", "recommended", "how sure"):
        assert word in text
    assert "on 32 x H100 80GB (4 nodes of 8)" in text
    assert max(map(len, text.splitlines())) < 300


def test_a_plan_as_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan_json(capsys, RECIPES / "qwen2.5-7b/cpt.toml", "--gpu", "h200", "--gpus", 8)
    written = made["written"]
    assert sum(written["memory_bytes"].values()) / 2**30 == pytest.approx(written["peak_gib"], 1e-2)
    assert sum(written["seconds"].values()) == pytest.approx(written["step_seconds"], abs=1e-2)
    tokens = 128 * 32768
    assert written["tokens_per_second"] * written["step_seconds"] == pytest.approx(tokens, 1e-3)
    hours = made["steps"] * written["step_seconds"] / 3600
    assert written["gpu_hours"] == pytest.approx(8 * hours, 1e-2)
    assert written["days"] == pytest.approx(hours / 24, 1e-2)
    assert made["recommended"]["step_seconds"] <= written["step_seconds"]
    assert made["recommended"]["fits"]


@pytest.mark.parametrize("stage", ["rl1", "rl2"])
def test_rl_as_the_reference_ran_it_fits_beside_its_servers(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 nodes of 8 GPUs with 80 GB; SGLang on the same GPUs, 4 to a server, half of the memory."""
    path = RECIPES / f"qwen2.5-7b/{stage}.toml"
    recipe = load(RlRecipe, [path]).recipe
    assert recipe.rollout.engine == "sglang"
    assert recipe.rollout.engines * recipe.rollout.tensor_parallel == 32
    made = plan_json(capsys, path, "--gpu=h100", "--gpus=8", "--nodes=4")["written"]
    assert made["parallel"] == {"dp_replicate": 1, "dp": 4, "cp": 2, "tp": 4}
    assert made["memory_bytes"]["servers"] / 2**30 == pytest.approx(79.1 / 2, abs=0.1)
    assert made["fits"]
    asleep = plan_json(capsys, path, "--gpu=h100", "--gpus=8", "--nodes=4", "--rollout.sleep=true")
    assert "servers" not in asleep["written"]["memory_bytes"]


def test_the_recommended_options_make_the_recommended_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [RECIPES / "qwen2.5-7b/cpt.toml", "--gpu=h100", "--gpus=8", "--nodes=4"]
    options = re.search(r"recommended: (.*)", plan(capsys, *words))[1].split()
    before, after = plan_json(capsys, *words), plan_json(capsys, *words, *options)
    assert after["written"] == before["recommended"]
    assert "recommended: as it is written" in plan(capsys, *words, *options)


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = [RECIPES / "qwen2.5-7b/cpt.toml", "--gpu=h100", "--model.path=Qwen2.5-72B"]
    text = plan(capsys, *words)
    assert "DOES NOT FIT" in text
    assert "no layout of these GPUs fits; try " in text
    assert "DOES NOT FIT" in plan(capsys, RECIPES / "qwen2.5-7b/cpt.toml", "--gpu=h100")


def test_more_gpus_and_shorter_rows_take_less_time(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES / "qwen2.5-7b/sft1.toml"
    one, eight = (plan_json(capsys, recipe, "--gpu=h200", f"--gpus={n}") for n in (1, 8))
    assert one["written"]["step_seconds"] / 8 < eight["written"]["step_seconds"]
    assert eight["written"]["step_seconds"] < one["written"]["step_seconds"] / 4
    assert eight["written"]["peak_gib"] < one["written"]["peak_gib"]
    short = plan_json(capsys, recipe, "--gpu=h200", "--gpus=8", "--sample-tokens=4096")
    assert short["written"]["step_seconds"] < eight["written"]["step_seconds"] / 6
    assert not any("row is taken as" in note for note in short["assumptions"])


def test_fp8_is_set_against_bf16_and_needs_hopper(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES / "qwen2.5-7b/cpt.toml"
    h100 = plan_json(capsys, recipe, "--gpu=h100", "--gpus=8")
    bf16 = plan_json(capsys, recipe, "--gpu=h100", "--gpus=8", "--fp8.enabled=false")
    measured = bf16["written"]["step_seconds"] / h100["written"]["step_seconds"]
    assert h100["fp8_speedup"] == pytest.approx(measured, 1e-2)
    assert h100["fp8_speedup"] > 1.1
    assert 256 < h100["fp8_faster_from_tokens"] <= 16384
    a100 = plan_json(capsys, recipe, "--gpu=a100", "--gpus=8", "--fp8.enabled=false")
    assert a100["fp8_speedup"] == 0
    assert a100["written"]["step_seconds"] > 2 * bf16["written"]["step_seconds"]


def test_graphs_free_a_small_model_from_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    words = [RECIPES / "qwen2.5-1.5b/cpt.toml", "--gpu=h200", "--model.path=Qwen2.5-0.5B"]
    words += ["--data.micro_batch_tokens=8192", "--data.sequence_tokens=8192"]
    auto, on, off = (
        plan_json(capsys, *words, f"--train.cuda_graphs={value}")["written"]
        for value in ("auto", "true", "false")
    )
    assert auto == on
    assert on["step_seconds"] < 0.7 * off["step_seconds"]
    assert on["seconds"]["waiting for the host"] < 0.1 * on["step_seconds"]
    assert on["memory_bytes"]["CUDA graphs"] > 0
    assert on["memory_bytes"]["gradients"] >= off["memory_bytes"]["gradients"]
    assert "CUDA graphs" not in off["memory_bytes"]


def test_a_micro_batch_that_is_not_full_runs_without_graphs() -> None:
    row = next(row for row in ROWS if row.name == "0.5B-8k BF16, graphs")
    assert row.load().uses_graphs
    assert not replace(row.load(), tokens=6000).uses_graphs


def test_a_plan_recommends_no_layout_that_the_recipe_refuses() -> None:
    recipe = load(TrainRecipe, [RECIPES / "qwen2.5-1.5b/cpt.toml"], ["--train.cuda_graphs=true"])
    job = Job(shape_of(recipe.recipe.model)[0], recipe.recipe, find_gpu("h200"), 8, 1, 8192)
    assert list(candidates(job)) == [Sizes(dp_replicate=8)]


def replicas_load(sizes: Sizes, nodes: int = 1, micro_batches: int = 1) -> Load:
    row = next(row for row in ROWS if row.name == "1.5B-8k FP8")
    return replace(row.load(), sizes=sizes, nodes=nodes, micro_batches=micro_batches)


def test_whole_replicas_wait_for_one_collective_after_the_backward() -> None:
    gpu, constants = find_gpu("h200"), package_json("constants.json")["constants"]
    load = replicas_load(Sizes(dp_replicate=4))
    gradients = 4 * num_parameters(load.config)
    seconds = constants["NCCL"] * 2 * gradients * 3 / 4 / (gpu.link_gb_s * 1e9)
    for micro_batches in (1, 16):
        found = step_seconds(replicas_load(load.sizes, 1, micro_batches), gpu)["communication"]
        assert found == pytest.approx(seconds)
    over_nodes = step_seconds(replicas_load(load.sizes, nodes=4), gpu)["communication"]
    assert over_nodes == pytest.approx(seconds * gpu.link_gb_s / gpu.network_gb_s)
    two_a_node = step_seconds(replicas_load(load.sizes, nodes=2), gpu)["communication"]
    assert two_a_node == pytest.approx(over_nodes / 2)
    assert "communication" not in step_seconds(replicas_load(Sizes()), gpu)


def test_replicas_of_shards_send_gradients_under_the_backward() -> None:
    gpu = find_gpu("h200")
    one, two = (
        step_seconds(replicas_load(Sizes(dp_replicate=n, dp=4)), gpu)["communication"]
        for n in (1, 2)
    )
    replicas = step_work(replicas_load(Sizes(dp_replicate=2, dp=4))).replica_bytes
    assert 0 < two - one < replicas / (gpu.link_gb_s * 1e9)


def test_a_reason_names_the_nearest_layout_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = [RECIPES / "qwen2.5-7b/sft1.toml", "--gpu=h100", "--gpus=8"]
    reasons = [reason for reason in plan_json(capsys, *words)["why"] if reason.startswith("tp ")]
    assert reasons
    assert not any("would not fit" in reason for reason in reasons), "with full recompute it does"


def test_moments_in_host_memory_take_time() -> None:
    gpu, load = find_gpu("h200"), replicas_load(Sizes(dp_replicate=2))
    optimizer = load.recipe.optimizer.model_copy(update={"offload": True})
    offloaded = replace(load, recipe=load.recipe.model_copy(update={"optimizer": optimizer}))
    slower = step_seconds(offloaded, gpu)["update"] - step_seconds(load, gpu)["update"]
    assert slower == pytest.approx(16 * num_parameters(load.config) / 50e9)


def test_collectives_are_those_of_the_layout() -> None:
    """cp receives the others' keys; weights that stay gathered are gathered once a pass."""

    def work(sizes: Sizes, **gathers: bool) -> Work:
        load = replicas_load(sizes)
        section = load.recipe.parallel.model_copy(update=gathers)
        return step_work(replace(load, recipe=load.recipe.model_copy(update={"parallel": section})))

    shape, tokens = replicas_load(Sizes()).config, 16384
    keys = 2 * 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * tokens
    assert work(Sizes(cp=2)).tensor_bytes == 2 * keys / 2
    assert work(Sizes(cp=4)).tensor_bytes == 2 * keys * 3 / 4
    stream = shape.hidden_size * shape.num_layers * tokens
    assert work(Sizes(tp=2)).tensor_bytes == 2 * (1 + 4 + 2 + 4) * stream / 2
    twice, once = (work(Sizes(dp=2), reshard_after_forward=kept) for kept in (True, False))
    assert twice.shard_bytes - once.shard_bytes == linear_parameters(shape) / 2


def rl_seconds(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, float]:
    words = [RECIPES / "qwen2.5-7b/rl1.toml", "--gpu=h100", "--gpus=8", "--nodes=4"]
    found: dict[str, float] = plan_json(capsys, *words, *options)["written"]["seconds"]
    return found


def test_the_parts_of_an_rl_step(capsys: pytest.CaptureFixture[str]) -> None:
    usual = rl_seconds(capsys)
    trained = sum(usual.values()) - usual["generation"]
    ahead = rl_seconds(capsys, "--rl.max_off_policy_steps=1", "--rollout.sleep=false")
    beyond = max(0.0, usual["generation"] - trained)
    assert ahead.get("generation", 0.0) == pytest.approx(beyond, abs=1e-2)
    twice = rl_seconds(capsys, "--rl.passes=2")
    assert twice["head"] == pytest.approx(2 * usual["head"], rel=1e-3)
    assert twice["log-probabilities"] == usual["log-probabilities"]
    fewer = rl_seconds(capsys, "--rollout.engines=4")
    assert fewer["generation"] > 1.2 * usual["generation"]
    referred = rl_seconds(capsys, "--rl.reference=x", "--rl.kl_coefficient=0.1")
    assert referred["log-probabilities"] == pytest.approx(2 * usual["log-probabilities"], rel=1e-3)
    longer = rl_seconds(capsys, "--sample-tokens=16000", "--data.sequence_tokens=4096")
    assert longer["attention"] == rl_seconds(capsys, "--sample-tokens=16000")["attention"]


def test_whole_replicas_have_the_memory_of_one_gpu() -> None:
    load = replicas_load(Sizes())
    one = gpu_ledger(load.config, load.recipe)
    assert gpu_ledger(load.config, load.recipe, Sizes(dp_replicate=8)) == one


@pytest.mark.parametrize("options", [
    "--rollout.urls=http://a:1,http://b:1",
    "--rollout.engines=4",
    "--rollout.engines=8",
    "--rollout.engines=4 --rollout.memory_fraction=0",
    "--rollout.engines=1 --rollout.tensor_parallel=16",
])  # fmt: skip
def test_a_plan_and_a_start_agree_on_the_room_of_servers(
    options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = RECIPES / "qwen2.5-7b/rl1.toml"
    words = options.split()
    if "urls" in options:
        words += ["--rollout.engines=1", "--rollout.tensor_parallel=1", "--rollout.python="]
        words += ["--rollout.memory_fraction=0", "--rollout.server_options="]
    rollout = load(RlRecipe, [path], words).recipe.rollout
    try:
        require_room(rollout, 8)
        refusal = ""
    except ConfigError as error:
        refusal = str(error).rstrip(".")
    said = plan_json(capsys, path, "--gpu=h100", "--gpus=8", *words)["assumptions"]
    assert (refusal in said) == bool(refusal)
    assert any("rollout.engines" in note for note in said) == ("rollout.engines" in refusal)


def test_two_servers_on_a_gpu_take_twice_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    words = [RECIPES / "qwen2.5-7b/rl1.toml", "--gpu=h100", "--gpus=8"]
    two, four = (plan_json(capsys, *words, f"--rollout.engines={n}")["written"] for n in (2, 4))
    assert four["memory_bytes"]["servers"] == 2 * two["memory_bytes"]["servers"]
    assert not four["fits"]


def test_how_sure_a_plan_is(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES / "qwen2.5-1.5b/cpt.toml"
    levels = {
        ("--gpu=h100",): "high",
        ("--gpu=h200", "--gpus=8"): "medium",
        ("--gpu=h200", "--gpus=2", "--parallel.dp_replicate=2"): "medium",
        ("--gpu=h200", "--gpus=8", "--nodes=2"): "low",
        ("--gpu=a100", "--fp8.enabled=false"): "low",
    }
    for words, level in levels.items():
        assert plan_json(capsys, recipe, *words)["certainty"] == level


def test_rates_of_another_gpu_are_read_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.json"
    half = asdict(find_gpu("h100")) | {"name": "mine", "bf16_tflops": 370, "fp8_tflops": 610}
    path.write_text(json.dumps(half))
    recipe = RECIPES / "qwen2.5-1.5b/cpt.toml"
    slow, fast = (plan_json(capsys, recipe, f"--gpu={gpu}") for gpu in (path, "h100"))
    assert slow["gpu"] == "mine"
    assert slow["written"]["step_seconds"] > 1.2 * fast["written"]["step_seconds"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", "the following arguments are required: --gpu"),
        ("--gpu=h10", "--gpu h10 is not one of h100, h200, a100; did you mean h100?"),
        ("--gpu=b200", "`infir2 bench --to FILE.json` on a machine with that GPU"),
        ("--gpu=broken.json", "--gpu broken.json: not a file of infir2 bench"),
        ("--gpu=words.json", "--gpu words.json: not a file of infir2 bench (a rate is not"),
        ("--gpu=three.json", "--gpu three.json: not a file of infir2 bench (a rate is not"),
        ("--gpu=missing.json", "--gpu missing.json: not a file of infir2 bench"),
        ("--gpu=h100 --gpus=0", "argument --gpus: invalid positive integer value: '0'"),
        ("--gpu=h100 --gpus=eight", "argument --gpus: invalid positive integer value: 'eight'"),
        ("--gpu=h100 --nodes=-1", "argument --nodes: invalid positive integer value: '-1'"),
        ("--gpu=h100 --gpus=8 --parallel.dp=4", "needs 4 processes and this run has 8"),
        ("--gpu=h100 --gpus=8 --parallel.tp=3", "= 3 does not divide the 8 processes"),
        ("--gpu=h100 --gpus=8 --parallel.tp=8", "the nearest sizes that work for this model: 2"),
        ("--gpu=h100 --gpus=2 --optimizer.moment_dtype=fp8", "need one process, not 2"),
        ("--gpu=h100 --gpus=2 --train.cuda_graphs=true", "needs a whole model on each GPU"),
        ("--gpu=h100 --gpus=2 --train.observe_every=5", "needs one process, not 2"),
        ("--gpu=a100", "A100 80GB has no block-scaled FP8"),
        ("--gpu=h100 --model.path=models/gpt2", "its name is none of qwen2.5-0.5b"),
        ("--gpu=h100 --gpu-count=8", "--gpu-count=8 is not an option of infir2 plan"),
        ("--gpu=h100 --lr=1e-4", "Did you mean --schedule.learning_rate=1e-4?"),
        ("--gpu=h100 --sample-tokens=4k", "argument --sample-tokens: invalid positive integer"),
        ("--gpu=h100 --model.recompute=some", "model.recompute must be 'none', 'selective' or"),
        ("--gpu=h100 nope.toml", "nope.toml: there is no such recipe file"),
        ("--gpu=h100 --resume", "The same command, run again, resumes."),
    ],
)
def test_mistakes_of_plan(
    options: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text('{"name": 3')
    rates = package_json("gpus.json")["h100"]
    Path("words.json").write_text(json.dumps(rates | {"launch_us": "x"}))
    Path("three.json").write_text(json.dumps(rates | {"flash_tflops": [1, 2, 3]}))
    code = main(["plan", str(RECIPES / "qwen2.5-1.5b/cpt.toml"), *options.split()])
    output = capsys.readouterr()
    assert code == 2
    assert sentence in output.err
    assert output.out == ""
    assert len(output.err.splitlines()) == 1


def test_bench_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--to", str(tmp_path / "gpu.json")]) == 2
    assert "infir2 bench measures a GPU, and torch sees none here" in capsys.readouterr().err


def test_a_plan_says_which_variables_it_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUM_ROLLOUT", "136")
    words = ["plan", str(RECIPES / "qwen2.5-7b/rl1.toml"), "--gpu=h100", "--gpus=8"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "NUM_ROLLOUT sets schedule.total_steps to '136'" in said.err
    assert "rollout.engines = 8 of 4 GPUs would put 4 servers on one" in said.out
    assert "set rollout.engines = 2" in said.out
    assert "rollout.engines" not in plan(capsys, *words[1:], "--nodes=4")


def test_an_evaluation_has_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "qwen2.5-7b/eval.toml"), "--gpu=h100"]) == 2
    assert "this is one of eval: infir2 check eval" in capsys.readouterr().err
