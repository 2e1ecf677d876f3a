"""Finished groups on disk, so that a run that is killed while it samples repeats none of them.

`rollouts/step-N-R.jsonl` holds a line per group of step N that rank R finished: token ids,
log-probabilities, verdicts and rewards. A line is reused, by any number of ranks, only for the same
request: its `key` hashes prompt, sampling parameters and weights. Files of steps that a checkpoint
holds are removed.
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
    """The groups of one step at a time.

    Example: `journal.open(7, saved_step=6)`, then `journal.get(key)` or
    `journal.add(key, responses)`.
    """

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self._dir, self._ranks = run_dir / "rollouts", ranks
        self._groups: dict[str, list[Response]] = {}

    def open(self, step: int, saved_step: int) -> None:
        """Begin a step: read its finished groups, remove files of steps up to `saved_step`.

        Every rank calls this.
        """
        self._groups = self._ranks.broadcast_from_rank0(lambda: self._read(step, saved_step))
        self._lines = JsonLinesWriter(self._dir / f"step-{step}-{self._ranks.rank}.jsonl")

    def _read(self, step: int, saved_step: int) -> dict[str, list[Response]]:
        self._dir.mkdir(exist_ok=True)
        groups: dict[str, list[Response]] = {}
        for path in self._dir.glob("step-*-*.jsonl"):
            of_step = int(path.stem.split("-")[1])
            if of_step <= saved_step:
                path.unlink()
            elif of_step == step:
                truncate_torn_line(path)
                groups |= {
                    row["key"]: [_response(each) for each in row["responses"]]
                    for row in read_json_lines(path)
                }
        return groups

    def get(self, key: str) -> list[Response] | None:
        """The responses of a finished group, or None."""
        return self._groups.get(key)

    def add(self, key: str, responses: list[Response]) -> None:
        """Append a finished group. A resumed run samples again what could not be written."""
        # JSON's decimals give every float32 back exactly
        self._lines.append({"key": key, "responses": [asdict(response) for response in responses]})


def _response(row: dict[str, Any]) -> Response:
    completion = row.pop("completion")
    logprobs = np.array(completion.pop("rollout_logprobs"), dtype=np.float32)
    return Response(Completion(rollout_logprobs=logprobs, **completion), **row)
