"""Sizes of the parallel axes, and each rank's coordinates and process groups.

    world size = dp_replicate x dp x cp x tp

tp varies fastest, so that its ranks share the links within a node.

    dp            ranks read different data; weights, gradients and moments are sharded (FSDP2)
    dp_replicate  replicas of the sharded model, which all-reduce gradients (HSDP)
    cp            ranks share the tokens of a micro-batch; weights are sharded over dp x cp
    tp            ranks share every layer

`plan_sizes` and `check_model` reject a recipe before any process is started.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infir2.config.schema import ParallelSection
from infir2.errors import ConfigError
from infir2.numerics.formats import GROUP

if TYPE_CHECKING:
    import torch

    from infir2.model import ModelConfig
    from infir2.parallel.ranks import Ranks

MAX_TP = 64


@dataclass(frozen=True)
class Sizes:
    """Number of ranks along each axis.

    Example: `Sizes(dp_replicate=2, dp=4, cp=1, tp=2).world` -> 16.
    """

    dp_replicate: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp * self.cp * self.tp

    @property
    def num_data(self) -> int:
        """Number of different micro-batches at a time."""
        return self.dp_replicate * self.dp

    @property
    def num_shards(self) -> int:
        """Number of FSDP shards of the weights of one tp rank."""
        return self.dp * self.cp


def plan_sizes(section: ParallelSection, world_size: int) -> Sizes:
    """The sizes of a recipe; parallel.dp = -1 means all remaining ranks.

    Raises ConfigError if their product is not `world_size`.
    """
    fixed = section.dp_replicate * section.cp * section.tp
    product = f"dp_replicate {section.dp_replicate} x cp {section.cp} x tp {section.tp}"
    if section.dp == -1:
        if world_size % fixed:
            raise ConfigError(
                f"parallel: {product} = {fixed} does not divide the {world_size} processes of this "
                f"run; start {nearest_multiple(world_size, fixed)} processes, or change one of "
                "these sizes."
            )
        return Sizes(section.dp_replicate, world_size // fixed, section.cp, section.tp)
    sizes = Sizes(section.dp_replicate, section.dp, section.cp, section.tp)
    if sizes.world != world_size:
        raise ConfigError(
            f"parallel: dp {section.dp} x {product} needs {sizes.world} processes and this run has "
            f"{world_size}; start {sizes.world}, or set parallel.dp = -1 to use all remaining ones."
        )
    return sizes


def nearest_multiple(number: int, of: int) -> int:
    """The positive multiple of `of` that is nearest to `number`."""
    return max(of, round(number / of) * of)


def check_model(sizes: Sizes, config: "ModelConfig", fp8: bool) -> None:
    """Raise ConfigError if tp does not fit the model; the message names the nearest valid sizes."""
    problem = tp_problem(config, sizes.tp, fp8)
    if problem:
        valid = [tp for tp in range(1, MAX_TP + 1) if not tp_problem(config, tp, fp8)]
        below = max((tp for tp in valid if tp < sizes.tp), default=1)
        above = min((tp for tp in valid if tp > sizes.tp), default=0)
        nearest = f"{below} and {above}" if above else f"{below}"
        raise ConfigError(
            f"parallel.tp = {sizes.tp}: {problem}; "
            f"the nearest sizes that work for this model: {nearest}."
        )


def tp_problem(config: "ModelConfig", tp: int, fp8: bool) -> str:
    """Why the model's layers cannot be sharded over `tp` ranks; empty if they can."""
    if tp == 1:
        return ""
    if config.output_bias or config.mlp_bias:
        return "the model has biases on o_proj or down_proj, which tensor parallelism cannot shard"
    if config.num_heads % tp:
        return f"it does not divide the {config.num_heads} query heads"
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        return (
            f"the {config.num_kv_heads} key/value heads can be neither divided nor repeated evenly"
        )
    if config.ffn_size % tp:
        return f"it does not divide the feed-forward width {config.ffn_size}"
    shard_widths = {
        "q_proj": config.num_heads // tp * config.head_dim,
        "k_proj": max(1, config.num_kv_heads // tp) * config.head_dim,
        "down_proj": config.ffn_size // tp,
    }
    for name, width in shard_widths.items():
        if fp8 and width % GROUP:
            return (
                f"a shard of {name} would be {width} wide, and FP8 scales need multiples of {GROUP}"
            )
    return ""


@dataclass(frozen=True)
class TensorShard:
    """The tensor-parallel shard of a parameter: part `index` of `count` along `dim`.

    `copies` ranks hold the same shard, and sum its gradient in `group`; the first of them counts it
    in norms and saves it.
    """

    dim: int = 0
    index: int = 0
    count: int = 1
    copies: int = 1
    is_first_copy: bool = True
    group: Any = None


class Layout:
    """This rank's coordinates in the mesh, and its process groups.

    Every rank constructs it at the same point.

    Attributes:
        data_rank: index among `sizes.num_data`; ranks with the same one read the same data.
        shard_mesh: device mesh of FSDP2, 1-D or (replicate, shard); None if weights are unsharded.
        replica_group: process group of replicas that hold whole weights; None without.
        tp_group, cp_group: process groups; None if the axis has size 1.
    """

    def __init__(self, sizes: Sizes, ranks: "Ranks", device: "torch.device") -> None:
        assert sizes.world == ranks.size
        self.sizes, self.ranks, self.device = sizes, ranks, device
        rest, self.tp_rank = divmod(ranks.rank, sizes.tp)
        self.data_rank, self.cp_rank = divmod(rest, sizes.cp)
        self.replica, dp_rank = divmod(self.data_rank, sizes.dp)
        self.shard_rank = dp_rank * sizes.cp + self.cp_rank
        self.shard_mesh: Any = None
        self.replica_group: Any = None
        self.tp_group: Any = None
        self.cp_group: Any = None
        if ranks.size > 1:
            self._create_groups()

    def tp_shard(self, x: Any) -> Any:
        """This tp rank's rows of x [T, ...]: [T / tp, ...]."""
        rows = len(x) // self.sizes.tp
        return x[self.tp_rank * rows : (self.tp_rank + 1) * rows]

    def adjacent_tp_group(self, size: int) -> Any:
        """Process group of `size` adjacent tp ranks; None for one. Every rank calls this."""
        if size == 1:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(
            self.device.type, (self.sizes.world // size, size), mesh_dim_names=("sets", "members")
        )["members"].get_group()

    @property
    def is_data_leader(self) -> bool:
        """Whether this is the first of the ranks that read the same data; it counts tokens."""
        return self.tp_rank == self.cp_rank == 0

    def _create_groups(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        sizes, device_type = self.sizes, self.device.type
        weights = init_device_mesh(
            device_type,
            (sizes.dp_replicate, sizes.num_shards, sizes.tp),
            mesh_dim_names=("replicate", "shard", "tp"),
        )
        if sizes.num_shards > 1:
            replicated = sizes.dp_replicate > 1
            self.shard_mesh = weights["replicate", "shard"] if replicated else weights["shard"]
        elif sizes.dp_replicate > 1:
            self.replica_group = weights["replicate"].get_group()
        if sizes.tp > 1:
            self.tp_group = weights["tp"].get_group()
        if sizes.cp > 1:
            tokens = init_device_mesh(
                device_type,
                (sizes.num_data, sizes.cp, sizes.tp),
                mesh_dim_names=("data", "cp", "tp"),
            )
            self.cp_group = tokens["cp"].get_group()
