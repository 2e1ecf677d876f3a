"""FSDP2 that all-gathers FP8 weights as FP8: each rank sends the codes of its rows, 1 byte each.

The codes of a weight are those of the unsharded, BF16-rounded master (docs/numerics.md). A shard
may end inside a 128x128 block, so the scale of a block can depend on several ranks. Therefore, once
per version of the weights, `Fp8Gather.quantize`

    1. computes the largest magnitude of each block over the local rows,
    2. reduces these over the shards (MAX), in one collective for all weights of the model,
    3. computes the scales of all blocks; the codes of the local rows follow from them.

Step 2 moves four bytes per block, 1/8192 of a BF16 weight. After it every rank has every scale, and
an all-gather moves codes only.

Other matrices are gathered and kept in the dtype that their operations round them to, vectors in
FP32. Autograd sees an FP32 tensor in all cases (`GatheredWeight`), so that gradients stay FP32 from
the operation to the optimizer.
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from infir2.model.hf_names import SCALE_SUFFIX
from infir2.numerics import Fp8Linear
from infir2.numerics.formats import E4M3, TILE_BLOCK, Fp8Tensor, WeightRows, scale_shape
from infir2.numerics.quantize import encode_weights, largest_magnitudes, nonfinite_blocks
from infir2.numerics.quantize_reference import block_scale
from infir2.numerics.weight_cache import invalidate, local_tensor, watch_optimizer_steps
from infir2.parallel.collectives import all_gather_raw

_BF16_KEY = ("rounded", torch.bfloat16, torch.bfloat16)  # the key of `weight_cache.rounded`


def shard_module(
    root: Any,
    blocks: Iterable[Any],
    mesh: Any,
    wire_dtype: torch.dtype = torch.float32,
    forward: str = "forward",
    keep_codes: bool = True,
    reshard_after_forward: bool = True,
    blocks_per_gather: int = 1,
) -> None:
    """Shard any module in place with FSDP2; FP8 weights are gathered as codes.

    Parameters of other dtypes become FP32 masters, so a BF16 module computes in FP32 where its own
    operations (such as its embedding) set the dtype: call it under torch.autocast for BF16
    activations. Gradients are FP32, and summed over the mesh, not averaged. Create the optimizer
    afterwards, from the new parameters.

    Args:
        root: the module.
        blocks: its submodules that are gathered and freed, in the order of the forward. The gather
            of each overlaps with the computation of the one before.
        mesh: 1-D (shard) or 2-D (replicate, shard).
        wire_dtype: dtype in which matrices other than FP8 weights are gathered: FP32, or BF16 if
            every operation rounds them to BF16 anyway.
        forward: name of the method of `root` that runs its forward.
        keep_codes: keep the codes of this rank's shards between gathers, one byte per value;
            otherwise each gather computes them again, which reads the masters of its unit.
        reshard_after_forward: free gathered weights after the forward of their blocks, and gather
            them again for the backward.
        blocks_per_gather: number of blocks that are gathered and freed as a unit.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method  # slow import, rarely needed

    modules, size = list(blocks), blocks_per_gather
    units = [*(modules[i : i + size] for i in range(0, len(modules), size)), [root]]
    for parameter in root.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    _shard_units(units, mesh, reshard_after_forward)
    if forward != "forward":
        register_fsdp_forward_method(root, forward)
    shard_mesh = mesh[mesh.mesh_dim_names[-1]] if mesh.ndim == 2 else mesh
    _extend_parameters(units, shard_mesh, wire_dtype, keep_codes)


def _shard_units(units: Sequence[Sequence[Any]], mesh: Any, reshard_after_forward: bool) -> None:
    """Apply FSDP2 to each unit; the last is the root, which stays gathered until the backward."""
    from torch.distributed.fsdp import fully_shard

    for unit in units:
        reshard = None if unit is units[-1] else reshard_after_forward
        fully_shard(
            list(unit) if len(unit) > 1 else unit[0], mesh=mesh, reshard_after_forward=reshard
        )
        unit[0].set_gradient_divide_factor(1.0)  # of the whole unit
        unit[0].set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
    # FSDP2 prefetches in the backward by itself, in the forward on request.
    for unit, following in pairwise(units[:-1]):
        unit[0].set_modules_to_forward_prefetch([following[0]])


