"""What is known about a run before it starts: device, model shape, schedule, what cannot work."""

import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint import Checkpoint
from infir2.checkpoint.fingerprint import is_run
from infir2.checkpoint.reader import CHECKPOINTS, published_steps, read_state
from infir2.config.env_vars import import_advice, is_torch_dist
from infir2.config.load import Loaded
from infir2.config.resume import check_resume
from infir2.config.rules import phase_rules
from infir2.config.schema import (
    ModelSection,
    OptimizerSection,
    RlRecipe,
    RunSection,
    ScheduleSection,
    TrainRecipe,
)
from infir2.errors import CheckpointError, ConfigError
from infir2.model import ModelConfig
from infir2.model.attention_cuda import flash_attention_4
from infir2.model.safetensors_io import read_config, read_json
from infir2.parallel.mesh import Sizes

# Parameters, between measured sizes (docs/results/scale.md): 2.1x at 0.5B, 1.03x at 1.5B.
GRAPHS_PAY_BELOW = 1.2e9


def device_of(section: RunSection) -> torch.device:
    """The device of a recipe; `auto` is a GPU if torch sees one. Raises ConfigError."""
    if section.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if section.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device is cuda, but torch sees no GPU: set run.device = 'cpu' or check the driver."
        )
    return torch.device(section.device)


def set_up_torch(section: RunSection) -> None:
    """Apply `run.threads` and `run.deterministic` to this process, before its first operation.

    Raises ConfigError if the GPU's attention cannot repeat its bits.
    """
    if section.threads:
        torch.set_num_threads(section.threads)
    if section.deterministic:
        if device_of(section).type == "cuda" and flash_attention_4() is None:
            raise ConfigError(
                "run.deterministic needs FlashAttention 4 on a GPU, because torch's own attention "
                "sums gradients in no fixed order: pip install 'infir2[gpu]', or set it to false"
            )
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def planned_config(model: ModelSection, vocab_size: int = 1) -> ModelConfig:
    """The shape of a recipe's model, read from headers alone.

    `vocab_size` is the tokenizer's, for a new model that does not set its own.
    """
    if model.shape is not None:
        return ModelConfig.from_shape(model.shape, vocab_size=model.shape.vocab_size or vocab_size)
    path = Path(model.path)
    refuse_torch_dist(path)
    if is_run(path):
        return saved_config(read_state(path), path)
    return read_config(path)


def require_masters(model: ModelSection) -> None:
    """Raise CheckpointError for a directory with FP8 weights, which cannot be trained."""
    path = Path(model.path)
    if model.shape is not None or is_run(path):
        return
    if read_json(path / "config.json").get("quantization_config") is not None:
        raise CheckpointError(
            f"model.path: {path} has quantized weights without masters; train from BF16 weights: "
            f"infir2 import fp8 {path} --to NEW, then name NEW."
        )


def refuse_torch_dist(path: Path) -> None:
    """Raise ConfigError for Megatron's checkpoint format, with the command that converts it."""
    if is_torch_dist(path):
        raise ConfigError(f"model.path: {import_advice(path)}, and set model.path to its output.")


def check_vocabulary(config: ModelConfig, num_tokens: int) -> None:
    """Raise ConfigError if a tokenizer has ids that the model's embedding does not have."""
    if num_tokens > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {num_tokens} tokens and the model {config.vocab_size} rows; "
            "set data.tokenizer to the model's own."
        )


def saved_config(state: Mapping[str, Any], origin: Path) -> ModelConfig:
    """The model shape in a checkpoint's state. Raises CheckpointError if it has none."""
    if not isinstance(state.get("model_config"), dict):
        raise CheckpointError(
            f"{origin}: its state has no 'model_config'; it was not saved by a training run."
        )
    return ModelConfig.from_hf(state["model_config"])


def resumed_model(model: ModelSection, checkpoint: Checkpoint | None) -> ModelSection:
    """The model section of a run that resumes from `checkpoint`: the checkpoint itself.

    The model that the run began with need not exist anymore. Raises ConfigError when model.shape
    differs from the checkpoint's, because no option makes its tensors fit.
    """
    if checkpoint is None:
        return model
    config = saved_config(checkpoint.state, checkpoint.path)
    if model.shape is not None:
        wanted = ModelConfig.from_shape(model.shape, model.shape.vocab_size or config.vocab_size)
        names = [field.name for field in fields(config) if not field.name.endswith("_token_id")]
        for name in names:
            if getattr(wanted, name) != getattr(config, name):
                raise ConfigError(
                    f"model.shape makes {name} = {getattr(wanted, name)}, and {checkpoint.path} "
                    f"has {getattr(config, name)}; restore the value, or name a new run.dir."
                )
    return model.model_copy(update={"path": str(checkpoint.path), "shape": None})


def complete_schedule(recipe: TrainRecipe, steps_per_epoch: int | None) -> ScheduleSection:
    """The schedule with total_steps computed from train.epochs if the recipe leaves it at 0."""
    schedule = recipe.schedule
    if schedule.total_steps:
        return schedule
    if not recipe.train.epochs or steps_per_epoch is None:
        raise ConfigError("schedule.total_steps is 0: set it, or train.epochs with finite data")
    total_steps = max(1, math.ceil(recipe.train.epochs * steps_per_epoch))
    schedule = schedule.model_copy(update={"total_steps": total_steps})
    for is_broken, key, sentence in phase_rules(schedule):
        if is_broken:
            raise ConfigError(f"{key} {sentence} train.epochs makes {total_steps} steps.")
    return schedule


