"""The part of `infir2 check` that looks at weights and sizes: model files, memory, disk, the engine's model."""

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from infir2.checkpoint import open_checkpoint
from infir2.config.schema import ModelSection, RlRecipe, TrainRecipe
from infir2.convert.weights import PARAMETERS, file_scale_format, parameter_shapes
from infir2.errors import CheckpointError, ConfigError
from infir2.model import HfWeights, ModelConfig
from infir2.model.hf_names import SCALE_SUFFIX
from infir2.numerics.formats import GROUP
from infir2.parallel.mesh import Sizes
from infir2.preflight.gpu_memory import gpu_ledger
from infir2.train.build import device_of, is_run, planned_config
from infir2.train.supervisor import needs_one_process

GIB = 2**30
PROCESS_BYTES = 450 * 2**20
CPU_STATE_BYTES = 29  # of a parameter: FP32 master, gradient, two moments; its code, and its values in FP64 and FP32 while they are used
CHECKPOINT_BYTES = 12  # of a parameter in a checkpoint: master and moments


@dataclass(frozen=True)
class ModelFacts:
    """What the recipe's model is, from headers alone."""

    config: ModelConfig
    num_parameters: int
    origin: str

    def describe(self) -> str:
        shape = f"{self.config.num_layers} layers of {self.config.hidden_size}"
        return f"{self.origin}: {self.config.architecture}, {self.num_parameters / 1e6:,.1f} M parameters, {shape}"


def model_facts(section: ModelSection, vocab_size: int) -> ModelFacts:
    """The model that the recipe makes or loads. Raises CheckpointError for a missing or misshapen weight, ConfigError."""
    path = Path(section.path)
    if section.shape is None and not path.exists():
        raise ConfigError(
            f"model.path: {path} does not exist; run the stage that makes it, or mend the path."
        )
    config = planned_config(section, vocab_size)
    shapes = parameter_shapes(config.to_hf())
    if section.shape is None:
        _compare(path, shapes, _stored_shapes(path))
    return ModelFacts(
        config,
        sum(torch.Size(shape).numel() for shape in shapes.values()),
        section.path or "made new",
    )


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not is_run(path):
        files = HfWeights(path)
        return {name: files.shape(name) for name in files.names()}
    tensors = open_checkpoint(path, glance=True).tensors()
    return {
        name.removeprefix(PARAMETERS): tensors.shape(name)
        for name in tensors
        if name.startswith(PARAMETERS)
    }


def _compare(
    path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} weights are missing, such as {missing[0]}; copy the model again."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{path}: {name} is {list(found[name])}, and its config calls for {list(shape)}; copy the model again."
            )


def check_engine(recipe: RlRecipe, model: ModelFacts) -> str:
    """The native engine's FP8 directory against the trainer's model. The bytes themselves are compared when the run starts."""
    if not recipe.rollout.model:
        raise ConfigError(
            "rollout.model is empty; export the start of the run (infir2 export hf, infir2 export fp8) and name it."
        )
    path = Path(recipe.rollout.model)
    if not path.exists():
        raise ConfigError(
            f"rollout.model: {path} does not exist; export the start of the run (infir2 export hf, infir2 export fp8)."
        )
    engine = model_facts(ModelSection(path=str(path)), 0)
    if parameter_shapes(engine.config.to_hf()) != parameter_shapes(model.config.to_hf()):
        raise ConfigError(
            f"rollout.model: {path} is of another shape than {model.origin}; export the start of this run."
        )
    if recipe.fp8.enabled and file_scale_format(path) != recipe.fp8.scale_format:
        raise ConfigError(
            f"rollout.model: {path} has {file_scale_format(path)} scales, and fp8.scale_format is {recipe.fp8.scale_format}."
        )
    return f"{path}: {sum(name.endswith(SCALE_SUFFIX) for name in HfWeights(path).names())} FP8 weights, shapes as the trainer's"


