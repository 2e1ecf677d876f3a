"""The estimate of one process's peak memory, against the memory of its device."""

import torch

from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe
from infir2.engines.kv_cache import page_bytes
from infir2.engines.native import CACHE_SHARE
from infir2.errors import ConfigError
from infir2.model.memory import GIB, device_memory, host_memory
from infir2.parallel.mesh import Sizes
from infir2.preflight.finding import Finding
from infir2.preflight.gpu_memory import gpu_ledger, pass_tokens, server_bytes
from infir2.preflight.model import ModelFacts
from infir2.train.plan import device_of

PROCESS_BYTES = 450 * 2**20
# FP32 master, gradient and two moments; the code; its values in FP64 and FP32 while in use.
CPU_BYTES_PER_PARAMETER = 29
CPU_ENGINE_BYTES_PER_PARAMETER = 9  # FP32 and the code; FP64 of one layer in use
CHECKPOINT_BYTES_PER_PARAMETER = 12  # FP32 master and two moments


def check_memory(recipe: TrainRecipe, model: ModelFacts, sizes: Sizes) -> Finding:
    """The estimated peak of a step of one process fits its device.

    Raises ConfigError if it does not. Too little host memory for background saves is a warning.
    """
    device = device_of(recipe.run)
    parts, available = memory_parts(recipe, model, device.type, sizes), device_memory(device)
    if device.type == "cuda" and not _have_spare_gpus(recipe, sizes):
        parts |= server_bytes(recipe, available, torch.cuda.device_count())
    total = sum(parts.values())
    if total <= available:
        parts |= _cache_part(recipe, model, available - total)
        total = sum(parts.values())
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    passes, key = _longest_pass(recipe)
    detail = (
        f"about {total / GIB:.2f} GiB ({listed}) of {available / GIB:.1f} GiB on {device.type}, "
        f"for each of {sizes.world} processes, {passes}"
    )
    if total > available:
        recompute = "" if recipe.model.recompute == "full" else "set model.recompute = 'full', "
        graphs = "set train.cuda_graphs = false, " if "CUDA graphs" in parts else ""
        elsewhere = "" if device.type == "cuda" else " (infir2 plan: for GPUs elsewhere)"
        raise ConfigError(
            f"{detail}; lower {key} or train.loss_chunk_tokens, "
            f"{recompute}{graphs}or shard with parallel.dp{elsewhere}."
        )
    if device.type != "cuda" or not recipe.checkpoint.background:
        return Finding("memory", "ok", detail)
    copy, free = CHECKPOINT_BYTES_PER_PARAMETER * model.num_parameters, host_memory()
    detail += (
        f"; {copy / GIB:.2f} of {free / GIB:.1f} GiB on the host for the copy that is saved in the "
        "background, for all ranks"
    )
    if copy > free:
        return Finding(
            "memory", "warn", f"{detail}; with one host set checkpoint.background = false."
        )
    return Finding("memory", "ok", detail)


def check_evaluation_memory(recipe: EvalRecipe, model: ModelFacts, prompt_tokens: int) -> Finding:
    """The weights and at least one response with its prompt fit the device. Raises ConfigError."""
    device = device_of(recipe.run)
    is_gpu, available = device.type == "cuda", device_memory(device)
    weights = (2 if is_gpu else CPU_ENGINE_BYTES_PER_PARAMETER) * model.num_parameters
    tokens = prompt_tokens + recipe.evaluate.max_response_tokens
    sequence = page_bytes(model.config, tokens, torch.bfloat16 if is_gpu else torch.float32)
    free = max(0, available - weights - PROCESS_BYTES)
    limit = int(recipe.rollout.cache_gib * GIB) or int(CACHE_SHARE * free)
    detail = (
        f"weights {weights / GIB:.2f} GiB, {sequence / GIB:.2f} for each response of {tokens:,} "
        f"tokens with its prompt, of {available / GIB:.1f} GiB on {device.type}"
    )
    if sequence > min(limit, free):
        raise ConfigError(
            f"{detail}: not one fits; lower evaluate.max_response_tokens, or raise "
            "rollout.cache_gib."
        )
    return Finding("memory", "ok", f"{detail}: {limit // sequence:,} at one time")


