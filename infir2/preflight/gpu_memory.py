"""Where a training step's GPU memory goes: bytes by purpose; their sum is the allocator's peak.

The peak is reached where the backward begins: the activations of all layers are saved, and either
the head's logits or the working memory of one layer is added. bench/step.py compares these numbers
with the allocator's (docs/results).
"""

from infir2.config.schema import RlRecipe, TrainRecipe
from infir2.engines.server_room import servers_on_a_gpu, starts_servers
from infir2.model import ModelConfig
from infir2.numerics.formats import GROUP
from infir2.parallel.mesh import Sizes
from infir2.train.plan import uses_graphs

_SCALE, _EXPONENT = 4 / 128, 1 / 128  # bytes per code: of a 1x128 scale, and of its exponent only
_MOMENTS_BYTES = {"fp32": 8.0, "bf16": 4.0, "fp8": 2 + 2 * _SCALE}
# Of a chunk of the loss: FP32 logits and their BF16 gradient, and those of the chunk before, which
# live until they are replaced.
_LOGIT_BYTES, _LOGIT_BYTES_OF_SEVERAL_CHUNKS = 6, 10


def pass_tokens(recipe: TrainRecipe) -> int:
    """Tokens of the longest forward pass: in RL, a response may be longer than a micro-batch."""
    tokens = recipe.data.micro_batch_tokens
    if isinstance(recipe, RlRecipe):
        tokens = max(tokens, recipe.rl.max_prompt_tokens + recipe.rl.max_response_tokens)
    return tokens


def server_bytes(
    recipe: TrainRecipe, gpu_bytes: float, gpus: int, nodes: int = 1
) -> dict[str, int]:
    """RL only: what servers on the trainer's own `gpus` of a node keep of each while it trains."""
    if not isinstance(recipe, RlRecipe):
        return {}
    rollout = recipe.rollout
    is_apart = rollout.weight_transfer == "nccl" or rollout.sleep
    if is_apart or not starts_servers(rollout):
        return {}
    each = servers_on_a_gpu(rollout, gpus, nodes) or 1
    return {"servers": int(each * rollout.memory_fraction * gpu_bytes)}


def gpu_ledger(
    config: ModelConfig, recipe: TrainRecipe, sizes: Sizes | None = None
) -> dict[str, int]:
    """Bytes by purpose on one GPU: weights and copies, gradients, optimizer, activations, work.

    Args:
        config: the model.
        recipe: micro-batch size, recomputation, dtypes of gradients and moments.
        sizes: the mesh; None for one process. Replicas that hold the whole model need what one
            process does.

    Example: Qwen2.5-1.5B, FP8, 16,384 tokens in a micro-batch: 50 GiB in total.
    """
    sizes = sizes or Sizes()
    if sizes.num_shards * sizes.tp > 1:
        return _sharded_ledger(config, recipe, sizes)
    linear, total = linear_parameters(config), num_parameters(config)
    head = config.vocab_size * config.hidden_size
    fp8, optimizer = recipe.fp8, recipe.optimizer
    copies = 1 if fp8.enabled and not fp8.caches_transposed(recipe.model) else 2
    moments = 0.0 if optimizer.offload else _MOMENTS_BYTES[optimizer.moment_dtype]
    parts = {
        "weights": 4 * total,
        "FP8 copies" if fp8.enabled else "BF16 copies": copies * linear + 2 * head,
        "optimizer": int(moments * total),
    }
    if uses_graphs(recipe, sizes, config.num_parameters):
        return parts | _peak_with_graphs(config, recipe, linear + head)
    return parts | _backward_peak(config, recipe, total, head, sizes.num_data)


