"""Benchmarks on a cluster: their questions, their evalscope, and what their answers have to be."""

import json
import shutil
from pathlib import Path

import fake_evalscope

from infir2.evaluate.evalscope import environment_directory

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures/eval"
EVALSCOPE = (environment_directory() / "bin/python").exists() and FIXTURES.exists()


def evalscope_environment(directory: Path) -> Path:
    """The real one, or one that knows AIME."""
    return (
        environment_directory() if EVALSCOPE else fake_evalscope.make_environment(directory / "es")
    )


def write_questions(directory: Path) -> None:
    """AIME 2024 in invented questions, and the fixtures of the others where they are."""
    directory.mkdir()
    rows = [{"problem": f"How much is ${i}+3$?", "answer": i + 3} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "aime24.jsonl").write_text(text)
    for name in ("aime25", "gpqa", "lcb"):
        if (FIXTURES / name).exists():
            shutil.copytree(FIXTURES / name, directory / name)


def assert_each_answer_once(run_dir: Path, number: int) -> set[str]:
    """The engines that gave them."""
    rows = [json.loads(line) for line in (run_dir / "answers.jsonl").read_text().splitlines()]
    assert len({(row["prompt"], row["sample"]) for row in rows}) == len(rows) == number
    assert json.loads((run_dir / "result.json").read_text())["complete"]
    return {row["engine"] for row in rows}
