"""Finished groups on disk, so that a run that is killed while it samples repeats none of them.

`rollouts/step-N-R.jsonl` holds a line per group of step N that rank R finished: token ids,
log-probabilities, verdicts and rewards, with the SHA-256 of the rest of the line. A line is reused,
by any number of ranks, only for the same request: its `key` hashes prompt, sampling parameters and
weights. The group of a damaged line is sampled again. Files of steps that a checkpoint holds are
removed.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from infir2.engines.types import Completion
from infir2.files import (
    JsonLinesWriter,
    disk_errors,
    encode_json_line,
    make_own_directory,
    read_json_lines,
    read_own,
    truncate_torn_line,
)
from infir2.parallel.ranks import Ranks
from infir2.rl.groups import Response
from infir2.terminal import log

_CHECKSUM = "sha256"
_FILE = re.compile(r"step-(\d+)-\d+\.jsonl")


class Journal:
    """The groups of one step at a time.

    Example: `journal.open(7, saved_step=6)`, then `journal.get(key)` or
    `journal.add(key, responses)`.

    Args:
        run_dir: the run directory.
        ranks: the ranks that sample.
        check_in_place: raises if `run_dir` is not the directory of this run anymore.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, check_in_place: Callable[[], None]) -> None:
        self._dir, self._ranks, self._check_in_place = run_dir / "rollouts", ranks, check_in_place
        self._groups: dict[str, list[Response]] = {}

    def open(self, step: int, saved_step: int) -> None:
        """Begin a step: read its finished groups, remove files of steps up to `saved_step`.

        Every rank calls this. Raises CheckpointError if the files cannot be read.
        """
        self._groups = self._ranks.broadcast_from_rank0(lambda: self._read(step, saved_step))
        self._lines = JsonLinesWriter(self._dir / f"step-{step}-{self._ranks.rank}.jsonl")

    def _read(self, step: int, saved_step: int) -> dict[str, list[Response]]:
        self._check_in_place()
        groups: dict[str, list[Response]] = {}
        with disk_errors(f"{self._dir}: the groups of step {step} cannot be read"):
            make_own_directory(self._dir)
            for path in self._dir.iterdir():
                match = _FILE.fullmatch(path.name)
                if match and int(match[1]) <= saved_step:
                    path.unlink()
                elif match and int(match[1]) == step:
                    groups |= _read_groups(path)
        return groups

    def get(self, key: str) -> list[Response] | None:
        """The responses of a finished group, or None."""
        return self._groups.get(key)

    def add(self, key: str, responses: list[Response]) -> None:
        """Append a finished group. A resumed run samples again what could not be written."""
        # JSON's decimals give every float32 back exactly
        row = {"key": key, "responses": [asdict(response) for response in responses]}
        self._lines.append({_CHECKSUM: _checksum(row)} | row)


def _read_groups(path: Path) -> dict[str, list[Response]]:
    """The groups of the undamaged lines of a file; a torn last line is removed."""
    truncate_torn_line(path)
    groups, num_groups = {}, 0
    for row in read_json_lines(path):
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            if row.pop(_CHECKSUM) == _checksum(row):
                groups[row["key"]] = [_response(each) for each in row["responses"]]
                num_groups += 1
    if num_damaged := read_own(path).count(b"\n") - num_groups:
        log(f"{path}: {num_damaged} damaged lines; their groups are sampled again", "rl")
    return groups


def _checksum(row: dict[str, Any]) -> str:
    return hashlib.sha256(encode_json_line(row)).hexdigest()


def _response(row: dict[str, Any]) -> Response:
    completion = row.pop("completion")
    logprobs = np.array(completion.pop("rollout_logprobs"), dtype=np.float32)
    return Response(Completion(rollout_logprobs=logprobs, **completion), **row)
