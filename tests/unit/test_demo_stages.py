"""The demo's plan and the README's commands are the same commands, and each of them parses."""

import json
import os
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import infir2.demo.stages
from infir2.cli import main
from infir2.cli.demo import SEED
from infir2.config.load import load
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe
from infir2.demo.stages import SIDE_NICENESS, STAGES, SideStages, Stage, plan
from infir2.evaluate.statistics import Evaluation
from infir2.report import StageRow
from infir2.report.stages import Change

ROOT = Path(__file__).parents[2]
CLASSES = {"cpt": TrainRecipe, "sft": TrainRecipe, "rl": RlRecipe, "eval": EvalRecipe}


def readme_commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    return [shlex.split(line)[1:] for line in re.findall(r"^infir2 .*$", text, re.MULTILINE)]


def commands_with_a_recipe() -> list[list[str]]:
    """Without the recipes that `infir2 init` writes, which tests/unit/test_starter.py runs."""
    written = [words[1] for words in readme_commands() if words[0] == "init"]
    return [
        words
        for words in readme_commands()
        if words[0] in CLASSES and str(Path(words[1]).parent) not in written
    ]


def recipe_of(words: list[str]) -> object:
    paths = [word for word in words[1:] if word.endswith(".toml")]
    return load(
        CLASSES[words[0]], paths, [word for word in words[1:] if word.startswith("--")], {}
    ).recipe


@pytest.mark.parametrize("words", commands_with_a_recipe(), ids=" ".join)
def test_readme_commands_with_a_recipe_parse(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe_of(words)


def test_the_readme_shows_what_the_demo_runs() -> None:
    stages, _ = plan(Path("runs/demo"), 1236)
    told = {(words[0], words[1].removeprefix("recipes/demo/")) for words in readme_commands()}
    for stage in stages:
        if stage.arguments[0] in ("cpt", "sft", "rl"):
            assert (stage.arguments[0], Path(stage.arguments[1]).name) in told, stage.name


def test_the_readme_block_repeats_the_demo_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """So each command, pasted after the demo, finds its own output."""
    monkeypatch.chdir(ROOT)
    stages, side = plan(Path("runs/demo"), SEED)
    recipes = [recipe_of(list(s.arguments)) for s in [*stages, *side] if s.arguments[0] in CLASSES]
    others = [list(stage.arguments) for stage in stages if stage.arguments[0] not in CLASSES]
    text = (ROOT / "README.md").read_text().split("infir2 data demo")[1].split("```")[0]
    for line in f"infir2 data demo{text}".splitlines()[:-1]:
        words = shlex.split(line)[1:]
        if words[0] in CLASSES:
            assert recipe_of(words) in recipes, line
        else:
            assert words in [arguments[: len(words)] for arguments in others], line


def test_the_table_of_stages_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = Evaluation(0.5, 0.0, 1.0, 4, 0.75, 0.5, 1, 0.0, 0.0, 0.0, 9.0, 12.0, {})
    row = StageRow("sft1", tmp_path / "sft1", scores, Change(), "")
    echo = Stage("data", ())
    monkeypatch.setattr(Stage, "command", property(lambda _: ["echo", "of a stage"]))
    monkeypatch.setattr(infir2.demo.stages, "plan", lambda *_: ([echo], []))
    monkeypatch.setattr(infir2.demo.stages, "write_report", lambda _, page: page)
    monkeypatch.setattr(infir2.demo.stages, "stage_table", lambda _: [row])
    assert main(["demo", str(tmp_path), "--json"]) == 0
    output = capfd.readouterr()
    result = json.loads(output.out)
    assert result["report"] == str(tmp_path / "report.html")
    (stage,) = result["stages"]
    assert (stage["stage"], stage["avg_at_k"], stage["k"]) == ("sft1", 0.5, 4)
    assert (stage["low"], stage["high"]) == (0.0, 1.0)
    assert stage["change"] is stage["change_interval"] is None
    assert "of a stage" in output.err


def test_each_stage_of_the_plan_parses_and_starts_from_the_one_before(tmp_path: Path) -> None:
    stages, side = plan(tmp_path, 5)
    recipes = {
        stage.name: recipe_of(list(stage.arguments))
        for stage in [*stages, *side]
        if stage.arguments[0] in CLASSES
    }
    assert {recipe.run.seed for recipe in recipes.values()} == {5}  # type: ignore[attr-defined]
    for before, name in pairwise(STAGES):
        assert recipes[name].model.path == str(tmp_path / before)  # type: ignore[attr-defined]
    assert recipes["rl2"].rollout.model == str(tmp_path / "rl1-fp8")  # type: ignore[attr-defined]
    assert not recipes["cpt-bf16"].fp8.enabled  # type: ignore[attr-defined]
    known = {stage.name for stage in stages}
    assert all(stage.after in known for stage in side)


def test_the_two_cpt_runs_differ_in_nothing_but_fp8(tmp_path: Path) -> None:
    stages, side = plan(tmp_path, 5)
    words = {stage.name: list(stage.arguments) for stage in [*stages, *side]}
    fp8, bf16 = recipe_of(words["cpt"]).model_dump(), recipe_of(words["cpt-bf16"]).model_dump()  # type: ignore[attr-defined]
    assert {key for key in fp8 if fp8[key] != bf16[key]} == {"run", "fp8"}
    assert {key for key in fp8["run"] if fp8["run"][key] != bf16["run"][key]} == {"dir"}


def test_a_side_stage_leaves_the_cores_to_the_others(tmp_path: Path, monkeypatch) -> None:
    told = "import os, time; time.sleep(0.5); print(os.nice(0))"
    monkeypatch.setattr(Stage, "command", property(lambda _: [sys.executable, "-c", told]))
    side = SideStages([Stage("side", (), after="data")], tmp_path)
    side.start_after("data")
    side.wait()
    assert int((tmp_path / "side.log").read_text()) == min(19, os.nice(0) + SIDE_NICENESS)