def _peak_with_graphs(config: ModelConfig, recipe: TrainRecipe, gradients: int) -> dict[str, int]:
    """With the blocks as CUDA graphs, whose pool of memory nothing else may use between steps.

    It holds the blocks' gradients, all activations, the working memory of a layer, inputs and
    outputs: the head's logits come on top.
    """
    tokens, d = pass_tokens(recipe), config.hidden_size
    gradient = 4 if recipe.optimizer.grad_dtype == "fp32" else 2
    activations = tokens * (_saved_bytes(config, recipe) + 6 * d)
    parts = _moment(gradient * gradients, activations, logits_bytes(config, recipe, tokens))
    # States, their gradients and outputs in BF16; cosines and sines in FP32.
    held = layer_bytes(config, recipe)[1] + 4 * 2 * d + 4 * config.head_dim
    return parts | {"CUDA graphs": tokens * held}


def _backward_peak(
    config: ModelConfig, recipe: TrainRecipe, total: int, head: int, num_data: int
) -> dict[str, int]:
    """The larger of two moments of the backward, in bytes.

    At its start only the head's gradient exists (all of them if the step has had a micro-batch
    before), and all activations; at its end all gradients exist and the activations are freed.
    """
    tokens = pass_tokens(recipe)
    gradient = 4 if recipe.optimizer.grad_dtype == "fp32" else 2
    first = gradient * (total if accumulates(recipe, num_data) else head)
    working = tokens * layer_bytes(config, recipe)[1]
    start_working = max(logits_bytes(config, recipe, tokens), working)
    saved = tokens * _saved_bytes(config, recipe)
    if gradient * total + working > first + saved + start_working:
        return _moment(gradient * total, 0, working)
    # The residual stream, the output of the final norm, the gradient of the head's input.
    around_head = 6 * config.hidden_size
    return _moment(first, saved + tokens * around_head, start_working)


def accumulates(recipe: TrainRecipe, num_data: int = 1) -> bool:
    """Whether a step may have several micro-batches, of which all but the first find gradients."""
    if isinstance(recipe, RlRecipe):
        return True
    rows = max(recipe.data.batch_sequences, recipe.data.batch_samples)
    return rows * recipe.data.sequence_tokens > num_data * recipe.data.micro_batch_tokens


def logits_bytes(config: ModelConfig, recipe: TrainRecipe, tokens: int) -> int:
    """Logits of a chunk of the loss and their gradient."""
    chunk = recipe.train.loss_chunk_tokens
    each = _LOGIT_BYTES if tokens <= chunk else _LOGIT_BYTES_OF_SEVERAL_CHUNKS
    return min(chunk, tokens) * config.vocab_size * each


def _saved_bytes(config: ModelConfig, recipe: TrainRecipe) -> int:
    """What all layers keep for the backward, bytes per token."""
    saved, _ = layer_bytes(config, recipe)
    if recipe.model.recompute == "full":
        return config.num_layers * 2 * config.hidden_size + saved
    return config.num_layers * saved


def _moment(gradients: float, activations: float, working: float) -> dict[str, int]:
    return {
        "gradients": int(gradients),
        "activations": int(activations),
        "head and working memory": int(working),
    }


def _sharded_ledger(config: ModelConfig, recipe: TrainRecipe, sizes: Sizes) -> dict[str, int]:
    """Bytes by purpose on one of several ranks.

    Weights, optimizer and FP8 codes are sharded and gathered one block at a time; gradients are
    FP32. The root (embeddings, final norm, head) stays gathered for the whole step.
    """
    linear, total = linear_parameters(config), num_parameters(config)
    block, root = linear / config.num_layers / sizes.tp, total - linear
    local = (linear / sizes.tp + root) / sizes.num_shards
    moments = (8 if recipe.optimizer.moment_dtype == "fp32" else 4) * (not recipe.optimizer.offload)
    code = 1 if recipe.fp8.enabled else 2
    keeps_codes = recipe.fp8.enabled and recipe.model.recompute != "full"
    unit = recipe.parallel.blocks_per_gather * block
    parts = {
        "weights": 4 * local,
        "FP8 copies": linear / sizes.tp / sizes.num_shards if keeps_codes else 0,
        "optimizer": moments * local,
        # The root in BF16; two units, each as it is received and as the GEMMs read it.
        "gathered weights": 2 * root + 4 * code * unit,
    }
    if not recipe.parallel.reshard_after_forward:
        parts["gathered weights"] = 2 * root + code * (linear / sizes.tp + 2 * unit)
    named = {name: int(size) for name, size in parts.items() if size}
    return named | _sharded_backward_peak(config, recipe, sizes, local, unit)


