"""`infir2 eval compare`: differences over common questions, verdicts in words, refusals by name."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from infir2.cli import main

RECIPE = """\
[model]
path = "models/m"
[run]
dir = "{directory}"
seed = {seed}
[evaluate]
samples = 32
temperature = {temperature}
[[evaluate.problems]]
path = "{directory}.jsonl"
"""


def write(
    directory: Path,
    scores: Sequence[Sequence[float]],
    first: int = 0,
    temperature: float = 0.65,
    seed: int = 0,
) -> str:
    """An evaluation whose problem i has the prompt "question first + i"."""
    directory.mkdir()
    recipe = RECIPE.format(directory=directory, temperature=temperature, seed=seed)
    (directory / "recipe.toml").write_text(recipe)
    rows = [
        {
            "problem": f"0/{directory.name}.jsonl:{index + 1}",
            "sample": sample,
            "prompt": f"question {first + index}",
            "answer": str(first + index),
            "reward": float(score),
        }
        for index, samples in enumerate(scores)
        for sample, score in enumerate(samples)
    ]
    (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def sampled(chance: np.ndarray, seed: int) -> list[list[float]]:
    draws = np.random.default_rng(seed).random((len(chance), 32))
    return (draws < chance[:, None]).astype(float).tolist()


CHANCE = np.random.default_rng(0).beta(0.6, 0.6, 30)


def test_a_difference_is_said_in_words_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", sampled(CHANCE * 0.8, 1))
    b = write(tmp_path / "b", sampled(CHANCE, 2), seed=5)
    assert main(["eval", "compare", a, b]) == 0
    text = capsys.readouterr().out
    assert "problems: the second is better by " in text
    assert "paired over 30 questions" in text
    assert main(["eval", "compare", b, a, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert -0.25 < found["low"] < found["difference"] < found["high"] < 0
    assert found["difference"] == pytest.approx(found["second"] - found["first"])
    assert found["high"] - found["low"] < 0.1
    assert found["verdict"].startswith("problems: the first is better by ")


def test_equal_models_show_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", sampled(CHANCE, 1))
    b = write(tmp_path / "b", sampled(CHANCE, 2))
    assert main(["eval", "compare", a, b]) == 0
    text = capsys.readouterr().out
    assert "problems: no difference is shown, " in text
    assert "these answers show differences from about " in text


def test_only_common_questions_count_and_unfinished_answers_are_neither_wrong_nor_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", [[0, 0], [1, 1], [1, 0]])
    b = write(tmp_path / "b", [[1], [1, 1], [0, 0]], first=1)  # questions 1 to 3
    assert main(["eval", "compare", a, b, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["common"], found["first_questions"], found["second_questions"]) == (2, 3, 3)
    assert (found["first"], found["second"], found["difference"]) == (0.75, 1.0, 0.25)


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"temperature": 0.7}, 2, "do not compare: evaluate.temperature (0.65 and 0.7)"),
        ({"first": 9}, 4, "have no answered question in common"),
    ],
)
def test_what_does_not_compare_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, float],
    code: int,
    said: str,
) -> None:
    a = write(tmp_path / "a", [[0, 1], [1, 1]])
    b = write(tmp_path / "b", [[0, 1], [1, 1]], **change)  # type: ignore[arg-type]
    assert main(["eval", "compare", a, b]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_directory_without_answers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", [[0, 1]])
    (tmp_path / "file").touch()
    for name, said in (
        ("missing", "has no answers of an evaluation: name the run.dir"),
        (".", "has no answers of an evaluation: name the run.dir"),
        ("file", "cannot be read (Not a directory"),
    ):
        assert main(["eval", "compare", a, str(tmp_path / name)]) == 4
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
