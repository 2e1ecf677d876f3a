"""What was sampled, on disk, so that a run that is killed while it samples repeats none of it.

`rollouts/step-N-R.jsonl` holds a line per group of step N that rank R finished: token ids,
log-probabilities, verdicts and rewards, with the SHA-256 of the rest of the line. With
`rl.chunk_tokens` it also has a line per chunk of a group that is not finished, without verdicts. A
line is reused, by any number of ranks, only for the same request: its `key` hashes prompt, sampling
parameters, rewards, weights and the tokens so far, but no key of the recipe that only training
reads. What a damaged line had is sampled again.

`rollouts/carried-N.jsonl` holds the unfinished groups with which step N begins (`rl.partial`).
Files of steps that a checkpoint holds are removed, but what step N begins with stays as long as the
checkpoint of step N - 1, which a run goes on from if newer ones are damaged.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from infir2.checkpoint.reader import CHECKPOINTS, published_steps
from infir2.engines.types import Completion
from infir2.errors import disk_reason
from infir2.files import (
    JsonLinesWriter,
    disk_errors,
    encode_json_line,
    make_own_directory,
    read_json_lines,
    read_own,
    truncate_torn_line,
    write_atomically,
)
from infir2.parallel.ranks import Ranks
from infir2.rl.groups import Response
from infir2.terminal import log

CHECKSUM = "sha256"
# Keys of [rl] that say what is made of a rollout; the others say how it is sampled and rewarded.
OF_TRAINING = {
    *("mini_batches", "passes", "loss", "loss_mean", "clip_low", "clip_high", "clip_dual"),
    *("correction", "correction_level", "correction_cap", "correction_floor", "kl_coefficient"),
    *("kl_estimator", "reference", "entropy_coefficient", "mask_truncated", "normalize_by_std"),
    *("unbiased_std", "max_mismatch_kl", "max_mismatch_prob_error", "evaluate_every"),
    "keep_rollouts",
}
_FILE = re.compile(r"(?:step-(?P<step>\d+)-\d+|carried-(?P<carried>\d+))\.jsonl")


class Journal:
    """The groups of some steps, of which one is written at a time.

    Example: `journal.open(7, 7, saved_step=6)`, `journal.begin(7)`, then `journal.get(key)` or
    `journal.add(key, responses)`.

    Args:
        run_dir: the run directory.
        ranks: the ranks that sample.
        check_in_place: raises if `run_dir` is not the directory of this run anymore.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, check_in_place: Callable[[], None]) -> None:
        self._dir, self._ranks, self._check_in_place = run_dir / "rollouts", ranks, check_in_place
        self._checkpoints = run_dir / CHECKPOINTS
        self._groups: dict[str, list[Response]] = {}
        self._unfinished: dict[str, list[Completion]] = {}

    def open(self, first: int, last: int, saved_step: int) -> None:
        """Read what is known of steps `first` to `last`, remove files of steps up to `saved_step`.

        Every rank calls this. Raises CheckpointError if the files cannot be read.
        """
        self._groups, self._unfinished = self._ranks.broadcast_from_rank0(
            lambda: self._read(first, last, saved_step)
        )

    def begin(self, step: int) -> None:
        """What is added from now on belongs to `step`."""
        self._lines = JsonLinesWriter(self._dir / f"step-{step}-{self._ranks.rank}.jsonl")

    def _read(
        self, first: int, last: int, saved_step: int
    ) -> tuple[dict[str, list[Response]], dict[str, list[Completion]]]:
        self._check_in_place()
        groups: dict[str, list[Response]] = {}
        unfinished: dict[str, list[Completion]] = {}
        with disk_errors(f"{self._dir}: the groups of step {first} cannot be read"):
            make_own_directory(self._dir)
            kept = published_steps(self._checkpoints)
            for path in self._dir.iterdir():
                match = _FILE.fullmatch(path.name)
                if match is None:
                    continue
                step = int(match["step"] or match["carried"])
                if step <= saved_step:
                    if match["step"] or step - 1 not in kept:
                        path.unlink()
                elif first <= step <= last and (match["step"] or step == saved_step + 1):
                    _read_file(path, groups, unfinished)
        return groups, unfinished

    def get(self, key: str) -> list[Response] | None:
        """The responses of a finished group, or None."""
        return self._groups.get(key)

    def get_unfinished(self, key: str) -> list[Completion] | None:
        """The responses of a group as far as they were generated, or None."""
        return self._unfinished.get(key)

    def add(self, key: str, responses: list[Response]) -> None:
        """Append a finished group. A resumed run samples again what could not be written."""
        # JSON's decimals give every float32 back exactly
        row = {"key": key, "responses": [asdict(response) for response in responses]}
        self._lines.append({CHECKSUM: checksum(row)} | row)

    def add_unfinished(self, key: str, completions: Sequence[Completion]) -> None:
        """Append a group of which a chunk was generated."""
        self._lines.append(_unfinished_row(key, completions))

    def write_carried(self, step: int, groups: Mapping[str, Sequence[Completion]]) -> None:
        """Write the unfinished groups with which `step` begins, by key.

        A disk that refuses costs what was generated of them, and stops no training.
        """
        rows = (_unfinished_row(key, completions) for key, completions in groups.items())
        path = self._dir / f"carried-{step}.jsonl"
        try:
            write_atomically(path, b"".join(map(encode_json_line, rows)))
        except OSError as error:
            log(f"{path} cannot be written ({disk_reason(error)})", "rl")


def _read_file(
    path: Path, groups: dict[str, list[Response]], unfinished: dict[str, list[Completion]]
) -> None:
    """Add what the undamaged lines of a file hold; a torn last line is removed."""
    truncate_torn_line(path)
    num_read = 0
    for row in read_json_lines(path):
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            if row.pop(CHECKSUM) != checksum(row):
                continue
            if "responses" in row:
                groups[row["key"]] = [response_from_row(each) for each in row["responses"]]
            else:
                unfinished[row["key"]] = [_completion(each) for each in row["unfinished"]]
            num_read += 1
    if num_damaged := read_own(path).count(b"\n") - num_read:
        log(f"{path}: {num_damaged} damaged lines; their groups are sampled again", "rl")


def _unfinished_row(key: str, completions: Sequence[Completion]) -> dict[str, Any]:
    row = {"key": key, "unfinished": [asdict(completion) for completion in completions]}
    return {CHECKSUM: checksum(row)} | row


def checksum(row: dict[str, Any]) -> str:
    """SHA-256 of a line without its checksum."""
    return hashlib.sha256(encode_json_line(row)).hexdigest()


def response_from_row(row: dict[str, Any]) -> Response:
    """A response that `asdict` has made a row."""
    return Response(_completion(row.pop("completion")), **row)


def _completion(row: dict[str, Any]) -> Completion:
    row["rollout_logprobs"] = np.array(row["rollout_logprobs"], dtype=np.float32)
    row["earlier"] = tuple((version, count) for version, count in row["earlier"])
    return Completion(**row)
