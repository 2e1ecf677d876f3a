"""The resolved recipe of a run directory: written with where each value came from, read back, compared on resume."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from infir2.config.keys import flatten
from infir2.config.load import Loaded, R, load
from infir2.errors import ConfigError

# Keys that may differ when a run is resumed: they do not change which numbers the next step is to compute. Anything
# else (data, seed, shape, schedule, loss) makes the run a different one.
SAFE_KEYS = (
    "run.dir",
    "run.threads",
    "run.device",
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
    "checkpoint",
    "parallel",
    "rl.max_mismatch_kl",
    "rl.evaluate_every",
    "rollout",
    "evaluate",
)


def dump(loaded: Loaded[Any]) -> str:
    """The recipe as TOML that loads again to an equal recipe; each line ends with the value's origin."""
    head = "# Resolved recipe: every key with its value and where the value came from.\n"
    return head + "".join(_section(loaded.recipe, loaded.provenance, "", "")) + "\n"


def _section(
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
            yield f"\n{name} = {_toml(value)}  # {_printable(provenance.get(prefix + name, 'default'))}"
    if header:
        yield "\n"
    for name, value in tables.items():
        yield from _section(value, provenance, f"{prefix}{name}.", f"[{prefix}{name}]")
    for name, items in lists.items():
        for index, item in enumerate(items):
            yield from _section(item, provenance, f"{prefix}{name}.{index}.", f"[[{prefix}{name}]]")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; TOML also refuses a bare DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)


def _printable(origin: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in origin)


def changed_keys(old: BaseModel, new: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ -> (old, new); None stands for a key that one of them does not have."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key)
    }


def is_safe(key: str) -> bool:
    """Whether a resumed run may have another value of this key."""
    return any(key == safe or key.startswith(f"{safe}.") for safe in SAFE_KEYS)


def check_resume(loaded: Loaded[R], recipe_path: Path) -> list[str]:
    """Compares the recipe with the one the run directory was made with.

    Returns:
        One line per changed key, to be printed; or that the earlier recipe cannot be read.

    Raises:
        ConfigError: a key changed that makes it a different run, or may have, and `--accept-changes` was not given.
    """
    mend = "name a new run.dir, restore the value, or resume with --accept-changes."
    try:
        old = load(type(loaded.recipe), [recipe_path]).recipe
    except ConfigError as error:
        text = f"{recipe_path}: what this run was started with cannot be read back ({str(error).rstrip('.')})"
        if not loaded.accept_changes:
            raise ConfigError(f"{text}; {mend}") from error
        return [text]
    changes = changed_keys(old, loaded.recipe)
    unsafe = [key for key in changes if not is_safe(key)]
    if unsafe and not loaded.accept_changes:
        key = unsafe[0]
        before, after = changes[key]
        rest = f" (and {len(unsafe) - 1} more: {', '.join(unsafe[1:4])})" if len(unsafe) > 1 else ""
        raise ConfigError(
            f"{recipe_path}: this run was started with {key} = {before!r}, and now it is {after!r}{rest}; {mend}"
        )
    return [
        f"resumed with {key} = {after!r} (was {before!r})"
        for key, (before, after) in changes.items()
    ]