def _extend_parameters(
    units: Iterable[Sequence[Any]], shard_mesh: Any, wire_dtype: torch.dtype, keep_codes: bool
) -> None:
    """Set FSDP2's extension hooks, `fsdp_pre_all_gather` and `fsdp_post_all_gather`."""
    gather = Fp8Gather(shard_mesh.get_group(), keep_codes)
    seen: set[Any] = set()
    for modules in units:  # the root last, for what the others leave
        unit = Fp8Unit(gather)
        for module in chain.from_iterable(module.modules() for module in modules):
            if module not in seen:
                seen.add(module)
                for name, parameter in module.named_parameters(recurse=False):
                    _extend(module, name, parameter, shard_mesh, wire_dtype, unit)


def _extend(
    module: Any, name: str, parameter: Any, mesh: Any, wire_dtype: torch.dtype, unit: "Fp8Unit"
) -> None:
    rows = -(-parameter.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * rows, parameter.shape[0])
    local = parameter._local_tensor  # FSDP2 looks for its hooks on this tensor
    shard: _Shard
    if isinstance(module, Fp8Linear) and name == "weight":
        shard = _Fp8Shard(local, parameter.shape, rows, first, module, unit)
        unit.shards.append(shard)
        # Gathered codes need no `Fp8Linear.__setattr__`, and without one FSDP2 sets weights faster.
        module.__dict__["__setattr__"] = MethodType(nn.Module.__setattr__, module)
        unit.gather.shards.append(shard)
    else:
        shard = _Shard(local, parameter.shape, rows, unit.gather.group, wire_dtype)
    local.fsdp_pre_all_gather = shard
    local.fsdp_post_all_gather = shard.post_all_gather


