"""A model that is distributed over a mesh, as the trainer sees it.

It splits batches, completes gradients, and reduces scalars. In a single process all of these are
no-ops, so the trainer has one code path.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from infir2.data import Batch
from infir2.model import Decoder
from infir2.model.hf_names import SCALE_SUFFIX, exported_fp8_weights, exported_weights
from infir2.numerics.formats import GROUP
from infir2.numerics.torch_compat import all_reduce_together
from infir2.numerics.weight_cache import local_tensor
from infir2.parallel.collectives import all_gather_raw
from infir2.parallel.context import ContextParallel, pad_batch
from infir2.parallel.fsdp import exported_shards, shard_module
from infir2.parallel.mesh import Layout, Sizes, TensorShard
from infir2.parallel.ranks import Ranks
from infir2.parallel.shard_spec import ShardSpec
from infir2.parallel.tensor import parallelize_blocks, shard_layers


class ParallelModel:
    """Shards `model` in place over `layout`.

    Every rank constructs it at the same point, with the same unsharded model. See `shard_module`
    for the other arguments.

    Attributes:
        tensor_shards: tensor-parallel shard of each parameter; empty without tensor parallelism.
        shard_specs: this rank's shard of each parameter in the global tensor.
    """

    def __init__(
        self,
        model: Decoder,
        layout: Layout,
        reshard_after_forward: bool = True,
        blocks_per_gather: int = 1,
    ) -> None:
        self.model, self.layout, self.ranks = model, layout, layout.ranks
        self.tensor_shards: dict[str, TensorShard] = {}
        self._fsdp: Any = model  # fully_shard adds methods to the model
        self._context_parallel: ContextParallel | None = None
        if layout.sizes.cp > 1:
            self._context_parallel = ContextParallel(layout, model.plan_attention)
        if layout.sizes.tp > 1:
            self.tensor_shards = shard_layers(model, layout)
        if layout.sizes.tp * layout.sizes.cp > 1:
            parallelize_blocks(model, layout, self.tensor_shards, self._context_parallel)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if layout.shard_mesh is not None:
            shard_module(
                model,
                model.model.layers,
                layout.shard_mesh,
                model.compute_dtype,
                forward="hidden_states",
                # A model that recomputes to save memory does not keep what a gather can make again.
                keep_codes=model.recompute != "full",
                reshard_after_forward=reshard_after_forward,
                blocks_per_gather=blocks_per_gather,
            )
        self.shard_specs = {name: self._shard_spec(name, shape) for name, shape in shapes.items()}

    def local_batch(self, batch: Batch) -> Batch:
        """This rank's part of a micro-batch.

        Context parallelism splits all tokens. Tensor parallelism splits labels, masks and other
        inputs of the loss; its ranks attend to the same `token_ids`. Run the forward of this batch
        before the next call, which replaces the plan of its attention.
        """
        if self._context_parallel:
            batch = self._context_parallel.split(pad_batch(batch, self._context_parallel.multiple))
        elif self.layout.sizes.tp > 1:
            batch = pad_batch(batch, math.lcm(GROUP, self.layout.sizes.tp))
        if self.layout.sizes.tp == 1:
            return batch
        shard = self.layout.tp_shard
        return replace(
            batch,
            labels=shard(batch.labels),
            loss_mask=shard(batch.loss_mask),
            token_inputs={name: shard(values) for name, values in batch.token_inputs.items()},
        )

    def all_reduce_over_batch(self, values: Tensor) -> Tensor:
        """Sum `values` over the ranks that share a micro-batch, in place."""
        for group in (self.layout.tp_group, self.layout.cp_group):
            if group is not None:
                dist.all_reduce(values, group=group)
        return values

    @torch.no_grad()
    def exported(self, masters: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the global weights, as `exported_fp8_weights` of a single process.

        With `masters` as `exported_weights`: FP8 layers' masters in BF16. They have the same bytes
        on every rank. Gathers one parameter at a time; every rank must exhaust the iterator.
        """
        weights = (
            (exported_weights if masters else exported_fp8_weights)(self.model)
            if self.layout.shard_mesh is None
            else exported_shards(self.model, masters)
        )
        for name, weight in weights:
            shard = self.tensor_shards.get(name.removesuffix(SCALE_SUFFIX), TensorShard())
            if shard.count > 1:
                raw = weight.contiguous().view(torch.uint8)
                by_rank = all_gather_raw(raw, self.layout.tp_group).chunk(self.layout.sizes.tp)
                distinct = by_rank[:: shard.copies]
                weight = torch.cat(distinct, dim=shard.dim).view(weight.dtype)
            yield name, weight

    def before_backward(self, is_last: bool) -> None:
        """Call before the backward of each micro-batch of a step.

        Shards reduce-scatter gradients after each micro-batch, in FP32; replicas all-reduce them
        only after the last one.
        """
        if self.layout.shard_mesh is not None:
            self._fsdp.set_requires_all_reduce(is_last)

    def reshard(self) -> None:
        """Free weights that a forward without a backward left gathered."""
        if self.layout.shard_mesh is not None:
            for module in (*self.model.model.layers, self._fsdp):
                module.reshard()  # no-op where the forward has freed them

    def finish_gradients(self) -> None:
        """All-reduce gradients of parameters that several tp ranks or whole replicas hold."""
        by_group: dict[Any, list[Tensor]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            shard = self.tensor_shards.get(name)
            if shard and shard.group is not None and parameter.grad is not None:
                by_group[shard.group].append(local_tensor(parameter.grad))
        for group, gradients in by_group.items():
            flat = _flatten_dense_tensors(gradients)
            dist.all_reduce(flat, group=group)
            torch._foreach_copy_(gradients, _unflatten_dense_tensors(flat, gradients))
        if self.layout.replica_group is not None:
            all_reduce_together(self.gradients(), self.layout.replica_group)

    def gradients(self) -> list[Tensor]:
        """The local shards of all gradients."""
        return [
            local_tensor(parameter.grad)
            for parameter in self.model.parameters()
            if parameter.grad is not None
        ]

    def squared_norm(self) -> Tensor:
        """This rank's summand of the squared gradient norm, FP64 [].

        Shards that several ranks hold are divided by their number of copies, so that the sum over
        all ranks counts each once.
        """
        by_copies: dict[int, list[Tensor]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                copies = self.tensor_shards[name].copies if self.tensor_shards else 1
                by_copies[copies * self.layout.sizes.dp_replicate].append(
                    local_tensor(parameter.grad)
                )
        norms = [
            torch.nn.utils.get_total_norm(gradients).double().square() / copies
            for copies, gradients in by_copies.items()
        ]
        zero = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        return torch.stack([zero, *norms]).sum()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum FP64 `values` over all ranks, in place; on a GPU the host does not wait."""
        if self.ranks.size > 1:
            dist.all_reduce(values)
        return values

    def _shard_spec(self, name: str, shape: tuple[int, ...]) -> ShardSpec:
        """The spec of a parameter whose tensor-parallel shard has `shape`.

        FSDP2 divides rows into chunks of ceil(rows / num_shards); the last may be short or empty.
        """
        layout, shard = self.layout, self.tensor_shards.get(name, TensorShard())
        chunk_rows = -(-shape[0] // layout.sizes.num_shards)
        first = min(layout.shard_rank * chunk_rows, shape[0])
        local_shape = (min(chunk_rows, shape[0] - first), *shape[1:])
        global_shape, offset = list(shape), [first] + [0] * (len(shape) - 1)
        offset[shard.dim] += shard.index * shape[shard.dim]
        global_shape[shard.dim] *= shard.count
        owned = layout.replica == 0 and shard.is_first_copy and local_shape[0] > 0
        return ShardSpec(tuple(global_shape), tuple(offset), local_shape, owned)


def single_process(model: Decoder) -> ParallelModel:
    """A `ParallelModel` of one rank."""
    return ParallelModel(model, Layout(Sizes(), Ranks(), model.head_weight.device))
