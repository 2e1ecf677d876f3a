"""Checks of the model's files from their headers: the trainer's model and the engine's."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from infir2.checkpoint import open_checkpoint
from infir2.checkpoint.fingerprint import is_run
from infir2.config.paths import check_model_directory
from infir2.config.schema import EvalRecipe, ModelSection, RlRecipe, TrainRecipe
from infir2.convert.serving import (
    as_patterns,
    require_loadable,
    require_servable,
    unservable_layers,
    unservable_sentence,
)
from infir2.convert.weights import PARAMETERS, file_scale_format, parameter_shapes
from infir2.engines.engine_weights import engine_fp8
from infir2.engines.http_client import require_urls
from infir2.errors import CheckpointError, ConfigError
from infir2.model import HfWeights, ModelConfig
from infir2.model.hf_names import SCALE_SUFFIX
from infir2.preflight.finding import Finding
from infir2.train.plan import check_positions, planned_config

_EXPORT = "export the start of the run (infir2 export hf, infir2 export fp8)"


@dataclass(frozen=True)
class ModelFacts:
    """The recipe's model. `origin` is its directory, or "made new"."""

    config: ModelConfig
    num_parameters: int
    origin: str

    def __str__(self) -> str:
        return (
            f"{self.origin}: {self.config.architecture}, "
            f"{self.num_parameters / 1e6:,.1f} M parameters, "
            f"{self.config.num_layers} layers of {self.config.hidden_size}"
        )


def model_facts(section: ModelSection, vocab_size: int) -> ModelFacts:
    """The model that the recipe creates or loads; no weight is read.

    Args:
        section: the recipe's `[model]`.
        vocab_size: the tokenizer's, for a model that is created from a shape without one.

    Raises:
        ConfigError: the path does not exist.
        CheckpointError: a weight is missing or has another shape than the configuration requires.
    """
    path = Path(section.path)
    if section.shape is None:
        check_model_directory("model.path", section.path)
    config = planned_config(section, vocab_size)
    shapes = parameter_shapes(config.to_hf())
    if section.shape is None:
        _compare_shapes(path, shapes, _stored_shapes(path))
    num_parameters = sum(prod(shape) for shape in shapes.values())
    return ModelFacts(config, num_parameters, section.path or "made new")


def serving_note(recipe: EvalRecipe | TrainRecipe, model: ModelFacts) -> str:
    """What to add to a finding if inference servers refuse FP8 layers of the run, or ""."""
    if not isinstance(recipe, TrainRecipe) or not recipe.fp8.enabled:
        return ""
    config = model.config.to_hf()
    refused = unservable_layers(config, recipe.fp8)
    if not refused:
        return ""
    patterns = as_patterns(config, recipe.fp8, refused)
    skip_modules = json.dumps([*recipe.fp8.skip_modules, *patterns])
    return (
        f"; {unservable_sentence(refused, patterns)} If they will serve this model, set"
        f" fp8.skip_modules = {skip_modules}, or export with --servable."
    )


def check_lengths(
    recipe: TrainRecipe | EvalRecipe, config: ModelConfig, longest_prompts: dict[str, int]
) -> None:
    """Raises ConfigError if sequences are longer than the model has positions.

    `longest_prompts` are tokens of prompts by key, as `check_sources` returns them.
    """
    limits = {}
    if isinstance(recipe, RlRecipe):
        limits["rl.max_response_tokens"] = recipe.rl.max_response_tokens
    elif isinstance(recipe, TrainRecipe):
        limits["data.sequence_tokens"] = recipe.data.sequence_tokens
    every = recipe.rl.evaluate_every if isinstance(recipe, RlRecipe) else 1
    asks = isinstance(recipe, EvalRecipe) and bool(recipe.benchmarks.names)
    if isinstance(recipe, RlRecipe | EvalRecipe) and (recipe.evaluate.problems or asks) and every:
        limits["evaluate.max_response_tokens"] = recipe.evaluate.max_response_tokens
    for key, num_tokens in limits.items():
        check_positions(config, key, num_tokens, longest_prompts.get(key, 0))


def check_engine(recipe: RlRecipe, model: ModelFacts) -> Finding:
    """The engine's FP8 directory has the trainer's shapes and scale format, and servers take it.

    The bytes themselves are compared when the run starts. Raises ConfigError.
    """
    require_urls(recipe.rollout.urls)
    path = Path(recipe.rollout.model)
    if not recipe.rollout.model:
        raise ConfigError(f"rollout.model is empty; {_EXPORT} and name it.")
    if not path.exists():
        raise ConfigError(f"rollout.model: {path} does not exist; {_EXPORT}.")
    engine = model_facts(ModelSection(path=str(path)), 0)
    if parameter_shapes(engine.config.to_hf()) != parameter_shapes(model.config.to_hf()):
        raise ConfigError(
            f"rollout.model: {path} has other shapes than {model.origin}; "
            "export the start of this run."
        )
    fp8 = engine_fp8(recipe)
    if fp8.enabled and (scale_format := file_scale_format(path)) != fp8.scale_format:
        raise ConfigError(
            f"rollout.model: {path} has {scale_format} scales, "
            f"and fp8.scale_format is {fp8.scale_format}."
        )
    if recipe.rollout.engine in ("sglang", "vllm"):
        require_servable("rollout.model", path, fp8)
        require_loadable("rollout.model", path, recipe.rollout.tensor_parallel)
    num_fp8 = sum(name.endswith(SCALE_SUFFIX) for name in HfWeights(path).names())
    if num_fp8 and not fp8.enabled:
        raise ConfigError(
            f"rollout.model: {path} is in FP8 and the trainer in BF16: name an export in BF16 "
            "(infir2 export hf), or sample in FP8 (rollout.precision = fp8)."
        )
    return Finding("engine", "ok", f"{path}: {num_fp8} FP8 weights, shapes as the trainer's")


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not is_run(path):
        files = HfWeights(path)
        return {name: files.shape(name) for name in files.names()}
    tensors = open_checkpoint(path, sizes_only=True).tensors()
    return {
        name.removeprefix(PARAMETERS): tensors.shape(name)
        for name in tensors
        if name.startswith(PARAMETERS)
    }


def _compare_shapes(
    path: Path, required: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]
) -> None:
    missing = [name for name in required if name not in stored]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} weights are missing, such as {missing[0]}; "
            "copy the model again."
        )
    for name, shape in required.items():
        if stored[name] != shape:
            raise CheckpointError(
                f"{path}: {name} is {list(stored[name])}, and its config calls for {list(shape)}; "
                "copy the model again."
            )
