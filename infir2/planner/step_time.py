"""Seconds of a training step by part: the work of the step, over rates, times fitted constants.

The host launches kernels while the GPU runs them, and each waits for the other in parts of a step:
a step takes (GPU's seconds^p + host's seconds^p)^(1/p). p was chosen with all rows in sight.

The constants are fitted to the measured steps in measured.json by bench/calibrate.py, which writes
constants.json and prints how well steps are met that the fit has not seen.
"""

from collections.abc import Mapping

from infir2.errors import ConfigError
from infir2.planner.gpus import Gpu, package_json
from infir2.planner.work import Load, step_work

# What is fitted, and the part of the step that it belongs to.
PARTS = {
    "FP8 GEMMs": "GEMMs of the layers",
    "BF16 GEMMs": "GEMMs of the layers",
    "head": "head",
    "attention": "attention",
    "traffic": "norms, SwiGLU, RoPE, quantizers",
    "pre-activations": "norms, SwiGLU, RoPE, quantizers",
    "FP8 kernels": "starts of kernels",
    "BF16 kernels": "starts of kernels",
    "update": "update",
    "NCCL": "communication",
}
# Milliseconds of the host: with graphs of a step of one micro-batch, else a layer and pass.
HOST = tuple(
    f"host, {way} {of}" for way in ("plain", "sharded", "graphs") for of in ("FP8", "BF16")
)
POWER = 2.25  # 1: the GPU and the host take turns; infinite: neither waits for the other
_UNALIGNED_HOST = 1.3  # times what a layer takes whose q, k and v are one matrix
_HOST_MEMORY_GB_S = 50  # of moments in host memory, one way at a time; not measured
_OVERLAP = 0.8  # share of the computation under which traffic between GPUs can lie


def terms(load: Load, gpu: Gpu) -> dict[str, float]:
    """Seconds of each kind of work at the GPU's rates, before the constants."""
    work, fp8 = step_work(load), load.recipe.fp8.enabled
    if fp8 and not gpu.fp8_tflops:
        raise ConfigError(
            f"{gpu.name} has no block-scaled FP8 and would emulate it far slower than BF16; "
            "add --fp8.enabled=false."
        )
    rate = (gpu.fp8_tflops if fp8 else gpu.bf16_tflops) * 1e12
    forward, backward = gpu.flash_tflops if load.attention == "flash" else gpu.torch_tflops
    attention = work.attention_flops[0] / forward + work.attention_flops[1] / backward
    memory = gpu.bandwidth * 1e12
    return dict.fromkeys(PARTS, 0.0) | {
        "FP8 GEMMs" if fp8 else "BF16 GEMMs": work.layer_flops / rate,
        "head": work.head_flops / (gpu.bf16_tflops * 1e12),
        "attention": attention / 1e12,
        "traffic": work.traffic / memory,
        "pre-activations": work.pre_activation_traffic / memory,
        "FP8 kernels" if fp8 else "BF16 kernels": 1e-6 * work.kernels,
        "update": work.update_traffic / memory,
        "NCCL": (work.shard_bytes + work.tensor_bytes) / (gpu.link_gb_s * 1e9),
    }


def step_seconds(
    load: Load, gpu: Gpu, constants: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Seconds of one optimizer step by part; their sum is the step. Raises ConfigError."""
    constants = constants or package_json("constants.json")["constants"]
    parts = dict.fromkeys(PARTS.values(), 0.0)
    for name, seconds in terms(load, gpu).items():
        parts[PARTS[name]] += constants[name] * seconds
    parts["update"] += step_work(load).offload_bytes / (_HOST_MEMORY_GB_S * 1e9)
    parts["communication"] += _waits_for_gpus(load, gpu, constants["NCCL"], sum(parts.values()))
    busy, host = sum(parts.values()), host_seconds(load, gpu, constants)
    parts["waiting for the host"] = (busy**POWER + host**POWER) ** (1 / POWER) - busy
    return {name: seconds for name, seconds in parts.items() if seconds}


def host_seconds(load: Load, gpu: Gpu, constants: Mapping[str, float]) -> float:
    """The host's own time of a step, where a launch takes 40 us as on the measured machines."""
    rate, precision = 1e-3 * gpu.launch_us / 40, "FP8" if load.recipe.fp8.enabled else "BF16"
    if load.uses_graphs:  # half of it is the update's
        return rate * constants[f"host, graphs {precision}"] * (1 + load.micro_batches) / 2
    is_sharded = load.sizes.num_shards * load.sizes.tp > 1  # replicas launch what one GPU does
    each = constants[f"host, {'sharded' if is_sharded else 'plain'} {precision}"]
    aligned = 1.0 if load.is_aligned else _UNALIGNED_HOST
    return rate * each * aligned * step_work(load).layer_passes


def _waits_for_gpus(load: Load, gpu: Gpu, nccl: float, computing: float) -> float:
    """Seconds for which a step waits for replicas, and for shards of other nodes.

    Not measured. Shards lie under the whole step, replicas' gradients under the last backward; but
    replicas of whole weights sum them in one collective after it.
    """
    work, sizes = step_work(load), load.sizes
    shards = work.shard_bytes if sizes.dp_replicate < load.nodes else 0.0
    replicas = nccl * work.replica_bytes / _replica_bandwidth(load, gpu)
    if sizes.num_shards > 1:
        replicas = _exposed(replicas, 2 / 3 * computing / load.micro_batches)
    return replicas + _exposed(shards / (gpu.network_gb_s * 1e9), computing)


def _exposed(transfer: float, computing: float) -> float:
    return max(0.27 * transfer, transfer - _OVERLAP * computing)


def _replica_bandwidth(load: Load, gpu: Gpu) -> float:
    """Bytes a second of a GPU; all replicas in a node share their network links."""
    if load.nodes == 1:
        return gpu.link_gb_s * 1e9
    in_a_node = max(1.0, load.sizes.dp_replicate / load.nodes)
    return min(gpu.link_gb_s, gpu.network_gb_s * in_a_node) * 1e9