def sizes_of(recipe: TrainRecipe) -> Sizes:
    """Sizes of the run: where parallel.dp leaves the number of processes open, those of the launcher that calls, or this host's GPUs."""
    section = recipe.parallel
    if section.dp != -1:
        return Sizes(section.dp_replicate, section.dp, section.cp, section.tp)
    fixed = section.dp_replicate * section.cp * section.tp
    gpus = (
        torch.cuda.device_count()
        if device_of(recipe.run).type == "cuda" and not needs_one_process(recipe.optimizer)
        else 1
    )
    return Sizes(
        section.dp_replicate,
        max(1, int(os.environ.get("WORLD_SIZE", gpus)) // fixed),
        section.cp,
        section.tp,
    )


def idle_ranks(recipe: TrainRecipe, sizes: Sizes) -> str:
    """Why some ranks would have nothing to train; empty if all have."""
    sequences = (
        recipe.rl.prompts_per_step * recipe.rl.group_size
        if isinstance(recipe, RlRecipe)
        else recipe.data.batch_samples
    )
    sequences, padded = sequences or recipe.data.batch_sequences, 2 * GROUP * sizes.cp
    if sizes.cp > 1 and padded > recipe.data.micro_batch_tokens:
        tokens = recipe.data.micro_batch_tokens
        return f"parallel.cp = {sizes.cp} pads micro-batches of {tokens} tokens to {padded}; raise data.micro_batch_tokens, or lower it."
    if sizes.num_data > sequences:
        return f"{sizes.num_data} ranks read data and a step has {sequences} sequences: the others train nothing; lower parallel.dp."
    return ""


def check_memory(recipe: TrainRecipe, model: ModelFacts, sizes: Sizes) -> str:
    """The peak of a step of one process, estimated, against the device's memory. Raises ConfigError if it cannot fit."""
    device = device_of(recipe.run)
    parts = memory_parts(recipe, model, device.type, sizes)
    total = sum(parts.values())
    there = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else _available_memory()
    )
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    text = f"about {total / GIB:.2f} GiB ({listed}) of {there / GIB:.1f} GiB on {device.type}, for each of {sizes.world} processes"
    if total > there:
        raise ConfigError(
            f"{text}; lower data.micro_batch_tokens or train.loss_chunk_tokens, set model.recompute = 'full', or share it: parallel.dp."
        )
    if device.type == "cuda" and recipe.checkpoint.background:
        copy, free = CHECKPOINT_BYTES * model.num_parameters, _available_memory()
        text += f"; {copy / GIB:.2f} of {free / GIB:.1f} GiB on the host for the copy that is saved in the background, ranks together"
        if copy > free:
            return f"warn: {text}; with one host set checkpoint.background = false."
    return text


def memory_parts(
    recipe: TrainRecipe, model: ModelFacts, device: str, sizes: Sizes | None = None
) -> dict[str, int]:
    """Bytes by purpose of one process: on a GPU `gpu_ledger`; on a CPU the states, and a bound of what a step keeps and computes in."""
    config = model.config
    if device == "cuda":
        return gpu_ledger(config, recipe, sizes) | _engine_parts(recipe, model)
    shards, tokens = sizes.num_shards * sizes.tp if sizes else 1, recipe.data.micro_batch_tokens
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layers = 1 if recipe.model.recompute == "full" else config.num_layers
    kept = (
        layers * 4 * (4 * config.hidden_size + 2 * heads + 3 * config.ffn_size)
        + config.num_layers * 4 * config.hidden_size
    )
    computed = 8 * (12 * config.ffn_size + 8 * config.hidden_size)
    logits = 8 * min(recipe.train.loss_chunk_tokens, tokens) * config.vocab_size
    parts = {
        "weights and optimizer": CPU_STATE_BYTES * model.num_parameters // shards,
        "activations": tokens * (kept + computed) + logits,
    }
    if recipe.checkpoint.background:
        parts["copy for saving"] = CHECKPOINT_BYTES * model.num_parameters // shards
    return parts | {"interpreter": PROCESS_BYTES} | _engine_parts(recipe, model)


def _engine_parts(recipe: TrainRecipe, model: ModelFacts) -> dict[str, int]:
    if not isinstance(recipe, RlRecipe):
        return {}
    config, hp_bytes = model.config, 4 if recipe.model.compute_dtype == "float32" else 2
    slot_tokens = recipe.rl.max_prompt_tokens + recipe.rl.max_response_tokens
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * hp_bytes
    return {
        "engine": 2 * model.num_parameters
        + recipe.rollout.max_running_requests * slot_tokens * cache
    }


def check_disk(recipe: TrainRecipe, model: ModelFacts, directory: Path) -> str:
    """Free space against the kept checkpoints and the one being written."""
    one = CHECKPOINT_BYTES * model.num_parameters
    needed, free = (recipe.checkpoint.keep + 1) * one, shutil.disk_usage(directory).free
    text = f"{free / GIB:.1f} GiB free, checkpoints of {one / GIB:.2f} GiB, {recipe.checkpoint.keep} kept and one being written"
    if free < needed:
        raise ConfigError(f"run.dir: {text}; free some space, or lower checkpoint.keep.")
    return text


def _available_memory() -> int:
    """Bytes that a process could still get, of the machine's memory."""
    with contextlib.suppress(OSError):
        found = re.search(
            r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii")
        )
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
