"""What evalscope does with a benchmark, in a few lines: asks k times, scores, writes its files.

As a program: in the place of its environment's interpreter, see `make_environment`.
"""

import http.client
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class Processes:
    """In the place of `infir2.evaluate.evalscope.Processes`, for AIME."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, tasks: Sequence[Mapping[str, Any]]) -> None:
        for task in tasks:
            _run(task)


def make_environment(directory: Path) -> Path:
    """A directory for INFIR2_EVALSCOPE, whose interpreter says the version and runs this file."""
    python = directory / "bin/python"
    python.parent.mkdir(parents=True)
    run_this = shlex.join([sys.executable, str(Path(__file__).resolve())])
    python.write_text(f'#!/bin/sh\n[ "$2" = -c ] && echo 1.14.1 || exec {run_this}\n')
    python.chmod(0o755)
    return directory


def _run(task: Mapping[str, Any]) -> None:
    config = task["config"]
    (name,) = config["datasets"]
    arguments, repeats = config["dataset_args"][name], config["repeats"]
    lines = (Path(arguments["local_path"]) / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines for _ in range(repeats)]
    asked = list(enumerate(rows))
    with ThreadPoolExecutor(config["eval_batch_size"]) as threads:
        answers = list(threads.map(lambda item: _ask(task, arguments, item[1]), asked))
    _write(Path(config["work_dir"]), name, asked, answers)


def _ask(task: Mapping[str, Any], arguments: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    address = urlsplit(task["url"])
    system = {"role": "system", "content": arguments["system_prompt"]}
    body = {"messages": [system, {"role": "user", "content": row["problem"]}]}
    body |= {key: task["config"]["generation_config"][key] for key in ("max_tokens", "top_p")}
    connection = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=120)
    headers = {"Authorization": f"Bearer {task['key']}"}
    connection.request("POST", f"{address.path}/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    return answer if response.status == 200 else None


def _write(
    work_dir: Path,
    name: str,
    asked: Sequence[tuple[int, Mapping[str, Any]]],
    answers: Sequence[Any],
) -> None:
    files: dict[str, list[dict[str, Any]]] = {"predictions": [], "reviews": []}
    scores = []
    for (index, row), answer in zip(asked, answers, strict=True):
        if answer is None:
            continue
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        box = text.rpartition("\\boxed{")[2].rstrip("}.\n") if "\\boxed{" in text else ""
        scores.append(float(box == row["answer"]))
        reason = "max_tokens" if choice["finish_reason"] == "length" else "stop"
        usage = {"output_tokens": answer["usage"]["completion_tokens"]}
        output = {"choices": [{"stop_reason": reason}], "usage": usage}
        files["predictions"].append({"index": index, "model_output": output})
        score = {
            "value": {"acc": scores[-1]},
            "main_score_name": "acc",
            "extracted_prediction": box,
        }
        messages = [{"content": row["problem"]}, {"content": text}]
        review = {"index": index, "target": row["answer"], "messages": messages}
        files["reviews"].append(review | {"sample_score": {"score": score}})
    for folder, rows in files.items():
        path = work_dir / folder / "model" / f"{name}_default.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work_dir / "reports").mkdir()
    metric = {
        "identity": {"aggregation": "mean"},
        "score": round(sum(scores) / max(1, len(scores)), 4),
    }
    report = {"metrics": [metric] if scores else []}
    (work_dir / "reports" / f"{name}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    Processes().run(json.loads(sys.stdin.readline())["tasks"])
