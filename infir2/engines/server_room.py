"""Whether the servers that a recipe starts have room on the GPUs of its nodes."""

import math

from infir2.config.schema import RolloutSection
from infir2.errors import ConfigError


def servers_on_a_gpu(rollout: RolloutSection, gpus: int, nodes: int = 1) -> int:
    """Most servers that share a GPU of `nodes` with `gpus` each; 0 if a node is too small for one.

    A server's GPUs are of one node, and none of them are another server's in part.
    """
    places = nodes * (gpus // rollout.tensor_parallel)
    return math.ceil(rollout.engines / places) if places else 0


def starts_servers(rollout: RolloutSection) -> bool:
    """Whether the run starts servers that take a fixed share of a GPU's memory."""
    return rollout.engine in ("sglang", "vllm") and not rollout.urls


def crowding(rollout: RolloutSection, gpus: int, nodes: int = 1) -> str:
    """Why the servers do not fit the memory of `nodes` with `gpus` each; empty if they do.

    Only `infir2 launch ray` spreads servers: any other run has them on one node.
    """
    if not gpus or not starts_servers(rollout):
        return ""
    count, size = rollout.engines, rollout.tensor_parallel
    each = servers_on_a_gpu(rollout, gpus, nodes)
    if not each:
        return (
            f"rollout.tensor_parallel = {size} needs more GPUs than the {gpus} of a node; set "
            f"rollout.tensor_parallel = {gpus} or less"
        )
    if each == 1 or each * (rollout.memory_fraction or 1) <= 1:
        return ""
    where = f"{gpus} GPUs of the first node, where all start" if nodes == 1 else "nodes' GPUs"
    spread = ", or start the run with infir2 launch ray, which spreads them over the nodes"
    return (
        f"rollout.engines = {count} of {size} GPUs would put {each} servers on one of the {where}: "
        f"set rollout.engines = {nodes * (gpus // size)}{spread if nodes == 1 else ''}"
    )


def require_room(rollout: RolloutSection, gpus: int, nodes: int = 1) -> None:
    """Raise ConfigError if the servers need more memory than `nodes` with `gpus` each have."""
    if reason := crowding(rollout, gpus, nodes):
        raise ConfigError(f"{reason}.")
