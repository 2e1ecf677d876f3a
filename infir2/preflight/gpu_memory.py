"""Where a training step's memory goes on a GPU: bytes by purpose, their sum the allocator's peak.

The peak stands where the backward begins: everything of all layers is kept, and either the head's logits or one layer's
working memory comes on top. Checked against the allocator by bench/step.py (docs/results).
"""

from infir2.config.schema import TrainRecipe
from infir2.model import ModelConfig
from infir2.parallel.mesh import Sizes

_SCALE, _EXPONENT = 4 / 128, 1 / 128  # bytes of a 1x128 scale per code, and of its exponent alone


def gpu_ledger(
    config: ModelConfig, recipe: TrainRecipe, sizes: Sizes | None = None
) -> dict[str, int]:
    """Bytes of weights, FP8 or BF16 copies, gradients, optimizer, activations, working memory, head; of one GPU.

    Example: Qwen2.5-1.5B, FP8, 16,384 tokens in a micro-batch: 63 GiB in all.
    """
    if sizes and sizes.world > 1:
        return _sharded_ledger(config, recipe, sizes)
    linear, total = linear_parameters(config), num_parameters(config)
    tokens = recipe.data.micro_batch_tokens
    fp8, optimizer = recipe.fp8, recipe.optimizer
    head = config.vocab_size * config.hidden_size
    code_copies = (2 if fp8.keep_transposed else 1) * linear if fp8.enabled else 2 * linear
    moments = {"fp32": 8.0, "bf16": 4.0, "fp8": 2 + 2 * _SCALE}[optimizer.moment_dtype] * (
        not optimizer.offload
    )
    gradient = 4 if optimizer.grad_dtype == "fp32" else 2
    chunk = min(recipe.train.loss_chunk_tokens, tokens)
    kept, working = layer_bytes(config, recipe)
    layers = config.num_layers
    activations = tokens * (
        layers * kept
        if recipe.model.recompute != "full"
        else layers * 2 * config.hidden_size + kept
    )
    # When the head's gradient exists, no other does; when the last one does, the activations are gone.
    start = activations + gradient * head + max(chunk * config.vocab_size * 6, tokens * working)
    end = gradient * total + tokens * working
    parts = {
        "weights": 4 * total,
        "FP8 copies" if fp8.enabled else "BF16 copies": code_copies + 2 * head,
        "optimizer": int(moments * total),
    }
    if end > start:
        return parts | {
            "grad_dtype": gradient * total,
            "activations": 0,
            "head and working memory": tokens * working,
        }
    return parts | {
        "gradients": gradient * head,
        "activations": activations
        + tokens
        * config.hidden_size
        * 6,  # the stream, the final norm's output, the head's gradient
        "head and working memory": start - activations - gradient * head,
    }


def _sharded_ledger(config: ModelConfig, recipe: TrainRecipe, sizes: Sizes) -> dict[str, int]:
    """Weights, optimizer and FP8 codes are shared by the ranks, and gathered a block at a time; gradients are FP32."""
    linear, total = linear_parameters(config), num_parameters(config)
    tokens = recipe.data.micro_batch_tokens // (sizes.cp * sizes.tp)
    kept, working = layer_bytes(config, recipe)
    streams = (
        2 * config.hidden_size * config.num_layers + kept
        if recipe.model.recompute == "full"
        else config.num_layers * kept
    )
    block, rest = linear / config.num_layers / sizes.tp, total - linear
    local, byte = (linear / sizes.tp + rest) / sizes.num_shards, 1 if recipe.fp8.enabled else 2
    moments = (8 if recipe.optimizer.moment_dtype == "fp32" else 4) * (not recipe.optimizer.offload)
    parts = {
        "weights": 4 * local,
        "FP8 copies": linear / sizes.tp / sizes.num_shards if recipe.fp8.enabled else 0,
        "optimizer": moments * local,
        "gathered weights": 2 * rest
        + 4 * byte * block,  # root; two blocks, as they arrive and as they are read
        "gradients": 4
        * (local + rest + 2 * block),  # root until the end; of a block, and as it is sent
        "activations": tokens * (streams + 6 * config.hidden_size),
        "head and working memory": max(
            min(recipe.train.loss_chunk_tokens, tokens) * config.vocab_size * 6, tokens * working
        ),
    }
    return {name: int(size) for name, size in parts.items() if size}


def layer_bytes(config: ModelConfig, recipe: TrainRecipe) -> tuple[int, int]:
    """(kept for the backward, most working memory of the backward) of one layer, bytes per token."""
    model, fp8 = recipe.model, recipe.fp8
    d, f = config.hidden_size, config.ffn_size
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attended = config.num_heads * config.head_dim
    code = 1 + _SCALE if fp8.enabled else 2
    selective = model.recompute == "selective"
    small = model.pre_activation_dtype == "fp8"
    pre = 2 * f * (1 + _EXPONENT if small else 2)
    product = (
        0
        if selective
        else f * (1 + _EXPONENT if small and fp8.enabled and fp8.scale_format == "pow2" else code)
    )
    norms = 0 if selective or (fp8.enabled and fp8.scale_format == "fp32") else 2 * d * code
    kept = 2 * (2 * d) + 2 * heads + 2 * attended + 4 * config.num_heads + 8 + norms + pre + product
    # grad_y, [dgate | dup] in both layouts, the product's second layout, the stream's gradients
    working = 2 * f + 2 * f * (2 * code if fp8.enabled else 2) + f * code + 6 * d
    return int(kept), int(working)


def linear_parameters(config: ModelConfig) -> int:
    """Weights of the decoder layers' Linears."""
    d, heads = config.hidden_size, config.num_heads * config.head_dim
    return config.num_layers * (
        d * (2 * heads + 2 * config.num_kv_heads * config.head_dim) + 3 * d * config.ffn_size
    )


def num_parameters(config: ModelConfig) -> int:
    """All parameters, norms and biases included roughly (they are thousandths)."""
    return linear_parameters(config) + config.vocab_size * config.hidden_size * (
        1 if config.tie_embeddings else 2
    )
