"""Finished groups on disk, so that a run that is killed in its rollouts repeats none that were done.

`rollouts/step-N-R.jsonl` holds a line per group of step N that rank R finished, with token ids, log-probabilities, verdicts and
rewards. A line is used again, by any number of ranks, only for the same request: `key` is of prompt, sampling and weights. Files
of steps that a checkpoint holds are removed.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from infir2.engines.types import Completion
from infir2.files import JsonLinesWriter, read_json_lines, truncate_torn_line
from infir2.parallel.ranks import Ranks
from infir2.rl.groups import Response


class Journal:
    """The groups of one step at a time. Example: `journal.open(7)`, then `journal.get(key)` or `journal.add(key, responses)`."""

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self._dir, self._ranks = run_dir / "rollouts", ranks
        self._kept: dict[str, list[Response]] = {}

    def open(self, step: int, saved_step: int) -> None:
        """Begin a step: read what earlier processes finished of it, forget what the newest checkpoint holds. Every rank calls this."""
        self._kept = self._ranks.broadcast_from_rank0(lambda: self._read(step, saved_step))
        self._lines = JsonLinesWriter(self._dir / f"step-{step}-{self._ranks.rank}.jsonl")

    def _read(self, step: int, saved_step: int) -> dict[str, list[Response]]:
        self._dir.mkdir(exist_ok=True)
        kept: dict[str, list[Response]] = {}
        for path in self._dir.glob("step-*-*.jsonl"):
            of_step = int(path.stem.split("-")[1])
            if of_step <= saved_step:
                path.unlink()
            elif of_step == step:
                truncate_torn_line(path)
                kept |= {
                    row["key"]: [_response(each) for each in row["responses"]]
                    for row in read_json_lines(path)
                }
        return kept

    def get(self, key: str) -> list[Response] | None:
        """The group's responses, if they were finished before."""
        return self._kept.get(key)

    def add(self, key: str, responses: list[Response]) -> None:
        """Write a finished group down. One that the disk refuses is sampled again by a resumed run."""
        # JSON's decimals give every float32 back exactly
        self._lines.append({"key": key, "responses": [asdict(response) for response in responses]})


def _response(row: dict[str, Any]) -> Response:
    completion = row.pop("completion")
    logprobs = np.array(completion.pop("rollout_logprobs"), dtype=np.float32)
    return Response(Completion(rollout_logprobs=logprobs, **completion), **row)
