"""The recipes and the data of bench/smollm2_study.py; the study itself needs a GPU."""

import re
import sys
from pathlib import Path

import pytest

from infir2.config.load import load
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes/smollm2"
sys.path.insert(0, str(ROOT / "bench"))

import smollm2_study as study  # noqa: E402


def test_sums_are_different_and_their_answers_right() -> None:
    rows = study.make_sums(500)
    assert rows == study.make_sums(500)
    assert len({row["prompt"] for row in rows}) == 500
    for row in rows:
        numbers = re.findall(r"(?:[+-] )?\d+", row["prompt"].partition("?")[0])
        assert sum(int(number.replace(" ", "")) for number in numbers) == int(row["label"]) >= 0


@pytest.mark.parametrize("stage", study.STAGES)
def test_a_stage_begins_where_the_one_before_ends(stage: str) -> None:
    kind = RlRecipe if stage == "rl" else TrainRecipe
    recipe = load(kind, [str(RECIPES / f"study-{stage}.toml")], []).recipe
    before = study.STARTS.get(stage, "sft2")
    expected = "models/SmolLM2-135M-Instruct" if stage == "cpt" else f"runs/smollm2/{before}"
    assert recipe.model.path == expected
    assert recipe.run.dir == f"runs/smollm2/{stage}"


def test_both_tasks_are_valid_problems_of_the_evaluation() -> None:
    for task, fields in study.TASKS.items():
        words = [f"{study.PROBLEM}.path=data/smollm2/{task}-test.jsonl", *fields]
        words += ["--model.path=runs/smollm2/sft1", "--run.dir=runs/smollm2/eval"]
        recipe = load(EvalRecipe, [str(RECIPES / "study-eval.toml")], words).recipe
        assert recipe.evaluate.problems[0].path.endswith(f"{task}-test.jsonl")
