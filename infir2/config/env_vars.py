"""The environment variables of the reference implementation's scripts, as keys of a recipe.

They override recipe files, and options override them. The command prints each one that is set, so
that a variable left over in a shell never changes a run silently. torchrun reads MASTER_ADDR.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from infir2.config.keys import Recipe
from infir2.config.schema import EvalRecipe, RlRecipe
from infir2.errors import ConfigError


@dataclass(frozen=True)
class Variable:
    """A variable that is set, the key that it sets ("" for none), and the sentence to print."""

    name: str
    value: str
    key: str
    note: str


_TRAIN = {
    "DATA_DIR": "data.sources",
    "DATA_PATH": "data.sources",
    "HF_CHECKPOINT": "model.path",
    "REF_LOAD": "model.path",
    "SAVE_DIR": "run.dir",
    "LOAD_DIR": "checkpoint.branch_from",
    "MAX_TOKENS_PER_GPU": "data.micro_batch_tokens",
    "LOG_DIR": "",
}
_RL = _TRAIN | {
    "HF_CHECKPOINT": "rollout.model",
    "ROLLOUT_MAX_RESPONSE_LEN": "rl.max_response_tokens",
    "NUM_ROLLOUT": "schedule.total_steps",
}
_EVAL = {
    "MODEL_PATH": "model.path",
    "DATASET_LOCAL": "evaluate.problems",
    "EVAL_WORK_DIR": "run.dir",
    "EVAL_BATCH": "rollout.max_running_requests",
    "MAX_NEW_TOKENS": "evaluate.max_response_tokens",
    "GENERATED_NUM": "evaluate.samples",
    "TEMPERATURE": "evaluate.temperature",
    "TOP_P": "evaluate.top_p",
}
_SERVER = dict.fromkeys(
    ("SERVED_NAME", "TP_SIZE", "API_PORT"), "the model is loaded in this process"
)
# Of a recipe that names benchmarks, whose engines are servers.
_BENCHMARKS = {"DATASET_LOCAL": "benchmarks.data", "TP_SIZE": "rollout.tensor_parallel"}
_UNUSED = {"LOG_DIR": "logs and metrics are in the run directory", **_SERVER}
SOURCES = ("data.sources", "evaluate.problems")


def variables_of(recipe_class: Recipe) -> dict[str, str]:
    """Return {variable: dotted key that it sets}; "" for a variable without effect."""
    if issubclass(recipe_class, EvalRecipe):
        return _EVAL | dict.fromkeys(_SERVER, "")
    return dict(_RL if issubclass(recipe_class, RlRecipe) else _TRAIN)


def set_variables(
    recipe_class: Recipe, environ: Mapping[str, str], run_dir: str, has_benchmarks: bool = False
) -> Iterator[Variable]:
    """Yield the variables of this kind of recipe that are set and not empty.

    Args:
        run_dir: `run.dir` of the recipe files. A LOAD_DIR equal to the run directory sets no key,
            because the run resumes from there anyway.
        has_benchmarks: whether the recipe files name benchmarks.

    Raises:
        ConfigError: two variables set one key to different values, or REF_LOAD is a checkpoint that
            has to be converted.
    """
    known = variables_of(recipe_class) | (_BENCHMARKS if has_benchmarks else {})
    values = {name: environ[name] for name in known if environ.get(name)}
    keys = {name: key for name, key in known.items() if name in values}
    if keys.get("HF_CHECKPOINT") == "model.path" and "REF_LOAD" in values:
        keys["HF_CHECKPOINT"] = "data.tokenizer"
    run_dir = os.path.normpath(values.get("SAVE_DIR", run_dir) or ".")
    for name, key in keys.items():
        value = values[name]
        _check_conflict(name, keys, values)
        if name == "REF_LOAD" and is_torch_dist(Path(value)):
            advice = import_advice(Path(value), values.get("HF_CHECKPOINT", "HF_DIR"))
            raise ConfigError(f"environment REF_LOAD: {advice}, and set REF_LOAD to its output.")
        if name == "LOAD_DIR" and os.path.normpath(value) == run_dir:
            note = (
                f"LOAD_DIR={value} is the run directory itself: "
                "the run resumes from its newest checkpoint anyway."
            )
            yield Variable(name, value, "", note)
        elif not key:
            note = f"{name} is set but not needed: {_UNUSED[name]}."
            yield Variable(name, value, "", note)
        else:
            note = f"environment variable {name} sets {key} to {value!r}."
            yield Variable(name, value, key, note)


def is_torch_dist(path: Path) -> bool:
    """Whether a directory is a checkpoint that Megatron wrote: an iteration, or their parent.

    A checkpoint of ours also has `.metadata`, and a manifest.
    """
    files = (".metadata", "latest_checkpointed_iteration.txt")
    is_ours = (path / "manifest.json").is_file()
    return not is_ours and any((path / name).is_file() for name in files)


def import_advice(path: Path, like: str = "HF_DIR") -> str:
    """Why Megatron's checkpoint `path` cannot be trained, and the command that converts it.

    `like` is a Hugging Face directory of the same model.
    """
    output = os.path.normpath(path) + "-hf"
    command = f"infir2 import megatron {path} --to {output} --like {like}"
    explained = " (HF_DIR: a Hugging Face directory of this model)" if like == "HF_DIR" else ""
    return f"{path} is a Megatron torch_dist checkpoint; convert it once, `{command}`{explained}"


def _check_conflict(name: str, keys: Mapping[str, str], values: Mapping[str, str]) -> None:
    """Raise ConfigError if another variable sets the key of `name` to another value."""
    if not keys[name]:
        return
    for other in keys:
        if other != name and keys[other] == keys[name] and values[other] != values[name]:
            raise ConfigError(
                f"environment {name}: {name} and {other} both set {keys[name]}, to different "
                "values; unset one of them."
            )
