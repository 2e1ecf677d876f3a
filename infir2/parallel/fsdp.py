"""FSDP2 that all-gathers FP8 weights as FP8: each rank sends the codes of its rows, 1 byte each.

The codes of a weight are those of the unsharded, BF16-rounded master (docs/numerics.md). A shard
may end inside a 128x128 block, so the scale of a block can depend on several ranks. Therefore, once
per version of the weights, `Fp8Gather.quantize`

    1. computes the largest magnitude of each block over the local rows,
    2. reduces these over the shards (MAX), in one collective for all weights of the model,
    3. computes the scales of all blocks, and the codes of the local rows.

Step 2 moves four bytes per block, 1/8192 of a BF16 weight. After it every rank has every scale, and
an all-gather moves codes only.

Other matrices are gathered and kept in the dtype that their operations round them to, vectors in
FP32. Autograd sees an FP32 tensor in all cases (`GatheredWeight`), so that gradients stay FP32 from
the operation to the optimizer.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from infir2.model.hf_names import SCALE_SUFFIX
from infir2.numerics import Fp8Linear
from infir2.numerics.formats import E4M3, GROUP, TILE_BLOCK, Fp8Tensor, scale_shape
from infir2.numerics.quantize import encode_weight_rows, nonfinite_blocks
from infir2.numerics.quantize_reference import as_tiles, block_scale
from infir2.numerics.weight_cache import invalidate, local_tensor, watch_optimizer_steps
from infir2.parallel.collectives import all_gather_raw

_BF16_KEY = ("rounded", torch.bfloat16, torch.bfloat16)  # the key of `weight_cache.rounded`


def shard_module(
    root: Any,
    blocks: Iterable[Any],
    mesh: Any,
    wire_dtype: torch.dtype = torch.float32,
    forward: str = "forward",
) -> None:
    """Shard any module in place with FSDP2; FP8 weights are gathered as codes.

    Parameters of other dtypes become FP32 masters, so a BF16 module computes in FP32 where its own
    operations (such as its embedding) set the dtype: call it under torch.autocast for BF16
    activations. Gradients are FP32, and summed over the mesh, not averaged. Create the optimizer
    afterwards, from the new parameters.

    Args:
        root: the module.
        blocks: its submodules that are gathered and freed as units, in the order of the forward.
            The gather of each overlaps with the computation of the one before.
        mesh: 1-D (shard) or 2-D (replicate, shard).
        wire_dtype: dtype in which matrices other than FP8 weights are gathered: FP32, or BF16 if
            every operation rounds them to BF16 anyway.
        forward: name of the method of `root` that runs its forward.
    """
    from torch.distributed.fsdp import (  # slow import; a single process does not need it
        fully_shard,
        register_fsdp_forward_method,
    )

    modules = [*blocks, root]
    for parameter in root.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in modules:
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
    # FSDP2 prefetches in the backward by itself, in the forward on request.
    for module, following in pairwise(modules[:-1]):
        module.set_modules_to_forward_prefetch([following])
    if forward != "forward":
        register_fsdp_forward_method(root, forward)
    _extend_parameters(root, mesh[mesh.mesh_dim_names[-1]] if mesh.ndim == 2 else mesh, wire_dtype)


def _extend_parameters(root: Any, shard_mesh: Any, wire_dtype: torch.dtype) -> None:
    """Set FSDP2's extension hooks, `fsdp_pre_all_gather` and `fsdp_post_all_gather`."""
    gather = Fp8Gather(shard_mesh.get_group())
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            rows = -(-parameter.shape[0] // shard_mesh.size())
            first = min(shard_mesh.get_local_rank() * rows, parameter.shape[0])
            local = parameter._local_tensor  # FSDP2 looks for its hooks on this tensor
            shard: _Shard
            if isinstance(module, Fp8Linear) and name == "weight":
                shard = _Fp8Shard(local, parameter.shape, rows, first, module, gather)
                gather.shards.append(shard)
            else:
                shard = _Shard(local, parameter.shape, rows, gather.group, wire_dtype)
            local.fsdp_pre_all_gather = shard.pre_all_gather
            local.fsdp_post_all_gather = shard.post_all_gather


def exported_shards(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`exported_fp8_weights` of a sharded module: yield the weights gathered over the shard group.

    Gathers one parameter at a time; every rank must exhaust the iterator.
    """
    for name, parameter in root.named_parameters():
        shard: _Shard = local_tensor(parameter).fsdp_pre_all_gather.__self__  # type: ignore[attr-defined]
        payload, scale = shard.payload()
        gathered = all_gather_raw(payload, shard.group)[: shard.shape[0]]
        yield name, gathered.to(torch.bfloat16) if scale is None else gathered.view(E4M3)
        if scale is not None:
            yield name + SCALE_SUFFIX, scale


class GatheredWeight(Tensor):
    """A gathered weight [N, K]: FP32 for autograd and FSDP2, FP8 codes or BF16 values in memory.

    `precomputed` holds what `weight_cache.cached` would compute from a master: {key: FP8 weight or
    BF16 values}. Operations that read the FP32 values of BF16 weights get them converted; FP8
    weights can be read by FP8 operations only (TypeError).
    """

    precomputed: dict[Any, Any]
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, shape: torch.Size, device: torch.device, precomputed: dict[Any, Any]
    ) -> "GatheredWeight":
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=device)
        weight.precomputed = precomputed
        return weight

    @classmethod
    def refill(cls, out: Any, key: Any, value: Any, device: Any) -> Any:
        """The result of `fsdp_post_all_gather`.

        The first time (`out` is None) a new weight and the inner tensors to free; later, `out` gets
        the new value and the result is None.
        """
        if out is None:
            return cls(value.shape, device, {key: value}), ()
        out.precomputed = {key: value}
        return None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten, weight = torch.ops.aten, next(arg for arg in args if isinstance(arg, cls))
        if function in (aten.detach.default, aten.as_strided.default, aten.alias.default):
            return cls(weight.shape, weight.device, weight.precomputed)
        if _BF16_KEY not in weight.precomputed:
            raise TypeError(
                f"{function} cannot read a gathered FP8 weight, which has codes but no values; "
                "only FP8 operations can"
            )
        # These two are exact on BF16 values, which saves an FP32 copy of the weight.
        reads_bf16 = function in (aten.copy_.default, aten.embedding.default)
        values = weight.precomputed[_BF16_KEY]
        values = values if reads_bf16 else values.float()
        out = function(*(values if arg is weight else arg for arg in args), **(kwargs or {}))
        return out.float() if function is aten.embedding.default else out


class _Shard:
    """FSDP2's extension hooks for one parameter of `shape`, of which this rank has `local`.

    `rows`: number of rows of a full shard; the last shards may have fewer and are padded. Matrices
    are gathered in `wire_dtype`, other parameters in FP32.
    """

    def __init__(
        self,
        local: Tensor,
        shape: torch.Size,
        rows: int,
        group: Any,
        wire_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.local, self.shape, self.rows, self.group = local, shape, rows, group
        self.wire_dtype = wire_dtype if len(shape) == 2 else torch.float32

    def pre_all_gather(
        self, mesh: Any, size: Any, stride: Any, module: Any, policy: Any
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """(tensors to gather, metadata for `post_all_gather`)."""
        payload, scale = self.payload()
        return (payload,), scale

    def payload(self) -> tuple[Tensor, Tensor | None]:
        """(this rank's rows as they are sent [rows, ...], scales of the global weight if FP8)."""
        return self.padded(self.local.detach().to(self.wire_dtype)), None

    def post_all_gather(
        self, outputs: Sequence[Tensor], scale: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        """Create the gathered weight, or refill `out`; see `GatheredWeight.refill`."""
        if self.wire_dtype == torch.bfloat16:
            values = outputs[0][: self.shape[0]]
            return GatheredWeight.refill(out, _BF16_KEY, values, values.device)
        if out is None:
            return outputs[0], ()
        invalidate(out)  # FSDP2 refills the same memory without moving its version counter
        return None

    def padded(self, local: Tensor) -> Tensor:
        missing = self.rows - local.shape[0]
        return F.pad(local, (0, 0) * (local.ndim - 1) + (0, missing)) if missing else local


class _Fp8Shard(_Shard):
    """Rows [first, first + n) of an FP8 weight; `gather` computes the codes of all weights."""

    codes: Tensor  # uint8 [rows, K]
    scale: Tensor  # float32 [ceil(N / 128), ceil(K / 128)], of the global weight

    def __init__(
        self,
        local: Tensor,
        shape: torch.Size,
        rows: int,
        first: int,
        layer: Fp8Linear,
        gather: "Fp8Gather",
    ) -> None:
        super().__init__(local, shape, rows, gather.group)
        self.layer, self.gather = layer, gather
        self.version = -1
        watch_optimizer_steps(local)
        num_block_rows, self.num_block_columns = scale_shape(shape[0], shape[1], TILE_BLOCK)
        # Shape of the scales in memory: cuBLAS reads rows that are padded to 16 bytes.
        self.grid = (num_block_rows, -(-self.num_block_columns // 4) * 4)
        # Index of the block row of each local row, [n].
        self.block_rows = torch.arange(first, first + local.shape[0], device=local.device) // GROUP

    def payload(self) -> tuple[Tensor, Tensor]:
        if self.version != self.local._version:
            self.gather.quantize()
        return self.codes, self.scale

    def post_all_gather(
        self, outputs: Sequence[Tensor], scale: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        self.gather.count_nonfinite()
        codes = outputs[0][: self.shape[0]].view(E4M3)
        weight = Fp8Tensor(codes, scale, TILE_BLOCK, self.layer.scale_format)
        return GatheredWeight.refill(out, ("fp8", weight.scale_format), weight, scale.device)

    def encode(self, scale: Tensor) -> None:
        """Compute the codes from the scales of the global weight."""
        codes = encode_weight_rows(
            self.local.detach(), scale[self.block_rows], self.layer.scale_format
        )
        self.codes, self.scale = self.padded(codes.view(torch.uint8)), scale
        self.version = self.local._version
        self.layer.quantizations += 1


class Fp8Gather:
    """Quantizes all FP8 weights of a model that are sharded over `group`."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.shards: list[_Fp8Shard] = []
        self._uncounted: list[Tensor] = []

    @torch.inference_mode(False)  # the codes outlive an inference_mode block around this call
    @torch.no_grad()
    def quantize(self) -> None:
        """Compute scales and codes of every weight, after one MAX reduction over the group.

        The GPU waits for this before the first gather of a step, and the launch of a kernel costs
        the host more than a small matrix costs the GPU. So everything but four launches per weight
        is done for all weights at once.
        """
        largest = self._largest_magnitudes()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        formats = {shard.layer.scale_format for shard in self.shards}
        scales = {name: block_scale(largest, name) for name in formats}
        # A non-finite block is non-finite in every format, so one of them is counted.
        self._uncounted = list(scales.values())[:1]
        views = {name: self._by_shard(scale) for name, scale in scales.items()}
        for i, shard in enumerate(self.shards):
            shard.encode(views[shard.layer.scale_format][i])

    def count_nonfinite(self) -> None:
        """Count non-finite blocks once per version.

        `quantize` cannot do this: it runs on one of FSDP2's streams.
        """
        while self._uncounted:
            nonfinite_blocks.add(self._uncounted.pop())

    def _largest_magnitudes(self) -> Tensor:
        """The largest magnitude in each block's local rows, FP32, flat as `_by_shard` reads it.

        NaN becomes Inf: a MAX reduction could lose a NaN.
        """
        sizes = [shard.local.shape[0] * shard.num_block_columns for shard in self.shards]
        by_row = self.shards[0].local.new_empty(sum(sizes))
        parts = by_row.split(sizes)
        for shard, part in zip(self.shards, parts, strict=True):  # reads each master once
            tiles = as_tiles(shard.local.detach(), 1)
            torch.linalg.vector_norm(tiles, torch.inf, dim=3, out=part.view(tiles.shape[:3]))
        by_row.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        largest = by_row.new_zeros(sum(math.prod(shard.grid) for shard in self.shards))
        for shard, part, blocks in zip(self.shards, parts, self._by_shard(largest), strict=True):
            rows = part.view(-1, shard.num_block_columns)
            blocks.scatter_reduce_(0, shard.block_rows[:, None].expand_as(rows), rows, "amax")
        # Rounding is monotonic: the rounded maximum is the maximum of the rounded values.
        return largest.bfloat16().float()

    def _by_shard(self, flat: Tensor) -> list[Tensor]:
        """Views [ceil(N / 128), ceil(K / 128)] of each weight's blocks in a flat vector of all."""
        parts = flat.split([math.prod(shard.grid) for shard in self.shards])
        return [
            part.view(shard.grid)[:, : shard.num_block_columns]
            for shard, part in zip(self.shards, parts, strict=True)
        ]
