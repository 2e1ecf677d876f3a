"""What one training step does on one GPU: FLOPs, bytes of memory and of NCCL, the host's passes.

Each `Work` is what the fitted constants of `step_time` are multiplied with. Counted per GPU and
optimizer step.
"""

from dataclasses import dataclass, field
from typing import Literal

from infir2.config.schema import TrainRecipe
from infir2.model import ModelConfig
from infir2.model.block_graphs import LEAST_FILLED
from infir2.parallel.mesh import Sizes
from infir2.preflight.gpu_memory import are_blocks_aligned, linear_parameters, num_parameters
from infir2.train.plan import uses_graphs

Attention = Literal["flash", "torch"]
# Kernels of a layer and pass (docs/results/scale.md); in FP8 more if q, k and v are three matrices.
_KERNELS_BF16, _KERNELS_FP8, _KERNELS_UNALIGNED = 55, 62, 100
# Bytes that AdamW reads and writes per parameter, the norm of the gradients among them.
_MOMENT_TRAFFIC = {"fp32": 16, "bf16": 8, "fp8": 4}


@dataclass(frozen=True)
class Load:
    """One step of a model on one GPU.

    Attributes:
        micro_batches: forward passes of this GPU in the step, each of `tokens` tokens before cp
            and tp split them.
        length: tokens of a sequence, for attention.
        nodes: the ranks are spread over as many.
    """

    config: ModelConfig
    recipe: TrainRecipe
    tokens: int
    length: int
    sizes: Sizes = field(default_factory=Sizes)
    nodes: int = 1
    micro_batches: int = 1
    attention: Attention = "flash"
    has_optimizer: bool = True

    @property
    def local_tokens(self) -> float:
        """Tokens of a pass that one GPU computes."""
        return self.tokens / (self.sizes.cp * self.sizes.tp)

    @property
    def is_aligned(self) -> bool:
        """Whether q, k and v are one matrix."""
        return not self.recipe.fp8.enabled or are_blocks_aligned(self.config)

    @property
    def uses_graphs(self) -> bool:
        """Whether the blocks run as CUDA graphs, which less filled micro-batches do not."""
        is_full = self.tokens >= LEAST_FILLED * self.recipe.data.micro_batch_tokens
        return is_full and uses_graphs(self.recipe, self.sizes, self.config.num_parameters)


@dataclass(frozen=True)
class Work:
    """Of one step on one GPU. FLOPs; attention's are (forward, backward); bytes.

    `layer_passes` counts layers times micro-batches, more with recomputation: what the host runs.
    """

    layer_flops: float
    head_flops: float
    attention_flops: tuple[float, float]
    traffic: float
    pre_activation_traffic: float
    update_traffic: float
    offload_bytes: float
    shard_bytes: float
    replica_bytes: float
    tensor_bytes: float
    layer_passes: float
    kernels: float


def step_work(load: Load) -> Work:
    """The work of a step; see docs/results/hopper.md for what a step consists of."""
    config, recipe = load.config, load.recipe
    linear, head = linear_parameters(config), config.vocab_size * config.hidden_size
    tokens = load.local_tokens * load.micro_batches
    passes = 4 if recipe.model.recompute == "full" else 3
    forward = 2.0 * tokens * load.length * config.num_heads * config.head_dim * config.num_layers
    swiglu = recipe.model.pre_activation_dtype == "fp8"
    gate_up = 8 * config.ffn_size * config.num_layers * tokens
    shard, replica, tensor = _communication(load)
    layer_passes = config.num_layers * load.micro_batches * passes / 3
    return Work(
        layer_flops=2.0 * tokens * linear * passes,
        head_flops=6.0 * tokens * head,
        attention_flops=(forward * (passes - 2), 2.5 * forward),
        traffic=tokens * _layer_traffic(load) * config.num_layers + _weight_traffic(load),
        pre_activation_traffic=gate_up if swiglu else 0.0,
        update_traffic=_update_traffic(load),
        offload_bytes=_offload_bytes(load),
        shard_bytes=shard,
        replica_bytes=replica,
        tensor_bytes=tensor,
        layer_passes=layer_passes,
        kernels=layer_passes * _layer_kernels(load),
    )