def last_step_of(recipe: TrainRecipe, schedule: ScheduleSection) -> int:
    """The step at which this command ends: the schedule's last, or train.stop_after_step."""
    return min(schedule.total_steps, recipe.train.stop_after_step or schedule.total_steps)


def check_branch(schedule: ScheduleSection, step: int, stop_after_step: int = 0) -> None:
    """Raises ConfigError for a schedule that cannot continue from a checkpoint of `step`.

    `stop_after_step` is the recipe's; 0 for none. total_steps = 0 is not known yet.
    """
    if 0 < stop_after_step <= step:
        raise ConfigError(
            f"train.stop_after_step ({stop_after_step}) must be greater than the step of "
            f"checkpoint.branch_from ({step}), from which the run continues."
        )
    if schedule.total_steps and schedule.total_steps <= step:
        raise ConfigError(
            f"schedule.total_steps ({schedule.total_steps}) must be greater than the step of "
            f"checkpoint.branch_from ({step}), from which the run continues."
        )
    start = schedule.decay_from_step
    if start < 0 and schedule.total_steps:
        start = schedule.total_steps - schedule.decay_steps
    if schedule.kind == "wsd" and schedule.decay_steps and 0 <= start < step:
        raise ConfigError(
            f"the decay starts at step {start}, before checkpoint.branch_from ({step}); "
            f"set schedule.decay_from_step to {step} or later."
        )


def check_positions(config: ModelConfig, key: str, num_tokens: int, prompt_tokens: int = 0) -> None:
    """Raises ConfigError if sequences may be longer than the model has positions.

    `num_tokens` is the value of `key`; `prompt_tokens` is the longest prompt that precedes them.
    """
    limit = config.max_positions - prompt_tokens
    if num_tokens <= limit:
        return
    prompt = f" after a prompt of {prompt_tokens} tokens" if prompt_tokens else ""
    remedy = f"set it to at most {limit}" if limit > 0 else "remove the longest prompts"
    raise ConfigError(
        f"{key} = {num_tokens}{prompt} exceeds the model's {config.max_positions} positions "
        f"(max_position_embeddings); {remedy}, or choose a model with more positions."
    )


def resume_changes(loaded: Loaded) -> list[str]:
    """One line per changed key of a run that has checkpoints; empty for a new run.

    Raises ConfigError for a change that a resumed run cannot accept. Reads one small file.
    """
    run_dir = Path(loaded.recipe.run.dir)
    if not published_steps(run_dir / CHECKPOINTS):
        return []
    return check_resume(loaded, run_dir / "recipe.toml")


def needs_one_process(section: OptimizerSection) -> bool:
    """8-bit moments have scales that cross shards; BF16 gradients cannot be summed in FP32."""
    return section.moment_dtype == "fp8" or section.grad_dtype == "bf16"


def check_observer(recipe: TrainRecipe, sizes: Sizes) -> None:
    """Raises ConfigError for an observer, which several processes cannot run."""
    if sizes.world > 1 and recipe.train.observe_every:
        raise ConfigError(
            f"train.observe_every needs one process, not {sizes.world}; set it to 0, or observe "
            "a run of one process"
        )


def check_graphs(recipe: TrainRecipe, sizes: Sizes) -> None:
    """Raises ConfigError for CUDA graphs of a sharded model, or of RL's changing micro-batches."""
    if recipe.train.cuda_graphs is not True or _can_use_graphs(recipe, sizes):
        return
    if isinstance(recipe, RlRecipe):
        raise ConfigError('train.cuda_graphs is for cpt and sft; set it to false or "auto"')
    raise ConfigError(
        'train.cuda_graphs needs a whole model on each GPU: set it to false or "auto", or '
        f"parallel.dp_replicate = {sizes.world} with parallel.dp = 1, if the model fits"
    )


def uses_graphs(recipe: TrainRecipe, sizes: Sizes, num_parameters: int) -> bool:
    """Whether a run on GPUs launches full micro-batches' blocks as CUDA graphs."""
    wanted = recipe.train.cuda_graphs
    pays = num_parameters < GRAPHS_PAY_BELOW if wanted == "auto" else wanted
    return pays and _can_use_graphs(recipe, sizes)


def _can_use_graphs(recipe: TrainRecipe, sizes: Sizes) -> bool:
    return not isinstance(recipe, RlRecipe) and sizes.num_shards * sizes.tp == 1


def check_optimizer(recipe: TrainRecipe, sizes: Sizes) -> None:
    """Raises ConfigError for an optimizer that several processes cannot run."""
    if sizes.world > 1 and needs_one_process(recipe.optimizer):
        raise ConfigError(
            'optimizer.moment_dtype = "fp8" and optimizer.grad_dtype = "bf16" need one process, '
            f'not {sizes.world}; use optimizer.moment_dtype = "bf16" and optimizer.grad_dtype = '
            '"fp32", or optimizer.offload = true'
        )
