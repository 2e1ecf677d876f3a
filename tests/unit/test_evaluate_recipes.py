"""recipes/qwen2.5-*/eval*.toml: the locked settings, the usual files' fields, one 80 GB GPU."""

import csv
import json
from pathlib import Path

import fake_evalscope
import pytest
import torch
from stages import make_model

from infir2.cli import main
from infir2.config.load import load
from infir2.config.schema import EvalRecipe, ShapeSection
from infir2.evaluate.benchmarks import BENCHMARKS
from infir2.model import ModelConfig
from infir2.model.memory import GIB
from infir2.preflight import memory
from infir2.preflight.model import ModelFacts

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = {
    "eval": "aime24",
    "eval-aime25": "aime25",
    "eval-gpqa": "gpqa_diamond",
    "eval-livecodebench": "live_code_bench",
}
SHAPES = {
    "1.5b": ShapeSection(
        hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2, ffn_size=8960
    ),
    "7b": ShapeSection(
        hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, ffn_size=18944,
        tie_embeddings=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SHAPES)
def test_the_recipes_are_those_of_all_benchmarks(size: str) -> None:
    found = {path.stem for path in (RECIPES / f"qwen2.5-{size}").glob("eval*.toml")}
    assert found == FILES.keys()


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("name", FILES)
def test_a_recipe_has_the_locked_settings_and_fits_one_gpu(
    size: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(EvalRecipe, [RECIPES / f"qwen2.5-{size}/{name}.toml"], [], {}, "eval").recipe
    benchmark, settings = BENCHMARKS[FILES[name]], recipe.evaluate
    assert (settings.samples, settings.max_response_tokens, settings.temperature) == (
        benchmark.samples,
        benchmark.max_tokens,
        0.65,
    )
    assert settings.top_p == 0.95
    if recipe.benchmarks.names:
        assert recipe.benchmarks.names == (benchmark.name,)
    else:
        assert settings.problems[0].prompt_field == "problem"
        assert "\\boxed{}" in settings.system_prompt
        assert settings.response_prefix == "<think>\n"
    monkeypatch.setattr(memory, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(memory, "device_memory", lambda _: 80 * 10**9)
    config = ModelConfig.from_shape(SHAPES[size], 152_064)
    facts = ModelFacts(config, {"1.5b": 1_544_000_000, "7b": 7_616_000_000}[size], "made new")
    finding = memory.check_evaluation_memory(recipe, facts, 2000)
    assert finding.status == "ok"
    monkeypatch.setattr(memory, "device_memory", lambda _: 3 * GIB)
    with pytest.raises(memory.ConfigError, match="not one fits"):
        memory.check_evaluation_memory(recipe, facts, 2000)


@pytest.fixture
def gpqa(tmp_path: Path) -> Path:
    path = tmp_path / "data/gpqa_diamond.csv"
    path.parent.mkdir()
    names = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, ["How much is 2+2?", "4", "5", "6", "7"]])
    return path


def words_for(world: Path, tmp_path: Path, gpqa: Path) -> list[str]:
    model = make_model(world, tmp_path / "model")
    return [
        str(RECIPES / "qwen2.5-7b/eval-gpqa.toml"), f"--model.path={model}",
        f"--benchmarks.data={gpqa}", f"--run.dir={tmp_path / 'run'}", "--evaluate.samples=2",
        "--evaluate.max_response_tokens=4",
    ]  # fmt: skip


def test_check_reads_the_files_of_a_benchmark_and_adds_up_the_memory(
    world: Path, tmp_path: Path, gpqa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(world, tmp_path, gpqa)
    assert main(["check", "eval", *words]) == 0
    said = capsys.readouterr().out
    assert "gpqa_diamond: 1 file" in said
    assert "at one time" in said
    for option, message in (
        (f"--benchmarks.data={tmp_path / 'none'}", "none does not exist"),
        ('--benchmarks.names=["gpqa"]', "did you mean gpqa_diamond?"),
    ):
        assert main(["check", "eval", *words, option]) == 1
        assert message in capsys.readouterr().out


def test_a_recipe_of_benchmarks_runs_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"problem": "How much is $2+3$?", "answer": "5"}]
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = fake_evalscope.make_environment(tmp_path / "es")
    monkeypatch.setenv("INFIR2_EVALSCOPE", str(environment))
    words = words_for(world, tmp_path, tmp_path / "aime24.jsonl")
    assert main(["eval", *words, '--benchmarks.names=["aime24"]']) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["complete"]
    assert result["benchmarks"]["aime24"]["known"] == 2
    assert result["settings"]["aime24.max_tokens"] == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--benchmarks.data="], "benchmarks.data and benchmarks.names belong together"),
        (["--rollout.engine=infir2"], "uses native or sglang or vllm"),
        (['--evaluate.problems=[{path = "p.jsonl"}]'], "are two evaluations"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(RECIPES / "qwen2.5-7b/eval-gpqa.toml")
    assert main(["eval", recipe, "--model.path=m", *options]) == 2
    assert sentence in capsys.readouterr().err
