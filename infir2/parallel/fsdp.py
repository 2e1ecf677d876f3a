"""FSDP2 whose FP8 weights travel as FP8: each rank sends the codes of its rows, one byte per weight.

The codes of a weight are those of the whole BF16-rounded master (docs/numerics.md). A shard's rows need not end where a
128x128 block does, so once per version of the weights the largest magnitudes of all blocks are reduced over the shards, in
one collective for the whole model (four bytes per block: 1/8192 of a BF16 weight). From then on every rank knows every scale,
and an all-gather moves codes alone. Other matrices travel and stay in the dtype that the operations round them to, vectors in
FP32. To autograd all are FP32, so that gradients stay FP32 from the operation to the optimizer.
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

_BF16_VALUES = ("rounded", torch.bfloat16, torch.bfloat16)  # the key of `weight_cache.rounded`


def shard_module(
    root: Any,
    blocks: Iterable[Any],
    mesh: Any,
    wire_dtype: torch.dtype = torch.float32,
    forward: str = "forward",
) -> None:
    """Shard `root` over `mesh` (1-D, or replicas x shards), in place; each of `blocks`, as they follow each other, is gathered
    and freed as one, the next one's gather on its way while one computes.

    Works on any module: FP8 weights are gathered as codes, other matrices in `wire_dtype`: FP32, or BF16 where every operation
    rounds them to that anyway. `forward` names the method of `root` that is called.
    Parameters of other dtypes get FP32 masters, so a BF16 module computes in FP32 where its own operations (its embedding) set the
    dtype: call it under torch.autocast for BF16 activations. Gradients are FP32, summed over the mesh, not averaged.
    Give the optimizer the parameters as they are afterwards.
    """
    from torch.distributed.fsdp import (  # slow import, only several processes need it
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
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for module, following in pairwise(modules[:-1]):  # in the backward FSDP2 does so by itself
        module.set_modules_to_forward_prefetch([following])
    shards = mesh[mesh.mesh_dim_names[-1]] if mesh.ndim == 2 else mesh
    if forward != "forward":
        register_fsdp_forward_method(root, forward)
    gather = Fp8Gather(shards.get_group())
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            rows = -(-parameter.shape[0] // shards.size())
            first = min(shards.get_local_rank() * rows, parameter.shape[0])
            local = parameter._local_tensor  # the tensor that FSDP2 asks for its extension
            part: _Shard
            if isinstance(module, Fp8Linear) and name == "weight":
                part = _Fp8Shard(local, parameter.shape, rows, first, module, gather)
                gather.weights.append(part)
            else:
                part = _Shard(local, parameter.shape, rows, gather.group, wire_dtype)
            local.fsdp_pre_all_gather, local.fsdp_post_all_gather = part.before, part.after


def exported_shards(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`exported_fp8_weights` of a sharded module, whole on every rank of a shard group, one parameter at a time.

    Every rank has to go through all of it.
    """
    for name, parameter in root.named_parameters():
        shard: _Shard = local_tensor(parameter).fsdp_pre_all_gather.__self__  # type: ignore[attr-defined]
        part, scale = shard.sent()
        whole = all_gather_raw(part, shard.group)[: shard.shape[0]]
        yield name, whole.to(torch.bfloat16) if scale is None else whole.view(E4M3)
        if scale is not None:
            yield name + SCALE_SUFFIX, scale


