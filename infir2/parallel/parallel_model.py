"""A model laid out over a mesh, and what the trainer needs of that: local batches, summed gradients, one reduction, places.

With one process everything here does nothing, so the trainer has one path.
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
from infir2.model.hf_names import SCALE_SUFFIX, exported_fp8_weights
from infir2.numerics.formats import GROUP
from infir2.numerics.weight_cache import local_tensor
from infir2.parallel.collectives import all_gather_raw
from infir2.parallel.context import ContextParallel, pad_batch
from infir2.parallel.fsdp import exported_shards, shard_module
from infir2.parallel.mesh import Layout, Sizes, Split
from infir2.parallel.ranks import Ranks
from infir2.parallel.shard_spec import ShardSpec
from infir2.parallel.tensor import share_blocks, split_layers


class ParallelModel:
    """`model` on this process's place of `layout`. Every rank constructs it at the same point, with the same whole model."""

    def __init__(self, model: Decoder, layout: Layout) -> None:
        self.model, self.layout, self.ranks = model, layout, layout.ranks
        self.splits: dict[str, Split] = {}
        self._fsdp: Any = model  # what FSDP2 makes of the model has more methods
        self._context: ContextParallel | None = None
        if layout.sizes.cp > 1:
            self._context = ContextParallel(layout, model.plan_attention)
        if layout.sizes.tp > 1:
            self.splits = split_layers(model, layout)
        if layout.sizes.tp * layout.sizes.cp > 1:
            share_blocks(model, layout, self.splits, self._context)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if layout.shard_mesh is not None:
            shard_module(
                model,
                model.model.layers,
                layout.shard_mesh,
                model.compute_dtype,
                forward="hidden_states",
            )
        self.shard_specs = {name: self._shard_spec(name, shape) for name, shape in shapes.items()}

    def local(self, batch: Batch) -> Batch:
        """What this rank computes of a micro-batch: `token_ids` that it attends with, `labels` and masks of the rows it scores.

        With context parallelism, the forward of this batch has to come before the next `local`.
        """
        if self._context:
            batch = self._context.split(pad_batch(batch, self._context.multiple))
        elif self.layout.sizes.tp > 1:
            batch = pad_batch(batch, math.lcm(GROUP, self.layout.sizes.tp))
        if self.layout.sizes.tp == 1:
            return batch
        share = self.layout.tp_share
        token_inputs = {name: share(values) for name, values in batch.token_inputs.items()}
        return replace(
            batch,
            labels=share(batch.labels),
            loss_mask=share(batch.loss_mask),
            token_inputs=token_inputs,
        )

    def sum_of_batch(self, values: Tensor) -> Tensor:
        """`values`, one per token of a micro-batch as it came, from the ranks that share it: each scored other tokens."""
        for group in (self.layout.tp_group, self.layout.cp_group):
            if group is not None:
                dist.all_reduce(values, group=group)
        return values

    @torch.no_grad()
    def exported(self) -> Iterator[tuple[str, Tensor]]:
        """`exported_fp8_weights` of the whole model: on every rank the bytes of one process, one parameter at a time.

        Every rank has to go through all of it.
        """
        parts = (
            exported_fp8_weights(self.model)
            if self.layout.shard_mesh is None
            else exported_shards(self.model)
        )
        for name, part in parts:
            split = self.splits.get(name.removesuffix(SCALE_SUFFIX), Split())
            if split.count > 1:
                everyone = all_gather_raw(
                    part.contiguous().view(torch.uint8), self.layout.tp_group
                ).chunk(self.layout.sizes.tp)
                part = torch.cat(everyone[:: split.copies], dim=split.dim).view(part.dtype)
            yield name, part

    def before_backward(self, last: bool) -> None:
        """Replicas exchange gradients after the last micro-batch of a step; shards after each, in FP32."""
        if self.layout.shard_mesh is not None:
            self._fsdp.set_requires_all_reduce(last)

    def release(self) -> None:
        """Free what a forward without a backward left gathered."""
        if self.layout.shard_mesh is not None:
            self._fsdp.reshard()

    def finish_gradients(self) -> None:
        """Sum gradients of parameters that several tensor-parallel ranks hold whole, in one collective per group."""
        by_group: dict[Any, list[Tensor]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            split = self.splits.get(name)
            if split and split.group is not None and parameter.grad is not None:
                by_group[split.group].append(local_tensor(parameter.grad))
        for group, gradients in by_group.items():
            flat = _flatten_dense_tensors(gradients)
            dist.all_reduce(flat, group=group)
            torch._foreach_copy_(gradients, _unflatten_dense_tensors(flat, gradients))

    def gradients(self) -> list[Tensor]:
        """This rank's parts of all gradients."""
        return [
            local_tensor(parameter.grad)
            for parameter in self.model.parameters()
            if parameter.grad is not None
        ]

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared norm of the gradient, FP64: the sum over all ranks counts every part once."""
        by_copies: dict[int, list[Tensor]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                copies = self.splits[name].copies if self.splits else 1
                by_copies[copies * self.layout.sizes.dp_replicate].append(
                    local_tensor(parameter.grad)
                )
        norms = [
            torch.nn.utils.get_total_norm(gradients).double().square() / copies
            for copies, gradients in by_copies.items()
        ]
        return torch.stack(
            [torch.zeros((), dtype=torch.float64, device=self.layout.device), *norms]
        ).sum()

    def total(self, values: Tensor) -> Tensor:
        """Sum of FP64 `values` over all ranks; nothing waits for it."""
        if self.ranks.size > 1:
            dist.all_reduce(values)
        return values

    def _shard_spec(self, name: str, shape: tuple[int, ...]) -> ShardSpec:
        """`shape` is that of one tensor-parallel rank; FSDP2 cuts its rows into equal chunks, the last ones short or empty."""
        layout, split = self.layout, self.splits.get(name, Split())
        num_shards = layout.sizes.num_shards
        rows = -(-shape[0] // num_shards)
        first = min(layout.shard_rank * rows, shape[0])
        size = (min(rows, shape[0] - first), *shape[1:])
        whole, offset = list(shape), [first] + [0] * (len(shape) - 1)
        offset[split.dim] += split.index * shape[split.dim]
        whole[split.dim] *= split.count
        owned = layout.replica == 0 and split.first and size[0] > 0
        return ShardSpec(tuple(whole), tuple(offset), size, owned)


def single_process(model: Decoder) -> ParallelModel:
    """The model in one process."""
    return ParallelModel(model, Layout(Sizes(), Ranks(), model.head_weight.device))
