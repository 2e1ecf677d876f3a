"""The shape of a recipe's model, and the mean length of its rows, present here or not."""

from pathlib import Path

from infir2.config.paths import check_model_directory
from infir2.config.schema import ModelSection, RlRecipe, ShapeSection, TrainRecipe
from infir2.errors import ConfigError, UserError
from infir2.model import ModelConfig
from infir2.planner.gpus import package_json
from infir2.preflight.data import mean_row_tokens
from infir2.train.build import open_tokenizer
from infir2.train.plan import planned_config

_KEYS = (
    "architecture",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_size",
    "vocab_size",
    "tie_embeddings",
)
_NEW_VOCABULARY = 32_000  # of a new model whose tokenizer is not here


def shape_of(section: ModelSection) -> tuple[ModelConfig, str]:
    """The model's shape, and a sentence about where it is from if not from the model itself.

    A model that is not here is known by a name in its path, such as models/Qwen2.5-7B. Raises
    ConfigError.
    """
    try:
        return planned_config(section, _NEW_VOCABULARY), ""
    except UserError as error:
        named = _known_name(section.path)
        if not named and Path(section.path).exists():
            check_model_directory("model.path", section.path)
            raise
        if not named:
            known = ", ".join(package_json("shapes.json"))
            raise ConfigError(
                f"model.path: {section.path} is not here and its name is none of {known}; name "
                "the model's directory (its config.json is enough), or give it such a name with "
                "--model.path=NAME."
            ) from error
    shape = ShapeSection(**dict(zip(_KEYS, package_json("shapes.json")[named], strict=True)))
    note = f"{section.path} is not here: the shape is that of {named}"
    return ModelConfig.from_shape(shape, shape.vocab_size), note


def _known_name(path: str) -> str:
    """The longest known model name in a path, or ""."""
    names = [name for name in package_json("shapes.json") if name in path.lower()]
    return max(names, key=len, default="")


def mean_tokens(recipe: TrainRecipe, given: int) -> tuple[float, str]:
    """Mean tokens of a document, conversation, or prompt and response; a sentence if assumed."""
    if given:
        return given, ""
    if isinstance(recipe, RlRecipe):
        response = recipe.rl.max_response_tokens / 2
        note = f"a response is taken as {response:,.0f} tokens, half of rl.max_response_tokens"
        return response + recipe.rl.max_prompt_tokens / 8, f"{note} (--sample-tokens N sets it)"
    try:
        return mean_row_tokens(recipe, open_tokenizer(recipe.model, recipe.data)), ""
    except UserError:
        limit = recipe.data.sequence_tokens
        return limit, (
            f"the data or its tokenizer cannot be read here: a row is taken as {limit:,} tokens, "
            "the most it can be (--sample-tokens N sets the mean)"
        )