def _layer_kernels(load: Load) -> int:
    if not load.is_aligned:
        return _KERNELS_UNALIGNED
    return _KERNELS_FP8 if load.recipe.fp8.enabled else _KERNELS_BF16


def _layer_traffic(load: Load) -> float:
    """Bytes that norms, RoPE, SwiGLU, quantizers and sums move in a layer, per token.

    The head's softmax is the share of a layer that its logits take.
    """
    config, model = load.config, load.recipe.model
    fp8 = load.recipe.fp8.enabled
    d, f = config.hidden_size, config.ffn_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    code = 1.0 if fp8 else 2.0
    forward = 4 * d + 4 * d * code + 12 * d + 4 * qkv + (4 + code) * f
    second_layouts = 2 * (2 * d + f + qkv) + 3 * (2 * d + qkv) if fp8 else 0
    backward = 12 * d + 12 * d + 4 * qkv + (6 + 4 * code) * f + second_layouts
    again = {"none": 0.0, "selective": 4 * d + (4 + 2 * code) * f, "full": forward}[model.recompute]
    softmax = 8.0 * config.vocab_size / config.num_layers
    return forward + backward + again + softmax


def _weight_traffic(load: Load) -> float:
    """Once per step the codes (or BF16 copies) of the weights; gradients once per micro-batch."""
    linear, recipe = linear_parameters(load.config), load.recipe
    shards = load.sizes.num_shards * load.sizes.tp
    gradient = 4 if recipe.optimizer.grad_dtype == "fp32" else 2
    cached = recipe.fp8.caches_transposed(recipe.model) or not recipe.fp8.enabled
    transposes = 0 if cached else 2 * linear
    added = (load.micro_batches - 1) * 2 * gradient * linear / load.sizes.tp
    return 6.0 * linear / shards + load.micro_batches * transposes + added


def _update_traffic(load: Load) -> float:
    if not load.has_optimizer:
        return 0.0
    optimizer, sizes = load.recipe.optimizer, load.sizes
    gradient = 4 if optimizer.grad_dtype == "fp32" else 2
    per_parameter = 8 + 2 * gradient + _MOMENT_TRAFFIC[optimizer.moment_dtype]
    return per_parameter * num_parameters(load.config) / (sizes.num_shards * sizes.tp)


def _offload_bytes(load: Load) -> float:
    """Bytes of moments that a step brings from host memory, and takes back."""
    optimizer, sizes = load.recipe.optimizer, load.sizes
    per_parameter = _MOMENT_TRAFFIC[optimizer.moment_dtype] * optimizer.offload
    return per_parameter * num_parameters(load.config) / (sizes.num_shards * sizes.tp)


def _communication(load: Load) -> tuple[float, float, float]:
    """Bytes that a GPU receives in a step: of FSDP's shards, of replicas, of tp and cp."""
    config, sizes = load.config, load.sizes
    linear, total = linear_parameters(config), num_parameters(config)
    code = 1 if load.recipe.fp8.enabled else 2
    others = (sizes.num_shards - 1) / sizes.num_shards
    times = 2 if load.recipe.parallel.reshard_after_forward else 1
    gathers = times * code * linear / sizes.tp + 2 * (total - linear)
    reduced = 4 * (linear / sizes.tp + total - linear)
    shard = load.micro_batches * others * (gathers + reduced)
    replica = 2 * reduced / sizes.num_shards * (sizes.dp_replicate - 1) / sizes.dp_replicate
    return shard, replica, _activation_bytes(load, code)


def _activation_bytes(load: Load, code: int) -> float:
    """Bytes that a GPU receives in a step from its tp and cp groups.

    tp, twice a layer: the stream gathered (as codes in FP8) and summed in FP32; backward its
    gradient gathered in BF16 and summed in FP32. cp: keys and values gathered in BF16, and their
    gradients summed. Full recomputation repeats the forward's.
    """
    config, sizes, tokens = load.config, load.sizes, load.tokens * load.micro_batches
    again = load.recipe.model.recompute == "full"
    stream = 2 * ((1 + again) * (code + 4) + 2 + 4) * config.hidden_size * tokens / sizes.cp
    keys = (2 + again) * 2 * 2 * config.num_kv_heads * config.head_dim * tokens / sizes.tp
    tp, cp = ((size - 1) / size for size in (sizes.tp, sizes.cp))
    return config.num_layers * (tp * stream + cp * keys)
