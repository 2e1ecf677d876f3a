"""Whole rollouts on disk, to look at and to train on again.

`rl.keep_rollouts` and `infir2 rl --rollout-only` write `kept_rollouts/step-N.jsonl`: a first line
with the keys that the rollouts depend on and the number of groups, then a line per group: prompt,
token ids, log-probabilities of engine and trainer, rewards. Each has the SHA-256 of its rest.
`infir2 rl --train-only DIR` trains on them: the same recipe ends with the same bits.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infir2.config.schema import RlRecipe
from infir2.data import Prompt
from infir2.engines.response_text import Decode, ResponseText
from infir2.errors import ConfigError, DataError, disk_reason
from infir2.files import (
    encode_json_line,
    make_own_directory,
    read_json_lines,
    write_atomically,
)
from infir2.parallel.ranks import Ranks
from infir2.preflight.run_dir import newest_in
from infir2.rl.dynamic_sampling import Rollouts
from infir2.rl.groups import Group, Response, trained_tokens
from infir2.rl.journal import CHECKSUM, OF_TRAINING, checksum, response_from_row
from infir2.terminal import log
from infir2.train.plan import last_step_of

DIRECTORY = "kept_rollouts"
SHOWN_TRAINED, SHOWN_OTHERS, SHOWN_TOKENS = 3, 2, 600  # groups of a step, tokens of a response
# By the bytes of the token ids of prompt and response: the trainer's log-probabilities.
TrainerLogprobs = Mapping[bytes, np.ndarray]


def sampling_keys(recipe: RlRecipe, tokenizer_fingerprint: str) -> dict[str, Any]:
    """What rollouts must have in common with the recipe that trains on them."""
    rl = recipe.rl.model_dump(mode="json", exclude=OF_TRAINING)
    keys = {f"rl.{name}": value for name, value in rl.items()}
    return keys | {"the tokenizer": tokenizer_fingerprint}


def sampling_origin(recipe: RlRecipe, weights_digest: str = "") -> dict[str, Any]:
    """What else all steps that --rollout-only samples have in common.

    Without a digest: as far as it is known before an engine is loaded.
    """
    origin = {
        "run.seed": recipe.run.seed,
        "data.sources": [source.model_dump(mode="json") for source in recipe.data.sources],
        "data.system_prompt": recipe.data.system_prompt,
        "rollout.precision": recipe.rollout.precision,
    }
    return origin | (
        {"the digest of the engine's weights": weights_digest} if weights_digest else {}
    )


def write_kept(
    run_dir: Path,
    step: int,
    rollouts: Rollouts,
    keys: dict[str, Any],
    logprobs: TrainerLogprobs,
    decode: Decode,
    origin: dict[str, Any] | None = None,
) -> None:
    """Write the rollouts of a step, and `shown-N.jsonl` with some groups for the report.

    `origin` is None if they were sampled to be trained on. A disk that refuses stops no training.
    """
    groups = [(True, each) for each in rollouts.trained]
    groups += [(False, each) for each in rollouts.without_signal]
    header = {"step": step, "groups": len(groups), "state": rollouts.state, "keys": keys}
    header |= {"unfinished": rollouts.num_unfinished, "origin": origin}
    rows = [header, *(_row(group, is_trained, logprobs) for is_trained, group in groups)]
    path = run_dir / DIRECTORY / f"step-{step}.jsonl"
    lines = (encode_json_line({CHECKSUM: checksum(row)} | row) for row in rows)
    trained, flat = [row for row in rows[1:] if row["trained"]], rows[1 + len(rollouts.trained) :]
    shown = [_shown(row, decode) for row in [*trained[:SHOWN_TRAINED], *flat[:SHOWN_OTHERS]]]
    try:
        make_own_directory(path.parent)
        write_atomically(path, b"".join(lines))
        shown_path = path.with_name(f"shown-{step}.jsonl")
        write_atomically(shown_path, b"".join(map(encode_json_line, shown)))
    except OSError as error:
        log(f"{path} cannot be written ({disk_reason(error)}); training goes on", "rl")


def _row(group: Group, is_trained: bool, logprobs: TrainerLogprobs) -> dict[str, Any]:
    responses = []
    for response in group.responses:
        tokens = [*group.prompt_token_ids, *response.completion.token_ids]
        scored, scores = logprobs.get(np.array(tokens, dtype=np.int32).tobytes()), np.zeros(0)
        if scored is not None:  # 0 for an environment's tokens, as their rollout_logprobs
            mask = trained_tokens(response.completion)
            scores = np.zeros(len(mask))
            scores[mask] = scored
        responses.append(asdict(response) | {"trainer_logprobs": scores.tolist()})
    return {
        "name": group.name,
        "trained": is_trained,
        "prompt": asdict(group.prompt),
        "prompt_token_ids": group.prompt_token_ids,
        "responses": responses,
    }


def _shown(row: dict[str, Any], decode: Decode) -> dict[str, Any]:
    """A group as the report shows it: the beginning of each response, token by token."""
    responses = []
    for response in row["responses"]:
        completion, trainer = response["completion"], response["trainer_logprobs"]
        token_ids, text = completion["token_ids"], ResponseText(decode)
        pairs = zip(trainer[:SHOWN_TOKENS], completion["rollout_logprobs"], strict=False)
        pieces = [text.add(token) for token in token_ids[:SHOWN_TOKENS]]
        pieces[-1] += text.finish()
        shown = {name: response[name] for name in ("reason", "reward", "parts")}
        shown |= {
            "pieces": pieces,
            "differences": [float(a) - float(b) for a, b in pairs],
            "num_tokens": len(token_ids),
            "truncated": completion["finish"] == "length",
            "versions": len(completion["earlier"]) + 1,
        }
        responses.append(shown)
    prompt = {name: row["prompt"][name] for name in ("messages", "answer")}
    return {"trained": row["trained"], "prompt": prompt, "responses": responses}


class KeptRollouts:
    """In the place of a `RolloutPipeline`: the rollouts that a run has kept.

    Attributes:
        state, seconds: as those of the pipeline.
        origin: as `write_kept` was given it for these rollouts.
    """

    def __init__(self, run_dir: str, keys: dict[str, Any], ranks: Ranks) -> None:
        """Raises ConfigError for a directory without rollouts."""
        self._dir, self._keys, self._ranks = Path(run_dir) / DIRECTORY, keys, ranks
        if not self._dir.is_dir():
            raise ConfigError(
                f"--train-only: {run_dir} has no {DIRECTORY}: name the run.dir of a run with "
                "rl.keep_rollouts = true, or of infir2 rl --rollout-only."
            )
        self.state: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.origin: dict[str, Any] | None = None

    def require(self, first: int, last: int) -> None:
        """Raise DataError unless the rollouts of all these steps are there, ConfigError if the
        first are those of another recipe."""
        for step in range(first, last + 1):
            if not self._path(step).is_file():
                raise DataError(
                    f"--train-only: {self._path(step)} is missing, and the run has steps {first} "
                    f"to {last}: set train.stop_after_step = {step - 1}, or name another directory."
                )
        if first <= last:
            self._read(first)

    def next_rollouts(self, step: int) -> Rollouts:
        """The rollouts of a step. Every rank calls this. Raises DataError, ConfigError."""
        rollouts, self.origin = self._ranks.broadcast_from_rank0(lambda: self._read(step))
        self.state = rollouts.state
        return rollouts

    def engine_metrics(self) -> dict[str, float]:
        """There is no engine."""
        return {}

    def _path(self, step: int) -> Path:
        return self._dir / f"step-{step}.jsonl"

    def _read(self, step: int) -> tuple[Rollouts, dict[str, Any] | None]:
        path = self._path(step)
        try:
            header, *rows = [_checked(row) for row in read_json_lines(path)]
            groups = [(bool(row["trained"]), _group(row)) for row in rows]
            if (step, len(groups)) != (header["step"], header["groups"]):
                raise ValueError
            keys, state, unfinished = header["keys"], header["state"], header["unfinished"]
            origin = header.get("origin")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({disk_reason(error)})") from error
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path} is damaged or not complete: copy it again from the run that wrote it."
            ) from error
        self._compare(path, keys)
        trained = [group for is_trained, group in groups if is_trained]
        others = [group for is_trained, group in groups if not is_trained]
        return Rollouts(trained, others, unfinished, state), origin

    def _compare(self, path: Path, keys: dict[str, Any]) -> None:
        for name in self._keys | keys:
            ours, theirs = self._keys.get(name), keys.get(name)
            if ours != theirs:
                raise ConfigError(
                    f"--train-only: {path} was sampled with {name} = {theirs!r}, and the recipe "
                    f"has {ours!r}; name rollouts of this recipe, or restore the value."
                )


class LastKept(NamedTuple):
    """The last step from 1 on whose rollouts are kept, and where the next one begins.

    `origin` as in `write_kept`.
    """

    step: int
    state: dict[str, Any]
    origin: dict[str, Any] | None = None

    def require(self, origin: dict[str, Any]) -> None:
        """Raise ConfigError if these steps were sampled from elsewhere."""
        if not self.step:
            return
        if self.origin is None:
            raise ConfigError(
                "--rollout-only: run.dir has the rollouts of a run that trains; name another one."
            )
        for name, ours in origin.items():
            if (theirs := self.origin[name]) != ours:
                raise ConfigError(
                    f"--rollout-only: run.dir has {self.step} steps that were sampled with {name} "
                    f"= {theirs!r}, and now it is {ours!r}; name another run.dir, or restore it."
                )


def last_kept(run_dir: Path, keys: dict[str, Any], ranks: Ranks) -> LastKept:
    """What an earlier --rollout-only has kept in `run_dir`. Raises as `KeptRollouts`."""
    step = 0
    while (run_dir / DIRECTORY / f"step-{step + 1}.jsonl").is_file():
        step += 1
    if not step:
        return LastKept(0, {})
    kept = KeptRollouts(str(run_dir), keys, ranks)
    return LastKept(step, kept.next_rollouts(step).state, kept.origin)


def check_kept(recipe: RlRecipe, tokenizer_fingerprint: str, train_only: str) -> str:
    """What --train-only=DIR or, without a directory, --rollout-only goes on from.

    Raises as these do.
    """
    keys, run_dir = sampling_keys(recipe, tokenizer_fingerprint), Path(recipe.run.dir)
    if not train_only:
        kept = last_kept(run_dir, keys, Ranks())
        kept.require(sampling_origin(recipe))
        return f"{run_dir}, steps whose rollouts it has: {kept.step}"
    newest = newest_in(run_dir, lambda _: None)
    first, last = newest.step + 1 if newest else 1, last_step_of(recipe, recipe.schedule)
    KeptRollouts(train_only, keys, Ranks()).require(first, last)
    return f"{train_only} has the rollouts of steps {first} to {last}"


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    if row.pop(CHECKSUM) != checksum(row):
        raise ValueError
    return row


def _group(row: dict[str, Any]) -> Group:
    responses: list[Response] = []
    for each in row["responses"]:
        each.pop("trainer_logprobs")
        responses.append(response_from_row(each))
    return Group(row["name"], Prompt(**row["prompt"]), row["prompt_token_ids"], responses)
