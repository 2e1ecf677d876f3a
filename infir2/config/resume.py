"""The resolved recipe in a run directory: dump it, load it back, compare it on resume."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from infir2.config.keys import flatten
from infir2.config.load import Loaded, R, load, sections_in
from infir2.errors import ConfigError, first_line
from infir2.files import UnexpectedTypeError, disk_error, read_own

# A resumed run may change these keys: they do not change what the next step computes. Any other key
# (data, seed, shape, schedule, loss) would make it a different run.
SAFE_KEYS = (
    "run.dir",
    "run.threads",
    "run.device",
    "run.deterministic",
    "model.recompute",
    "data.validation_sources",
    "data.micro_batch_tokens",
    "data.max_quarantined_fraction",
    "train.stop_after_step",
    "train.validate_every",
    "train.validation_batches",
    "train.max_nonfinite_steps",
    "train.on_spike",
    "train.loss_chunk_tokens",
    "train.log_every",
    "train.tracker",
    "train.cuda_graphs",
    "train.observe_every",
    "checkpoint",
    "parallel",
    "rl.max_mismatch_kl",
    "rl.max_mismatch_prob_error",
    "rl.evaluate_every",
    "rl.keep_rollouts",
    "rollout",
    "evaluate",
)


MAX_BYTES = 2**24


def dump(loaded: Loaded[Any]) -> str:
    """Return the recipe as TOML that loads to an equal recipe; comments name each origin."""
    header = "# Resolved recipe: every key with its value and where the value came from.\n"
    return header + "".join(_dump_section(loaded.recipe, loaded.provenance, "", "")) + "\n"


def _dump_section(
    section: BaseModel, provenance: dict[str, str], prefix: str, header: str
) -> Iterator[str]:
    values = {name: getattr(section, name) for name in type(section).model_fields}
    tables = {name: value for name, value in values.items() if isinstance(value, BaseModel)}
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, tuple) and value and isinstance(value[0], BaseModel)
    }
    if header:
        yield f"\n{header}"
    for name, value in values.items():
        if name not in tables and name not in lists and value is not None:
            origin = _printable(provenance.get(prefix + name, "default"))
            yield f"\n{name} = {_toml(value)}  # {origin}"
    if header:
        yield "\n"
    for name, value in tables.items():
        key = f"{prefix}{name}"
        yield from _dump_section(value, provenance, f"{key}.", f"[{key}]")
    for name, items in lists.items():
        key = f"{prefix}{name}"
        for index, item in enumerate(items):
            yield from _dump_section(item, provenance, f"{key}.{index}.", f"[[{key}]]")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON and TOML escape alike, except that TOML also requires an escape for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)


def _printable(origin: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in origin)


def changed_keys(old: BaseModel, new: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (old value, new value)} of keys that differ; None for a missing key."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key)
    }


def is_safe(key: str) -> bool:
    """Whether a resumed run may change this key."""
    return any(key == safe or key.startswith(f"{safe}.") for safe in SAFE_KEYS)


def _check_same_kind(loaded: Loaded[Any], recipe_path: Path) -> None:
    """Raise ConfigError if the run is one of another verb. What cannot be read has no kind."""
    try:
        was_rl = "rl" in sections_in([recipe_path])
    except ConfigError:
        return
    is_rl = "rl" in type(loaded.recipe).model_fields
    if was_rl != is_rl and not loaded.accept_changes:
        verbs = "rl" if was_rl else "cpt or sft"
        raise ConfigError(
            f"{recipe_path.parent}: this is a run of infir2 {verbs}; name a new run.dir."
        )


def check_resume(loaded: Loaded[R], recipe_path: Path) -> list[str]:
    """Compare the recipe with the resolved recipe of the run directory that it resumes.

    Returns:
        Lines to print: one per changed key, or that the earlier recipe cannot be read.

    Raises:
        ConfigError: a key that is not safe changed, or the earlier recipe cannot be read, and
            `--accept-changes` was not given.
        CheckpointError: the disk does not let the earlier recipe be read now.
    """
    _check_same_kind(loaded, recipe_path)
    fix = "name a new run.dir, restore the value, or resume with --accept-changes."
    try:
        read_own(recipe_path, MAX_BYTES)
        old = load(type(loaded.recipe), [recipe_path]).recipe
    except (ConfigError, OSError, ValueError, RecursionError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        is_absent = isinstance(cause, FileNotFoundError | UnexpectedTypeError)
        if isinstance(cause, OSError) and not is_absent:
            raise disk_error(f"{recipe_path}: cannot be read", cause) from error
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)[:300]
        text = f"{recipe_path}: the recipe that this run was started with cannot be read ({reason})"
        if not loaded.accept_changes:
            raise ConfigError(f"{text}; {fix}") from error
        return [text]
    changes = changed_keys(old, loaded.recipe)
    unsafe = [key for key in changes if not is_safe(key)]
    if unsafe and not loaded.accept_changes:
        key = unsafe[0]
        before, after = changes[key]
        rest = f" (and {len(unsafe) - 1} more: {', '.join(unsafe[1:4])})" if len(unsafe) > 1 else ""
        raise ConfigError(
            f"{recipe_path}: this run was started with {key} = {before!r}, "
            f"and now it is {after!r}{rest}; {fix}"
        )
    return [
        f"resumed with {key} = {after!r} (was {before!r})"
        for key, (before, after) in changes.items()
    ]
