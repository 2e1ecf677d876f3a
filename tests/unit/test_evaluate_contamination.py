"""`infir2 eval contamination`: questions whose word n-grams occur in training data."""

import json
from pathlib import Path
from typing import Any

import pytest

from infir2.cli import main

LONG = "A train leaves the station at nine and travels {} miles in four hours without any stop."
SHORT = "How many primes are below twenty?"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    texts = [LONG.format(200), LONG.format(310), SHORT, "What is 2+2?", "x " * 20]
    rows = [{"problem": text, "answer": 1} for text in texts]
    return write(tmp_path / "data/questions.jsonl", rows)


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["eval", "contamination", *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_questions_in_any_text_of_a_row_are_listed(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = f"so: {LONG.format(200).upper().replace(' ', ', ')} yes"
    train = write(
        tmp_path / "train/a.jsonl",
        [
            {"text": "nothing of the kind"},
            {"messages": [{"role": "user", "content": copied}]},
            {"messages": [{"role": "assistant", "content": f"{SHORT} Eight."}]},
            {"text": copied},
        ],
    )
    result = found(capsys, "--train", train, "--data", data)
    rows = [(each["origin"], each["ngrams"], each["shared"]) for each in result["overlaps"]]
    # 17 words have 5 n-grams, and all of them contain the 11th word
    assert rows == [(f"{data}:1", 5, 5), (f"{data}:3", 1, 1)]
    assert result["overlaps"][0]["found_in"] == f"{train}:2"
    assert (result["overlaps"][0]["rows"], result["rows"]) == (2, 4)
    assert result["too_short"] == [f"{data}:4"]
    assert main(["eval", "contamination", "--train", train, "--data", data]) == 0
    text = capsys.readouterr().out
    assert f"{data}:1: 5 of 5 n-grams (100 %) are in {train}:2 and 1 more rows" in text
    assert "2 of 5 questions share 13-grams with 4 rows of training data; 1 are too short" in text


def test_other_wording_is_not_listed(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = LONG.format("two hundred").replace("nine", "ten")
    train = write(tmp_path / "train.jsonl", [{"text": text}, {"text": "primes below twenty"}])
    assert found(capsys, "--train", train, "--data", data)["overlaps"] == []


def test_part_of_a_question_counts_as_a_part(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = LONG.format(200).split()
    train = write(tmp_path / "train.jsonl", [{"text": " ".join(words[:14])}])
    (overlap,) = found(capsys, "--train", train, "--data", data)["overlaps"]
    assert (overlap["shared"], overlap["ngrams"]) == (2, 5)


def test_missing_paths_and_files_without_questions_are_named(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": "x"}])
    other = write(tmp_path / "other/a.jsonl", [{"id": 1}])
    for words, said in (
        (["--train", train, "--data", str(tmp_path / "no")], "does not exist, or has no data"),
        (["--train", str(tmp_path / "no"), "--data", data], "no does not exist"),
        (["--train", train, "--data", other], "a.jsonl:1 has no field `problem` (it has id)"),
    ):
        assert main(["eval", "contamination", *words]) == 4
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
