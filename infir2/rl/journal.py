"""Finished groups on disk, so that a run that is killed in its rollouts repeats none that were done.

`rollouts/step-N.jsonl` holds a line per group of step N, with token ids, log-probabilities, verdicts and rewards. A line is used
again only for the same request: `key` is of prompt, sampling and weights. Files of steps that a checkpoint holds are removed.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from infir2.rl.groups import Response
from infir2.rollout.types import Completion


class Journal:
    """The groups of one step at a time. Example: `journal.open(7)`, then `journal.get(key)` or `journal.add(key, responses)`."""

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir / "rollouts"
        self._kept: dict[str, list[Response]] = {}

    def open(self, step: int, saved_step: int) -> None:
        """Begin a step: read what an earlier process finished of it, forget what the newest checkpoint holds."""
        self._dir.mkdir(exist_ok=True)
        for path in self._dir.glob("step-*.jsonl"):
            if int(path.stem.partition("-")[2]) <= saved_step:
                path.unlink()
        self._path = self._dir / f"step-{step}.jsonl"
        self._kept = {}
        whole = self._path.read_bytes().rpartition(b"\n")[0] + b"\n" if self._path.exists() else b""
        for line in whole.splitlines():
            row = json.loads(line) if line else {}
            if row:
                self._kept[row["key"]] = [_response(each) for each in row["responses"]]
        if self._path.exists():  # a line cut by the kill must not spoil the next one
            os.truncate(self._path, len(whole) if self._kept else 0)

    def get(self, key: str) -> list[Response] | None:
        """The group's responses, if they were finished before."""
        return self._kept.get(key)

    def add(self, key: str, responses: list[Response]) -> None:
        """Write a finished group down."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "responses": [_row(response) for response in responses]}, ensure_ascii=False) + "\n")


def _row(response: Response) -> dict[str, Any]:
    completion = response.completion
    return {
        "id": completion.id,
        "token_ids": _packed(np.asarray(completion.token_ids, dtype=np.int32)),
        "logprobs": _packed(np.asarray(completion.rollout_logprobs, dtype=np.float32)),
        "finish": completion.finish,
        "policy_version": completion.policy_version,
        "text": response.text,
        "correct": response.correct,
        "reward": response.reward,
    }


def _response(row: dict[str, Any]) -> Response:
    token_ids, logprobs = _unpacked(row["token_ids"], np.int32).tolist(), _unpacked(row["logprobs"], np.float32)
    completion = Completion(row["id"], token_ids, logprobs, row["finish"], row["policy_version"])
    return Response(completion, row["text"], row["correct"], row["reward"])


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _unpacked(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)
