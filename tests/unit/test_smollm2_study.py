"""The recipes and the data of bench/smollm2_study.py; the study itself needs a GPU."""

import json
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
from smollm2_summary import scores, summary, validation  # noqa: E402


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


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _evaluated(folder: Path, rewards: list[float]) -> None:
    """An evaluation of two questions with two responses each."""
    rows: list[dict[str, object]] = [
        {
            "problem": f"{folder}/{i // 2}",
            "sample": i % 2,
            "prompt": f"q{i // 2}",
            "answer": "0",
            "reward": reward,
        }
        for i, reward in enumerate(rewards)
    ]
    _write(folder / "samples.jsonl", rows)
    _write(folder / "metrics.jsonl", [{"kind": "evaluation"}])


def test_the_summary_pairs_the_formats_by_seed_and_question(tmp_path: Path) -> None:
    _evaluated(tmp_path / "bf16-1/eval-sft1-gsm8k", [1, 0, 0, 0])
    _evaluated(tmp_path / "pow2-1/eval-sft1-gsm8k", [1, 1, 0, 0])
    _evaluated(tmp_path / "bf16-2/eval-sft1-gsm8k", [0, 0, 0, 0])
    _evaluated(tmp_path / "pow2-2/eval-sft1-gsm8k", [1, 1, 1, 1])
    for form, last in (("bf16", 2.0), ("pow2", 2.01)):
        losses = [{"kind": "validation", "validation_loss": loss} for loss in (3.0, last)]
        _write(tmp_path / f"{form}-1/sft1/metrics.jsonl", [*losses, {"kind": "train"}])
    lines = summary(tmp_path, ("start", "sft1"), ("gsm8k", "sums"))
    assert "| sft1, gsm8k | bf16 | 25.00, 0.00 |  |" in lines
    found = next(line for line in lines if line.startswith("| sft1, gsm8k | pow2"))
    # Questions: (50 + 100) / 2 = 75 and (0 + 100) / 2 = 50 points; mean 62.5, half 1.96 * 12.5.
    assert found.endswith("| 50.00, 100.00 | +62.50 [+38.00, +87.00]; seeds +25.00 to +100.00 |")
    assert "| sft1 | pow2 | 3.0000 to 2.0100 | +0.500 |" in lines
    assert not any(line.startswith("| start") for line in lines)


def test_an_evaluation_that_was_interrupted_has_no_score(tmp_path: Path) -> None:
    _evaluated(tmp_path, [1, 1, 1, 1])
    assert scores(tmp_path) == {"q0\n0\n1": 1, "q1\n0\n1": 1}
    _write(tmp_path / "metrics.jsonl", [])
    assert scores(tmp_path) == {}
    assert validation(tmp_path) is None


def test_options_go_to_trainings_or_to_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(study, "_infir2", lambda *words: commands.append(words))
    words = ["--model=m", f"--to={tmp_path}", "--stages", "start", "sft1", "--tasks", "gsm8k"]
    words += ["--train.epochs=2", "--evaluate.temperature=0"]
    monkeypatch.setattr(sys, "argv", ["smollm2_study.py", *words])
    assert study.main() == 0
    assert [command[0] for command in commands] == ["eval", "sft", "eval"]
    assert ["--evaluate.temperature=0" in command for command in commands] == [True, False, True]
    assert ["--train.epochs=2" in command for command in commands] == [False, True, False]
    assert "--model.path=m" in commands[0]
