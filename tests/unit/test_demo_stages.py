"""The demo's plan and the README's commands are the same commands, and each of them parses."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from infir2.config.load import load
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe
from infir2.demo.stages import STAGES, plan

ROOT = Path(__file__).parents[2]
CLASSES = {"cpt": TrainRecipe, "sft": TrainRecipe, "rl": RlRecipe, "eval": EvalRecipe}


def readme_commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    return [shlex.split(line)[1:] for line in re.findall(r"^infir2 .*$", text, re.MULTILINE)]


def recipe_of(words: list[str]) -> object:
    paths = [word for word in words[1:] if word.endswith(".toml")]
    return load(
        CLASSES[words[0]], paths, [word for word in words[1:] if word.startswith("--")], {}
    ).recipe


@pytest.mark.parametrize(
    "words", [words for words in readme_commands() if words[0] in CLASSES], ids=" ".join
)
def test_readme_commands_with_a_recipe_parse(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe_of(words)


def test_the_readme_shows_what_the_demo_runs() -> None:
    main, _ = plan(Path("runs/demo"), 1236)
    told = {(words[0], words[1].removeprefix("recipes/demo/")) for words in readme_commands()}
    for stage in main:
        if stage.arguments[0] in ("cpt", "sft", "rl"):
            assert (stage.arguments[0], Path(stage.arguments[1]).name) in told, stage.name


def test_each_stage_of_the_plan_parses_and_starts_from_the_one_before(tmp_path: Path) -> None:
    main, side = plan(tmp_path, 5)
    recipes = {
        stage.name: recipe_of(list(stage.arguments))
        for stage in [*main, *side]
        if stage.arguments[0] in CLASSES
    }
    assert {recipe.run.seed for recipe in recipes.values()} == {5}  # type: ignore[attr-defined]
    for before, name in pairwise(STAGES):
        assert recipes[name].model.path == str(tmp_path / before)  # type: ignore[attr-defined]
    assert recipes["rl2"].rollout.model == str(tmp_path / "rl1-fp8")  # type: ignore[attr-defined]
    assert not recipes["cpt-bf16"].fp8.enabled  # type: ignore[attr-defined]
    known = {stage.name for stage in main}
    assert all(stage.after in known for stage in side)


def test_the_two_cpt_runs_differ_in_nothing_but_fp8(tmp_path: Path) -> None:
    main, side = plan(tmp_path, 5)
    words = {stage.name: list(stage.arguments) for stage in [*main, *side]}
    fp8, bf16 = recipe_of(words["cpt"]).model_dump(), recipe_of(words["cpt-bf16"]).model_dump()  # type: ignore[attr-defined]
    assert {key for key in fp8 if fp8[key] != bf16[key]} == {"run", "fp8"}
    assert {key for key in fp8["run"] if fp8["run"][key] != bf16["run"][key]} == {"dir"}