def _sharded_backward_peak(
    config: ModelConfig, recipe: TrainRecipe, sizes: Sizes, local: float, unit: float
) -> dict[str, int]:
    """The larger of the two moments of `_backward_peak` on one of several ranks."""
    root = num_parameters(config) - linear_parameters(config)
    head = config.vocab_size * config.hidden_size
    tokens = pass_tokens(recipe) // (sizes.cp * sizes.tp)
    working = tokens * layer_bytes(config, recipe)[1]
    start_working = max(logits_bytes(config, recipe, tokens), working)
    saved = tokens * (_saved_bytes(config, recipe) + 6 * config.hidden_size)
    earlier = local if accumulates(recipe, sizes.num_data) else 0
    start = 4 * (earlier + head)
    # The root's until the end of the backward; one unit's as computed and as it is sent.
    end = 4 * (local + root + 2 * unit)
    if end + working > start + saved + start_working:
        return _moment(end, 0, working)
    return _moment(start, saved, start_working)


def layer_bytes(config: ModelConfig, recipe: TrainRecipe) -> tuple[int, int]:
    """(saved for the backward, peak working memory of the backward) of one layer, bytes per token.

    D model, F ffn; a code is one byte and its share of a 1x128 scale, or a BF16 value.
    """
    model, fp8 = recipe.model, recipe.fp8
    d, f = config.hidden_size, config.ffn_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attention_output = config.num_heads * config.head_dim
    code = 1 + _SCALE if fp8.enabled else 2
    is_selective = model.recompute == "selective"
    is_fp8_activation = model.pre_activation_dtype == "fp8"
    gate_up = 2 * f * (1 + _EXPONENT if is_fp8_activation else 2)
    swiglu = 0.0
    if not is_selective:
        shares_exponents = is_fp8_activation and fp8.enabled and fp8.scale_format == "pow2"
        swiglu = f * (1 + _EXPONENT if shares_exponents else code)
    norms = 0.0 if is_selective or (fp8.enabled and fp8.scale_format == "fp32") else 2 * d * code
    if fp8.enabled and not are_blocks_aligned(config):
        norms += 2 * d * code  # q, k and v quantize their input each
    log_sum_exp_and_rms = 4 * config.num_heads + 8
    streams = 2 * (2 * d) + 2 * qkv + 2 * attention_output
    saved = streams + log_sum_exp_and_rms + norms + gate_up + swiglu
    # grad_y; [dgate | dup] in both layouts; the second layout of the SwiGLU output; gradients of
    # the residual stream.
    working = 2 * f + 2 * f * (2 * code if fp8.enabled else 2) + f * code + 6 * d
    return int(saved), int(working)


def are_blocks_aligned(config: ModelConfig) -> bool:
    """Whether q, k and v are one FP8 matrix: their rows end where a block of 128 does."""
    heads = (config.num_heads, config.num_kv_heads)
    return all(number * config.head_dim % GROUP == 0 for number in heads)


def linear_parameters(config: ModelConfig) -> int:
    """Number of weights of the decoder layers' Linears."""
    d, heads = config.hidden_size, config.num_heads * config.head_dim
    attention = d * (2 * heads + 2 * config.num_kv_heads * config.head_dim)
    return config.num_layers * (attention + 3 * d * config.ffn_size)


def num_parameters(config: ModelConfig) -> int:
    """Number of all parameters without norms and biases (they are thousandths)."""
    head = config.vocab_size * config.hidden_size
    return linear_parameters(config) + head * (1 if config.tie_embeddings else 2)