def exported_shards(root: nn.Module, masters: bool = False) -> Iterator[tuple[str, Tensor]]:
    """`exported_fp8_weights` of a sharded module: yield the weights gathered over the shard group.

    With `masters` as `exported_weights`. Gathers one parameter at a time; every rank must exhaust
    the iterator.
    """
    for name, parameter in root.named_parameters():
        shard: _Shard = local_tensor(parameter).fsdp_pre_all_gather  # type: ignore[attr-defined]
        payload, scale = shard.masters() if masters else shard.payload()
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

    # FSDP2 asks for the hook's signature at each gather, and a method's takes eight times as long.
    __signature__ = inspect.signature(lambda mesh, size, stride, module, policy: None)

    def __call__(
        self, mesh: Any, size: Any, stride: Any, module: Any, policy: Any
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """`fsdp_pre_all_gather`: (tensors to gather, metadata for `post_all_gather`)."""
        payload, scale = self.payload()
        return (payload,), scale

    def payload(self) -> tuple[Tensor, Tensor | None]:
        """(this rank's rows as they are sent [rows, ...], scales of the global weight if FP8)."""
        return self.padded(self.local.detach().to(self.wire_dtype)), None

    def masters(self) -> tuple[Tensor, None]:
        """(this rank's rows of the masters in BF16 [rows, ...], None)."""
        return self.padded(self.local.detach().to(torch.bfloat16)), None

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

    codes: Tensor | None = None  # uint8 [rows, K]
    scale: Tensor  # float32 [ceil(N / 128), ceil(K / 128)], of the global weight

    def __init__(
        self,
        local: Tensor,
        shape: torch.Size,
        rows: int,
        first: int,
        layer: Fp8Linear,
        unit: "Fp8Unit",
    ) -> None:
        super().__init__(local, shape, rows, unit.gather.group)
        self.layer, self.first, self.unit = layer, first, unit
        self.version = -1
        watch_optimizer_steps(local)
        num_block_rows, self.num_block_columns = scale_shape(shape[0], shape[1], TILE_BLOCK)
        # Shape of the scales in memory: cuBLAS reads rows that are padded to 16 bytes.
        self.grid = (num_block_rows, -(-self.num_block_columns // 4) * 4)

    def payload(self) -> tuple[Tensor, Tensor]:
        if self.version != self.local._version:
            self.unit.gather.quantize()
        if self.codes is None:
            self.unit.encode()
        codes, keep = self.codes, self.unit.gather.keep_codes
        assert codes is not None
        self.codes = codes if keep else None
        return codes, self.scale

    def post_all_gather(
        self, outputs: Sequence[Tensor], scale: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        self.unit.gather.count_nonfinite()
        codes = outputs[0][: self.shape[0]].view(E4M3)
        weight = Fp8Tensor(codes, scale, TILE_BLOCK, self.layer.scale_format)
        return GatheredWeight.refill(out, ("fp8", weight.scale_format), weight, scale.device)

    def set_scale(self, scale: Tensor) -> None:
        """Begin a version of the weight, whose blocks have these scales."""
        self.scale, self.codes, self.version = scale, None, self.local._version
        self.layer.quantizations += 1

    def rows_of(self, scale: Tensor, codes: Tensor | None = None) -> WeightRows:
        """The local rows with their scales, or the place for them, and their codes."""
        local = None if codes is None else codes[: self.local.shape[0]].view(E4M3)
        return WeightRows(self.local.detach(), self.first, scale, local)


class Fp8Unit:
    """The FP8 weights that are gathered together."""

    def __init__(self, gather: "Fp8Gather") -> None:
        self.gather = gather
        self.shards: list[_Fp8Shard] = []

    @torch.inference_mode(False)  # the codes outlive an inference_mode block around this call
    @torch.no_grad()
    def encode(self) -> None:
        """Compute the codes of this unit's shards; of all units if codes are kept."""
        shards = self.gather.shards if self.gather.keep_codes else self.shards
        sizes = [shard.rows * shard.shape[1] for shard in shards]
        # One allocation; each weight starts at a multiple of 16 bytes, as wide loads need.
        flat = shards[0].scale.new_empty(sum(-(-n // 16) * 16 for n in sizes), dtype=torch.uint8)
        parts = flat.split([-(-n // 16) * 16 for n in sizes])
        for shard, part, size in zip(shards, parts, sizes, strict=True):
            shard.codes = part[:size].view(shard.rows, shard.shape[1])
        for name in {shard.layer.scale_format for shard in shards}:
            chosen = [shard for shard in shards if shard.layer.scale_format == name]
            encode_weights([shard.rows_of(shard.scale, shard.codes) for shard in chosen], name)


class Fp8Gather:
    """Quantizes all FP8 weights of a model that are sharded over `group`.

    With `keep_codes` a shard's codes are computed once per version of the weights and kept, one
    byte per value. Otherwise each gather computes those of its unit again, from the same scales.
    """

    def __init__(self, group: Any, keep_codes: bool = True) -> None:
        self.group, self.keep_codes = group, keep_codes
        self.shards: list[_Fp8Shard] = []
        self._uncounted: list[Tensor] = []

    @torch.inference_mode(False)  # as the codes
    @torch.no_grad()
    def quantize(self) -> None:
        """Compute the scales of every weight, with one MAX reduction over the group.

        The GPU waits for this before the first gather of a step, and the launch of a kernel costs
        the host more than a small matrix costs the GPU. So all weights take one launch.
        """
        largest = self.shards[0].local.new_zeros(sum(math.prod(s.grid) for s in self.shards))
        blocks = self._by_shard(largest)
        largest_magnitudes(
            [shard.rows_of(part) for shard, part in zip(self.shards, blocks, strict=True)]
        )
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        formats = {shard.layer.scale_format for shard in self.shards}
        scales = {name: block_scale(largest, name) for name in formats}
        # A non-finite block is non-finite in every format, so one of them is counted.
        self._uncounted = list(scales.values())[:1]
        views = {name: self._by_shard(scale) for name, scale in scales.items()}
        for i, shard in enumerate(self.shards):
            shard.set_scale(views[shard.layer.scale_format][i])

    def count_nonfinite(self) -> None:
        """Count non-finite blocks once per version.

        `quantize` cannot do this: it runs on one of FSDP2's streams.
        """
        while self._uncounted:
            nonfinite_blocks.add(self._uncounted.pop())

    def _by_shard(self, flat: Tensor) -> list[Tensor]:
        """Views [ceil(N / 128), ceil(K / 128)] of each weight's blocks in a flat vector of all."""
        parts = flat.split([math.prod(shard.grid) for shard in self.shards])
        return [
            part.view(shard.grid)[:, : shard.num_block_columns]
            for shard, part in zip(self.shards, parts, strict=True)
        ]
