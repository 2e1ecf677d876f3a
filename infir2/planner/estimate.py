"""Memory and time of one layout of a recipe: what `plan` compares and prints."""

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from infir2.config.schema import ModelSection, RlRecipe, TrainRecipe
from infir2.model import ModelConfig
from infir2.model.memory import GIB
from infir2.parallel.mesh import Sizes
from infir2.planner.gpus import Gpu
from infir2.planner.step_time import step_seconds
from infir2.planner.work import Attention, Load
from infir2.preflight.gpu_memory import gpu_ledger, num_parameters, server_bytes

Recompute = Literal["none", "selective", "full"]
USABLE = 0.94  # of a GPU's memory; the rest is CUDA's, NCCL's and lost to fragments
# Of the native engine (docs/results/engines.md): host and small kernels of a layer of a decode
# pass, and the share of the copy bandwidth at which it reads weights, keys and values.
_DECODE_LAYER_SECONDS, _DECODE_BANDWIDTH = 115e-6, 0.9


@dataclass(frozen=True)
class Job:
    """A recipe on GPUs. `row_tokens` is the mean of a row, with a response in RL."""

    config: ModelConfig
    recipe: TrainRecipe
    gpu: Gpu
    gpus: int  # of a node
    nodes: int
    row_tokens: float
    attention: Attention = "flash"

    @property
    def world(self) -> int:
        return self.gpus * self.nodes

    @property
    def rows(self) -> int:
        """Rows of an optimizer step: windows, samples or responses."""
        data = self.recipe.data
        if isinstance(self.recipe, RlRecipe):
            return self.recipe.rl.prompts_per_step * self.recipe.rl.group_size
        return data.batch_samples or max(1, data.batch_sequences)

    @property
    def length(self) -> float:
        """Tokens that attend to each other: of a row, which only windows and samples cut."""
        if isinstance(self.recipe, RlRecipe):
            return self.row_tokens
        return min(self.row_tokens, self.recipe.data.sequence_tokens)

    @property
    def step_tokens(self) -> float:
        """Tokens of an optimizer step on all GPUs."""
        windows = not isinstance(self.recipe, RlRecipe) and not self.recipe.data.batch_samples
        return self.rows * (self.recipe.data.sequence_tokens if windows else self.row_tokens)


@dataclass(frozen=True)
class Estimate:
    """One layout. `memory` is in bytes on one GPU, `seconds` of a step, both by part."""

    sizes: Sizes
    recompute: Recompute
    micro_batches: int
    memory: dict[str, int]
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def gib(self) -> float:
        return sum(self.memory.values()) / GIB

    def fits(self, gpu: Gpu) -> bool:
        return self.gib <= USABLE * gpu.memory_gib


def with_recompute(recipe: TrainRecipe, recompute: Recompute) -> TrainRecipe:
    """The recipe with another model.recompute."""
    model: ModelSection = recipe.model.model_copy(update={"recompute": recompute})
    return recipe.model_copy(update={"model": model})


def with_fp8(job: Job, enabled: bool) -> Job:
    """The job in FP8 or in BF16."""
    section = job.recipe.fp8.model_copy(update={"enabled": enabled})
    return replace(job, recipe=job.recipe.model_copy(update={"fp8": section}))


def estimate(job: Job, sizes: Sizes, recompute: Recompute | None = None) -> Estimate:
    """Memory and time of a step in this layout. Raises ConfigError for FP8 that a GPU lacks."""
    chosen = recompute or job.recipe.model.recompute
    recipe = with_recompute(job.recipe, chosen)
    per_rank = job.step_tokens / sizes.num_data
    micro_batches = max(1, ceil(per_rank / recipe.data.micro_batch_tokens))
    load = Load(
        config=job.config,
        recipe=recipe,
        tokens=round(per_rank / micro_batches),
        length=round(job.length),
        sizes=sizes,
        nodes=job.nodes,
        micro_batches=micro_batches,
        attention=job.attention,
    )
    memory = gpu_ledger(job.config, recipe, sizes)
    seconds = step_seconds(load, job.gpu)
    if isinstance(recipe, RlRecipe):
        memory |= _engine_memory(job, recipe)
        memory |= server_bytes(recipe, job.gpu.memory_gib * GIB, job.gpus, job.nodes)
        seconds = _rl_seconds(job, recipe, seconds)
    return Estimate(sizes, chosen, micro_batches, memory, seconds)


def _rl_seconds(job: Job, recipe: RlRecipe, training: dict[str, float]) -> dict[str, float]:
    """Seconds of a step by part; `training` is one pass over its responses."""
    forwards = 1 + bool(recipe.rl.reference)
    backward = 3 if recipe.model.recompute == "full" else 2  # in forwards, as the GEMMs take
    computing = training["GEMMs of the layers"] + training["attention"]
    seconds = {part: recipe.rl.passes * each for part, each in training.items()}
    seconds["log-probabilities"] = forwards * computing / (1 + backward)
    generation = _generation_seconds(job, recipe)
    if recipe.rl.max_off_policy_steps:  # responses are sampled while the trainer works
        generation = max(0.0, generation - sum(seconds.values()))
    return seconds | {"generation": generation}


def _engine_memory(job: Job, recipe: RlRecipe) -> dict[str, int]:
    held = 2 * num_parameters(job.config)
    parts = {"engine": held} if recipe.rollout.engine == "native" else {}
    return parts | ({"reference": held} if recipe.rl.reference else {})


def _generation_seconds(job: Job, recipe: RlRecipe) -> float:
    """Sampling a step's responses, without groups that are thrown away.

    By the native engine, one on each GPU, or by servers, whose GPUs share each pass.
    """
    config, rollout = job.config, recipe.rollout
    size = rollout.tensor_parallel
    engines = len(rollout.urls) or rollout.engines
    if rollout.engine == "native":
        engines, size = job.world, 1
    per_engine = ceil(job.rows / engines)
    running = min(per_engine, rollout.max_running_requests)
    weights = num_parameters(config) * (1 if recipe.fp8.enabled else 2)
    token_bytes = 4 * config.num_kv_heads * config.head_dim * config.num_layers
    read = weights + running * token_bytes * job.row_tokens / 2
    pass_seconds = config.num_layers * _DECODE_LAYER_SECONDS
    pass_seconds += read / size / (_DECODE_BANDWIDTH * job.gpu.bandwidth * 1e12)
    return job.row_tokens * ceil(per_engine / running) * pass_seconds
