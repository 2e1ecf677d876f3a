"""Which rank does what: sizes from a recipe, refused with the fix before any process starts, and the layout that follows.

    world = dp_replicate x dp x cp x tp     tp innermost: its ranks share a node's fast links

`dp` ranks read different data and shard the weights; `cp` ranks share a micro-batch's tokens and shard the weights too;
`tp` ranks share every layer; `dp_replicate` copies of all this exchange gradients only (HSDP).
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
    """Ranks along each axis of the mesh. Example: `Sizes(dp_replicate=2, dp=4, cp=1, tp=2).world` -> 16."""

    dp_replicate: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp * self.cp * self.tp

    @property
    def num_data(self) -> int:
        """Ranks (or groups of them) that read different data."""
        return self.dp_replicate * self.dp

    @property
    def num_shards(self) -> int:
        """Parts that a weight of one tp rank is sharded into."""
        return self.dp * self.cp


def plan_sizes(section: ParallelSection, world_size: int) -> Sizes:
    """The sizes of a recipe on `world_size` processes. Raises ConfigError when they do not multiply to it."""
    fixed = section.dp_replicate * section.cp * section.tp
    named = f"dp_replicate {section.dp_replicate} x cp {section.cp} x tp {section.tp}"
    if section.dp == -1:
        if world_size % fixed:
            raise ConfigError(
                f"parallel: {named} = {fixed} does not divide the {world_size} processes of this run; "
                f"start {nearest_multiple(world_size, fixed)} processes, or change one of these sizes."
            )
        return Sizes(section.dp_replicate, world_size // fixed, section.cp, section.tp)
    sizes = Sizes(section.dp_replicate, section.dp, section.cp, section.tp)
    if sizes.world != world_size:
        raise ConfigError(
            f"parallel: dp {section.dp} x {named} needs {sizes.world} processes and this run has {world_size}; "
            f"start {sizes.world}, or set parallel.dp = -1 to fill what is left."
        )
    return sizes


def nearest_multiple(number: int, of: int) -> int:
    """The multiple of `of` nearest to `number`, at least `of`."""
    return max(of, round(number / of) * of)


def check_model(sizes: Sizes, config: "ModelConfig", fp8: bool) -> None:
    """Refuse a tensor-parallel size that the model cannot be divided by, naming the nearest that work (ConfigError)."""
    problem = tp_problem(config, sizes.tp, fp8)
    if problem:
        working = [tp for tp in range(1, MAX_TP + 1) if not tp_problem(config, tp, fp8)]
        below = max((tp for tp in working if tp < sizes.tp), default=1)
        above = min((tp for tp in working if tp > sizes.tp), default=0)
        nearest = f"{below} and {above}" if above else f"{below}"
        raise ConfigError(
            f"parallel.tp = {sizes.tp}: {problem}; the nearest sizes that work for this model: {nearest}."
        )


def tp_problem(config: "ModelConfig", tp: int, fp8: bool) -> str:
    """Why `tp` ranks cannot share the model's layers; empty if they can."""
    if tp == 1:
        return ""
    if config.output_bias or config.mlp_bias:
        return "the model has biases on o_proj or down_proj, which tensor parallelism does not take"
    if config.num_heads % tp:
        return f"it does not divide the {config.num_heads} query heads"
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        return (
            f"the {config.num_kv_heads} key/value heads can be neither divided nor repeated evenly"
        )
    if config.ffn_size % tp:
        return f"it does not divide the feed-forward width {config.ffn_size}"
    parts = {
        "q_proj": config.num_heads // tp * config.head_dim,
        "k_proj": max(1, config.num_kv_heads // tp) * config.head_dim,
        "down_proj": config.ffn_size // tp,
    }
    for name, width in parts.items():
        if fp8 and width % GROUP:
            return f"a rank's part of {name} would be {width} wide, and FP8 scales belong to groups of {GROUP}"
    return ""


@dataclass(frozen=True)
class Split:
    """How tensor parallelism divides a parameter: part `index` of `count` along `dim`; `group` has the ranks with the same part."""

    dim: int = 0
    index: int = 0
    count: int = 1
    copies: int = 1
    first: bool = True  # of the copies
    group: Any = None


class Layout:
    """This process's place in the mesh, and the groups it talks to. Every rank constructs it at the same point.

    Attributes:
        data_rank: which of `sizes.num_data` parts of the data this process reads.
        shard_mesh: device mesh of FSDP2 (replicas x shards, or shards alone); None where weights are not sharded.
        tp_group, cp_group: process groups; None where the size is 1.
    """

    def __init__(self, sizes: Sizes, ranks: "Ranks", device: "torch.device") -> None:
        assert sizes.world == ranks.size
        self.sizes, self.ranks, self.device = sizes, ranks, device
        rest, self.tp_rank = divmod(ranks.rank, sizes.tp)
        self.data_rank, self.cp_rank = divmod(rest, sizes.cp)
        self.replica, dp_rank = divmod(self.data_rank, sizes.dp)
        self.shard_rank = dp_rank * sizes.cp + self.cp_rank
        self.shard_mesh: Any = None
        self.tp_group: Any = None
        self.cp_group: Any = None
        if ranks.size > 1:
            self._make_groups()

    def tp_share(self, x: Any) -> Any:
        """This rank's rows of x, of which the tensor-parallel ranks hold equal shares."""
        rows = len(x) // self.sizes.tp
        return x[self.tp_rank * rows : (self.tp_rank + 1) * rows]

    def neighbours(self, size: int) -> Any:
        """Group of `size` adjacent tensor-parallel ranks; None for one. Every rank calls this at the same point."""
        if size == 1:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(
            self.device.type, (self.sizes.world // size, size), mesh_dim_names=("sets", "members")
        )["members"].get_group()

    @property
    def is_data_leader(self) -> bool:
        """Of the ranks that read the same data, the one that counts it."""
        return self.tp_rank == self.cp_rank == 0

    def _make_groups(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        sizes, kind = self.sizes, self.device.type
        weights = init_device_mesh(
            kind,
            (sizes.dp_replicate, sizes.num_shards, sizes.tp),
            mesh_dim_names=("replicate", "shard", "tp"),
        )
        if sizes.dp_replicate > 1:
            self.shard_mesh = weights["replicate", "shard"]
        elif sizes.num_shards > 1:
            self.shard_mesh = weights["shard"]
        if sizes.tp > 1:
            self.tp_group = weights["tp"].get_group()
        if sizes.cp > 1:
            tokens = init_device_mesh(
                kind, (sizes.num_data, sizes.cp, sizes.tp), mesh_dim_names=("data", "cp", "tp")
            )
            self.cp_group = tokens["cp"].get_group()
