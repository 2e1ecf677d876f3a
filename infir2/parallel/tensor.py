"""Tensor parallelism with sequence parallelism (arXiv 2205.05198).

Every layer of a block is sharded over the tp ranks: q, k, v, gate and up by output rows
(column-parallel in Megatron's words, which multiplies from the right), o and down by input columns
(row-parallel). Between layers the tokens are sharded instead: norms, residuals, embedding and head
work on T / tp tokens per rank with unsharded weights. The head needs no collective: each rank
computes the loss of its own tokens.

    x [T / tp, D] -> norm -> all_gather tokens (FP8 codes) -> q, k, v of this rank's heads [T, ...]
      -> attention -> o of this rank's columns -> reduce_scatter tokens -> + x [T / tp, D]
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from infir2.model import Decoder
from infir2.model.decoder import Attention, FeedForward
from infir2.numerics import Fp8Linear, RMSNorm, SavedActivations, add_linear, apply_rope
from infir2.numerics.ops import linear, rms_norm, swiglu
from infir2.parallel.collectives import all_gather, all_reduce_gradient, reduce_scatter
from infir2.parallel.context import ContextParallel
from infir2.parallel.mesh import Layout, TensorShard


def shard_layers(model: Decoder, layout: Layout) -> dict[str, TensorShard]:
    """Replace the weights of every block's linear layers by this rank's shards.

    Returns the shard of each parameter of the model by name.
    """
    tp, rank, group = layout.sizes.tp, layout.tp_rank, layout.tp_group
    replicated = TensorShard(copies=tp, is_first_copy=rank == 0, group=group)
    shards = {name: replicated for name, _ in model.named_parameters()}
    shard_of_layer = _layer_shards(layout, model.config.num_kv_heads)
    for name, layer in model.named_modules():
        shard = shard_of_layer.get(name.rpartition(".")[2])
        if shard is not None and isinstance(layer, nn.Linear):
            for leaf, parameter in list(layer.named_parameters(recurse=False)):
                local = parameter.detach().chunk(shard.count, dim=shard.dim)[shard.index]
                local = local.clone(memory_format=torch.contiguous_format)
                setattr(layer, leaf, nn.Parameter(local))
                shards[f"{name}.{leaf}"] = shard
            layer.out_features, layer.in_features = layer.weight.shape
    return shards


def _layer_shards(layout: Layout, num_kv_heads: int) -> dict[str, TensorShard]:
    """This rank's shard of each linear layer of a block.

    With more ranks than key/value heads, adjacent ranks hold copies of one head.
    """
    tp, rank = layout.sizes.tp, layout.tp_rank
    rows, columns = TensorShard(0, rank, tp), TensorShard(1, rank, tp)
    copies = max(1, tp // num_kv_heads)
    kv_heads = TensorShard(
        dim=0,
        index=rank // copies,
        count=tp // copies,
        copies=copies,
        is_first_copy=rank % copies == 0,
        group=layout.adjacent_tp_group(copies),
    )
    return {
        "q_proj": rows,
        "k_proj": kv_heads,
        "v_proj": kv_heads,
        "o_proj": columns,
        "gate_proj": rows,
        "up_proj": rows,
        "down_proj": columns,
    }


def parallelize_blocks(
    model: Decoder,
    layout: Layout,
    shards: dict[str, TensorShard],
    context_parallel: ContextParallel | None,
) -> None:
    """Replace the forward of attention and feed-forward in every block by its parallel version.

    `shards`: the result of `shard_layers`, empty without tensor parallelism.
    """
    blocks: list[Any] = list(model.model.layers)
    kv_heads = shards.get("model.layers.0.self_attn.k_proj.weight", TensorShard())
    for block in blocks:
        block.self_attn.forward = partial(
            _attention, block.self_attn, layout.tp_group, kv_heads, context_parallel
        )
        if layout.tp_group is not None:
            block.mlp.forward = partial(_feed_forward, block.mlp, layout.tp_group)
    if layout.tp_group is not None:
        model.model.embed_tokens.register_forward_pre_hook(
            lambda _, args: (layout.tp_shard(args[0]),)
        )


def _attention(
    self: Attention,
    tp_group: Any,
    kv_heads: TensorShard,
    context_parallel: ContextParallel | None,
    x: Tensor,
    norm: RMSNorm,
    rope: Any,
    context: Any,
    saved: SavedActivations,
) -> Tensor:
    """`Attention.forward` for this rank's heads and tokens: x + o(attention(...)), [t, D]."""
    if tp_group is None:
        x, q, k, v = self.inputs(x, norm, rope, saved)
    else:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        outputs = column_parallel_linear(x, norm, layers, tp_group)
        q, k, v = (y.unflatten(1, (-1, self.head_dim)) for y in outputs)
        q, k = apply_rope(self.q_norm(q), *rope), apply_rope(self.k_norm(k), *rope)
    if kv_heads.group is not None:
        k, v = (all_reduce_gradient(y, kv_heads.group, kv_heads.is_first_copy) for y in (k, v))
    attend = (context if context_parallel is None else context_parallel).attend
    out = attend(q, k, v, self.layer).flatten(1)
    if tp_group is None:
        return add_linear(x, out, self.o_proj, saved)
    return x + row_parallel_linear(out, self.o_proj, tp_group)


def _feed_forward(
    self: FeedForward, tp_group: Any, x: Tensor, norm: RMSNorm, saved: SavedActivations
) -> Tensor:
    """`FeedForward.forward` for this rank's share of the hidden units: [t, D] -> [t, D]."""
    gate, up = column_parallel_linear(x, norm, (self.gate_proj, self.up_proj), tp_group)
    return x + row_parallel_linear(swiglu(gate, up, saved), self.down_proj, tp_group)


def column_parallel_linear(
    x: Tensor, norm: RMSNorm, layers: tuple[nn.Linear, ...], group: Any
) -> tuple[Tensor, ...]:
    """`layer(norm(x))` [T, N / tp] of each layer for the tokens of all ranks, x [T / tp, D].

    If every layer reads FP8 with "pow2" scales, the normalized tokens are sent as FP8 codes. Their
    gradients are partial sums over N, exchanged in FP32; the backward of `all_gather` rounds the
    sum.
    """
    normed = rms_norm(x, norm.weight, norm.eps)
    as_codes = all(
        isinstance(layer, Fp8Linear) and layer.scale_format == "pow2" for layer in layers
    )
    return linear(all_gather(normed, group, torch.float32, as_codes), layers, dtype=x.dtype)


def row_parallel_linear(x: Tensor, layer: nn.Linear, group: Any) -> Tensor:
    """`layer(x)` summed over ranks, of this rank's tokens: [T / tp, N] of x [T, K / tp].

    The partial sums stay unrounded (FP64 on a CPU, FP32 on a GPU) until all are added.
    """
    partial_sum_dtype = torch.float32 if x.is_cuda else torch.float64
    return reduce_scatter(linear(x, (layer,), out_dtype=partial_sum_dtype)[0], group, x.dtype)
