"""evalscope's own command against our server."""

import json
import subprocess
from pathlib import Path

import pytest
from own_server import KEY, OwnServer, write_model

from infir2.evaluate.evalscope import environment_directory

QUESTIONS = Path(__file__).parents[2] / "../shared/fixtures/eval/aime25/problem_answer.jsonl"
EVALSCOPE = environment_directory() / "bin/evalscope"
REPEATS = 2


@pytest.mark.skipif(
    not EVALSCOPE.exists(), reason="evalscope is not installed: infir2 eval --setup"
)
@pytest.mark.skipif(not QUESTIONS.exists(), reason="needs ../shared/fixtures/eval")
@pytest.mark.timeout(300)
def test_aime24(world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    data = tmp_path / "aime24"
    data.mkdir()
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"local_path": str(data), "prompt_template": "{question}"}
    dataset |= {"filters": {"remove_until": "</think>"}}
    options = {"max_tokens": 12, "temperature": 0.65, "top_p": 0.95, "seed": 7}
    with OwnServer(write_model(tmp_path, world / "tokenizer", fp8=False)).run() as server:
        words = ["eval", "--model", "tiny", "--api-url", f"{server.url}/v1", "--api-key", KEY]
        words += ["--eval-type", "openai_api", "--datasets", "aime24", "--repeats", str(REPEATS)]
        words += ["--work-dir", str(tmp_path / "work"), "--no-timestamp", "--eval-batch-size", "4"]
        words += ["--dataset-args", json.dumps({"aime24": dataset})]
        done = subprocess.run(
            [str(EVALSCOPE), *words, "--generation-config", json.dumps(options)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        counts = dict(server.driver.counts)
    assert done.returncode == 0, done.stderr
    paths = sorted((tmp_path / "work/predictions/tiny").glob("aime24_*.jsonl"))
    answers = [
        json.loads(line)["model_output"]
        for path in paths
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert len(answers) == REPEATS * len(rows)
    assert all(answer["choices"][0]["message"]["content"] for answer in answers)
    assert {answer["choices"][0]["stop_reason"] for answer in answers} == {"max_tokens"}
    assert sum(answer["usage"]["output_tokens"] for answer in answers) == 12 * len(answers)
    assert counts["generated_tokens"] == 12 * len(answers)
    assert "canceled" not in counts
    assert (tmp_path / "work/reports/tiny/aime24.json").is_file()
