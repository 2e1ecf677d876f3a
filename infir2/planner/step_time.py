"""Seconds of a training step by part: the work of the step, over rates, times fitted constants.

The host launches kernels while the GPU runs them, and each waits for the other in parts of a step:
a step takes hypot(GPU's seconds, host's seconds), which met profiles of two GPUs within 2 %.

The constants are fitted to the measured steps in measured.json by bench/calibrate.py, which writes
constants.json and prints how well steps are met that the fit has not seen.
"""

from collections.abc import Mapping
from math import hypot

from infir2.errors import ConfigError
from infir2.planner.gpus import Gpu, package_json
from infir2.planner.work import Load, Work, step_work

# What is fitted, and the part of the step that it belongs to.
PARTS = {
    "FP8 GEMMs": "GEMMs of the layers",
    "BF16 GEMMs": "GEMMs of the layers",
    "head": "head",
    "attention": "attention",
    "traffic": "norms, SwiGLU, RoPE, quantizers",
    "pre-activations": "norms, SwiGLU, RoPE, quantizers",
    "update": "update",
    "NCCL": "communication",
}
HOST = ("host, one GPU", "host, sharded FP8", "host, sharded BF16")
_OVERLAP = 0.8  # share of the computation under which NCCL's traffic between nodes can lie


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
    work = step_work(load)
    parts["communication"] += _between_nodes(load, work, gpu, sum(parts.values()))
    busy = sum(parts.values())
    parts["waiting for the host"] = hypot(busy, host_seconds(load, gpu, constants)) - busy
    return {name: seconds for name, seconds in parts.items() if seconds}


def host_seconds(load: Load, gpu: Gpu, constants: Mapping[str, float]) -> float:
    """The host's own time of a step: milliseconds a layer and pass, where a launch takes 40 us."""
    is_sharded = load.sizes.num_shards * load.sizes.tp > 1  # replicas launch what one GPU does
    sharded = HOST[1] if load.recipe.fp8.enabled else HOST[2]
    milliseconds = constants[sharded if is_sharded else HOST[0]]
    return 1e-3 * milliseconds * step_work(load).layer_passes * gpu.launch_us / 40


def _between_nodes(load: Load, work: Work, gpu: Gpu, computing: float) -> float:
    """Seconds for which a step waits for the network between nodes. Not measured, not fitted."""
    if load.nodes == 1:
        return 0.0
    sharded_over_nodes = load.sizes.dp_replicate < load.nodes
    num_bytes = work.replica_bytes + (work.shard_bytes if sharded_over_nodes else 0.0)
    transfer = num_bytes / (gpu.network_gb_s * 1e9)
    return max(0.27 * transfer, transfer - _OVERLAP * computing)