class GatheredWeight(Tensor):
    """An FP32 weight [N, K] in name: autograd and FSDP2 see its shape and dtype; its memory is the codes, or BF16 values.

    `precomputed` holds what `weight_cache.cached` would compute from a master: FP8 codes, or BF16 values.
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
        """What FSDP2 wants after a gather: a new weight and inner tensors to free; nothing where it has one, `out`."""
        if out is None:
            return cls(value.shape, device, {key: value}), ()
        out.precomputed = {key: value}
        return None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten, first = torch.ops.aten, next(arg for arg in args if isinstance(arg, cls))
        if function in (aten.detach.default, aten.as_strided.default, aten.alias.default):
            return cls(first.shape, first.device, first.precomputed)
        if _BF16_VALUES not in first.precomputed:
            raise TypeError(
                f"a gathered FP8 weight has codes and no values: only FP8 operations read it, not {function}"
            )
        light = function in (
            aten.copy_.default,
            aten.embedding.default,
        )  # exact from BF16, and no FP32 copy of the whole
        values = (
            first.precomputed[_BF16_VALUES] if light else first.precomputed[_BF16_VALUES].float()
        )
        out = function(*(values if arg is first else arg for arg in args), **(kwargs or {}))
        return out.float() if function is aten.embedding.default else out


class _Shard:
    """What FSDP2 calls before and after it gathers a parameter of `shape` over `group`.

    `rows` are a full shard's, the last may have fewer. Matrices travel in `wire_dtype`, everything else in FP32.
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

    def before(
        self, mesh: Any, size: Any, stride: Any, module: Any, policy: Any
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        part, scale = self.sent()
        return (part,), scale

    def sent(self) -> tuple[Tensor, Tensor | None]:
        """This rank's `rows` as they travel, and the scales of the whole weight if they are codes."""
        return self.padded(self.local.detach().to(self.wire_dtype)), None

    def after(
        self, outputs: Sequence[Tensor], scale: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        if self.wire_dtype == torch.bfloat16:
            return GatheredWeight.refill(
                out, _BF16_VALUES, outputs[0][: self.shape[0]], outputs[0].device
            )
        if out is None:
            return outputs[0], ()
        invalidate(out)  # FSDP2 refills the same memory without moving its version
        return None

    def padded(self, part: Tensor) -> Tensor:
        missing = self.rows - part.shape[0]
        return F.pad(part, (0, 0) * (part.ndim - 1) + (0, missing)) if missing else part


class _Fp8Shard(_Shard):
    """Rows [first, first + n) of an FP8 weight; their codes are made by `gather` for all weights at once."""

    codes: Tensor  # uint8 [rows, K]
    scale: Tensor  # float32 of the whole weight

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
        num_blocks, self.groups = scale_shape(shape[0], shape[1], TILE_BLOCK)
        self.grid = (
            num_blocks,
            -(-self.groups // 4) * 4,
        )  # of blocks in memory: rows are padded to 16 bytes, as cuBLAS reads scales
        self.blocks = (
            torch.arange(first, first + local.shape[0], device=local.device) // GROUP
        )  # each row's row of scales

    def sent(self) -> tuple[Tensor, Tensor]:
        if self.version != self.local._version:
            self.gather.quantize()
        return self.codes, self.scale

    def after(
        self, outputs: Sequence[Tensor], scale: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        self.gather.count_nonfinite()
        whole = Fp8Tensor(
            outputs[0][: self.shape[0]].view(E4M3), scale, TILE_BLOCK, self.layer.scale_format
        )
        return GatheredWeight.refill(out, ("fp8", whole.scale_format), whole, scale.device)

    def encode(self, scale: Tensor) -> None:
        """Make the codes, given the scales of the whole weight."""
        codes = encode_weight_rows(self.local.detach(), scale[self.blocks], self.layer.scale_format)
        self.codes, self.scale = self.padded(codes.view(torch.uint8)), scale
        self.version = self.local._version
        self.layer.quantizations += 1


class Fp8Gather:
    """All FP8 weights of a model that are sharded over `group`."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.weights: list[_Fp8Shard] = []
        self._uncounted: list[Tensor] = []

    @torch.inference_mode(False)  # what is made outlives an inference block
    @torch.no_grad()
    def quantize(self) -> None:
        """Make the codes of every shard, after one reduction of the blocks' largest magnitudes.

        The GPU waits for this before the first gather of a step, and a launch costs the host more than a small matrix costs the
        GPU: what can be done for all weights together is, which leaves four launches for each.
        """
        largest = self._largest()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        scales = {
            name: block_scale(largest, name)
            for name in {weight.layer.scale_format for weight in self.weights}
        }
        self._uncounted = list(scales.values())[
            :1
        ]  # a block that is not finite is so in every format
        views = {name: self._by_weight(scale) for name, scale in scales.items()}
        for i, weight in enumerate(self.weights):
            weight.encode(views[weight.layer.scale_format][i])

    def count_nonfinite(self) -> None:
        """Once per version; not in `quantize`, which runs on a stream of FSDP2's."""
        while self._uncounted:
            nonfinite_blocks.add(self._uncounted.pop())

    def _largest(self) -> Tensor:
        """Largest magnitude of the shards' parts of each block, FP32, as `_by_weight` divides it; Inf for a NaN, which MAX could lose."""
        sizes = [weight.local.shape[0] * weight.groups for weight in self.weights]
        by_row = self.weights[0].local.new_empty(sum(sizes))
        parts = by_row.split(sizes)
        for weight, part in zip(self.weights, parts, strict=True):  # one read of the masters
            tiles = as_tiles(weight.local.detach(), 1)
            torch.linalg.vector_norm(tiles, torch.inf, dim=3, out=part.view(tiles.shape[:3]))
        by_row.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        largest = by_row.new_zeros(sum(math.prod(weight.grid) for weight in self.weights))
        for weight, part, blocks in zip(self.weights, parts, self._by_weight(largest), strict=True):
            rows = part.view(-1, weight.groups)
            blocks.scatter_reduce_(0, weight.blocks[:, None].expand_as(rows), rows, "amax")
        return (
            largest.bfloat16().float()
        )  # the largest of rounded values is the largest value, rounded

    def _by_weight(self, flat: Tensor) -> list[Tensor]:
        """Each weight's blocks [N / 128, K / 128] in a vector of all."""
        parts = flat.split([math.prod(weight.grid) for weight in self.weights])
        return [
            part.view(weight.grid)[:, : weight.groups]
            for weight, part in zip(self.weights, parts, strict=True)
        ]