def memory_parts(
    recipe: TrainRecipe, model: ModelFacts, device: str, sizes: Sizes | None = None
) -> dict[str, int]:
    """Bytes of one process by purpose; `device` is cuda or cpu.

    For a GPU this is `gpu_ledger`, for a CPU the states and an upper bound of activations and
    working memory of a step.
    """
    if device == "cuda":
        return gpu_ledger(model.config, recipe, sizes) | _engine_weights(recipe, model)
    num_shards = sizes.num_shards * sizes.tp if sizes else 1
    parts = {
        "weights and optimizer": CPU_BYTES_PER_PARAMETER * model.num_parameters // num_shards,
        "activations": _cpu_activations(recipe, model),
    }
    if recipe.checkpoint.background:
        saved = CHECKPOINT_BYTES_PER_PARAMETER * model.num_parameters
        parts["copy for saving"] = saved // num_shards
    return parts | {"interpreter": PROCESS_BYTES} | _engine_weights(recipe, model)


def _longest_pass(recipe: TrainRecipe) -> tuple[str, str]:
    """(words about the longest forward pass, the key that bounds it)."""
    tokens, budget = pass_tokens(recipe), recipe.data.micro_batch_tokens
    if tokens == budget:
        return f"in passes of {tokens:,} tokens", "data.micro_batch_tokens"
    reason = (
        f"a prompt and response above data.micro_batch_tokens ({budget:,}) is alone in its pass"
    )
    return f"in passes of up to {tokens:,} tokens ({reason})", "rl.max_response_tokens"


def _cpu_activations(recipe: TrainRecipe, model: ModelFacts) -> int:
    """An upper bound in bytes: FP32 activations, FP64 working memory of one layer and logits."""
    config, tokens = model.config, pass_tokens(recipe)
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layers = 1 if recipe.model.recompute == "full" else config.num_layers
    saved_values = layers * (4 * config.hidden_size + 2 * heads + 3 * config.ffn_size)
    saved_values += config.num_layers * config.hidden_size
    working_values = 12 * config.ffn_size + 8 * config.hidden_size
    logits = min(recipe.train.loss_chunk_tokens, tokens) * config.vocab_size
    return tokens * (4 * saved_values + 8 * working_values) + 8 * logits


def _engine_weights(recipe: TrainRecipe, model: ModelFacts) -> dict[str, int]:
    """RL only: weights of the native engine, or those that are broadcast into servers, and those of
    the reference policy."""
    if not isinstance(recipe, RlRecipe):
        return {}
    held, parts = 2 * model.num_parameters, {}
    if recipe.rollout.weight_transfer == "nccl":
        # Two versions while a new one is copied, on rank 0.
        parts["weights to broadcast"] = held * (1 if recipe.fp8.enabled else 2)
    elif _generates_here(recipe):
        parts["engine"] = held
    return parts | ({"reference": held} if recipe.rl.reference else {})


def _have_spare_gpus(recipe: TrainRecipe, sizes: Sizes) -> bool:
    """Whether this machine has GPUs for the servers that no rank uses."""
    if not isinstance(recipe, RlRecipe):
        return False
    needed = recipe.rollout.engines * recipe.rollout.tensor_parallel
    return torch.cuda.device_count() - sizes.world >= needed


def _generates_here(recipe: TrainRecipe) -> bool:
    """Whether the engine is in this process; a server has memory of its own."""
    return isinstance(recipe, RlRecipe) and recipe.rollout.engine == "native"


def _cache_part(recipe: TrainRecipe, model: ModelFacts, free: int) -> dict[str, int]:
    """RL only: the engine's KV cache, which adapts to the memory that is `free` beside the rest.

    Raises ConfigError if not even one sequence fits.
    """
    if not isinstance(recipe, RlRecipe) or not _generates_here(recipe):
        return {}
    dtype = torch.float32 if recipe.model.compute_dtype == "float32" else torch.bfloat16
    tokens = recipe.rl.max_prompt_tokens + recipe.rl.max_response_tokens
    sequence = page_bytes(model.config, tokens, dtype)
    limit = int(recipe.rollout.cache_gib * GIB) or int(CACHE_SHARE * free)
    if sequence > limit:
        raise ConfigError(
            f"one sequence of {tokens} tokens needs {sequence / GIB:.2f} GiB of KV cache, and the "
            f"engine may use {limit / GIB:.2f} GiB; lower rl.max_response_tokens, raise "
            "rollout.cache_gib, or free memory with model.recompute = 'full'."
        )
    return {"KV cache": min(limit, recipe.rollout.max_running_requests * sequence)}
