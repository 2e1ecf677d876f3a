"""The environment variables that the reference's scripts are configured with, as keys of a recipe.

They override recipe files and are overridden by options. Each one that is set is named on the terminal, so that a
variable left over in a shell never changes a run in silence. `MASTER_ADDR` is read by torchrun itself.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from infir2.config.keys import Recipe
from infir2.config.schema import EvalRecipe, RlRecipe
from infir2.errors import ConfigError


@dataclass(frozen=True)
class Word:
    """A variable that is set: the key it sets (empty: none), and the sentence to print."""

    name: str
    text: str
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
_SERVED = dict.fromkeys(
    ("SERVED_NAME", "TP_SIZE", "API_PORT"), "the model is loaded in this process"
)
_UNUSED = {"LOG_DIR": "logs and metrics are in the run directory", **_SERVED}
SOURCES = ("data.sources", "evaluate.problems")


def variables_of(recipe_class: Recipe) -> dict[str, str]:
    """Variable name -> dotted key it sets (empty: accepted, without effect)."""
    if issubclass(recipe_class, EvalRecipe):
        return _EVAL | dict.fromkeys(_SERVED, "")
    return dict(_RL if issubclass(recipe_class, RlRecipe) else _TRAIN)


def set_variables(recipe_class: Recipe, environ: Mapping[str, str], run_dir: str) -> Iterator[Word]:
    """The variables that are set (an empty one is not) for this kind of recipe.

    Args:
        run_dir: `run.dir` of the recipe files; a LOAD_DIR equal to the run directory means nothing more than resuming.

    Raises:
        ConfigError: two variables set one key to different values.
    """
    texts = {name: environ[name] for name in variables_of(recipe_class) if environ.get(name)}
    keys = {name: key for name, key in variables_of(recipe_class).items() if name in texts}
    if keys.get("HF_CHECKPOINT") == "model.path" and "REF_LOAD" in texts:
        keys["HF_CHECKPOINT"] = "data.tokenizer"
    for name, key in keys.items():
        text = texts[name]
        twins = [
            other for other in keys if other != name and keys[other] == key and texts[other] != text
        ]
        if key and twins:
            raise ConfigError(
                f"environment {name}: {name} and {twins[0]} both set {key}, to different values; unset one of them."
            )
        if name == "LOAD_DIR" and os.path.normpath(text) == os.path.normpath(
            texts.get("SAVE_DIR", run_dir) or "."
        ):
            yield Word(
                name,
                text,
                "",
                f"LOAD_DIR={text} is the run directory itself: the run resumes from its newest checkpoint anyway.",
            )
        elif not key:
            yield Word(name, text, "", f"{name} is set but not needed: {_UNUSED[name]}.")
        else:
            yield Word(name, text, key, f"environment variable {name} sets {key} to {text!r}.")
