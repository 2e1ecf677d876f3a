"""Tensor parallelism with sequence parallelism: ranks share every layer, and between layers each holds its share of the tokens.

q, k, v, gate and up are split by rows, o and down by columns. Norms, residuals, embedding and head work on a rank's share of
the tokens with whole weights, so the head needs no exchange at all: every rank scores its own rows.

    x [t, D] -> norm -> gather tokens (FP8 codes) -> q k v -> attention of a rank's heads -> o -> sum over ranks, own tokens + x
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from infir2.model import Decoder
from infir2.model.decoder import Attention, FeedForward
from infir2.numerics import Fp8Linear, RMSNorm, SavedActivations, add_linear, apply_rope
from infir2.numerics.ops import linear, rms_norm, swiglu
from infir2.parallel.collectives import all_gather, all_reduce_gradient, reduce_scatter
from infir2.parallel.mesh import Layout, Split

if TYPE_CHECKING:
    from infir2.parallel.context import ContextParallel


def split_layers(model: Decoder, layout: Layout) -> dict[str, Split]:
    """Keep this rank's part of every block's layers, in place. Returns how each parameter of the model is divided."""
    tp, rank, group = layout.sizes.tp, layout.tp_rank, layout.tp_group
    whole = Split(copies=tp, first=rank == 0, group=group)
    splits = {name: whole for name, _ in model.named_parameters()}
    copies = max(1, tp // model.config.num_kv_heads)  # ranks that hold the same key and value head
    rows, columns = Split(0, rank, tp), Split(1, rank, tp)
    heads = Split(
        0, rank // copies, tp // copies, copies, rank % copies == 0, layout.neighbours(copies)
    )
    kinds = {
        "q_proj": rows,
        "k_proj": heads,
        "v_proj": heads,
        "o_proj": columns,
        "gate_proj": rows,
        "up_proj": rows,
        "down_proj": columns,
    }
    for name, layer in model.named_modules():
        split = kinds.get(name.rpartition(".")[2])
        if split is not None and isinstance(layer, nn.Linear):
            for leaf, parameter in list(layer.named_parameters(recurse=False)):
                part = (
                    parameter.detach()
                    .chunk(split.count, dim=split.dim)[split.index]
                    .clone(memory_format=torch.contiguous_format)
                )
                setattr(layer, leaf, nn.Parameter(part))
                splits[f"{name}.{leaf}"] = split
            layer.out_features, layer.in_features = layer.weight.shape
    return splits


def share_blocks(
    model: Decoder, layout: Layout, splits: dict[str, Split], context: "ContextParallel | None"
) -> None:
    """Let every block, divided by `splits`, work with the ranks of its tensor- and context-parallel groups."""
    blocks: list[Any] = list(model.model.layers)
    heads = splits.get("model.layers.0.self_attn.k_proj.weight", Split())
    for block in blocks:
        block.self_attn.forward = partial(
            _attention, block.self_attn, layout.tp_group, heads, context
        )
        if layout.tp_group is not None:
            block.mlp.forward = partial(_feed_forward, block.mlp, layout.tp_group)
    if layout.tp_group is not None:
        model.model.embed_tokens.register_forward_pre_hook(
            lambda _, args: (layout.tp_share(args[0]),)
        )


def _attention(
    self: Attention,
    tp_group: Any,
    heads: Split,
    cp: Any,
    x: Tensor,
    norm: RMSNorm,
    rope: Any,
    context: Any,
    saved: SavedActivations,
) -> Tensor:
    """`Attention.forward` of this rank's heads and tokens: x + o(attention(...)) [t, D]. `heads`: how keys are divided."""
    if tp_group is None:
        x, q, k, v = self.inputs(x, norm, rope, saved)
    else:
        parts = _entering(x, norm, (self.q_proj, self.k_proj, self.v_proj), tp_group)
        q, k, v = (y.unflatten(1, (-1, self.head_dim)) for y in parts)
        q, k = apply_rope(self.q_norm(q), *rope), apply_rope(self.k_norm(k), *rope)
    if heads.group is not None:
        k, v = (all_reduce_gradient(y, heads.group, heads.first) for y in (k, v))
    out = (context if cp is None else cp).attend(q, k, v, self.layer).flatten(1)
    if tp_group is None:
        return add_linear(x, out, self.o_proj, saved)
    return x + _leaving(out, self.o_proj, tp_group)


def _feed_forward(
    self: FeedForward, tp_group: Any, x: Tensor, norm: RMSNorm, saved: SavedActivations
) -> Tensor:
    gate, up = _entering(x, norm, (self.gate_proj, self.up_proj), tp_group)
    return x + _leaving(swiglu(gate, up, saved), self.down_proj, tp_group)


def _leaving(x: Tensor, layer: nn.Linear, group: Any) -> Tensor:
    """The sum over ranks of `layer(x)` [T, N], x [T, K] of this rank's columns; this rank's [t, N] of it, rounded once."""
    wide = torch.float32 if x.is_cuda else torch.float64
    return reduce_scatter(linear(x, (layer,), out_dtype=wide)[0], group, x.dtype)


def _entering(
    x: Tensor, norm: RMSNorm, layers: tuple[nn.Linear, ...], group: Any
) -> tuple[Tensor, ...]:
    """`layer(norm(x))` of all ranks' tokens; their normed values travel as FP8 where every layer reads them so.

    Gradients of those values are parts of a sum, in FP32; `gather_rows` rounds the sum.
    """
    normed = rms_norm(x, norm.weight, norm.eps)
    as_codes = all(
        isinstance(layer, Fp8Linear) and layer.scale_format == "pow2" for layer in layers
    )
    return linear(all_gather(normed, group, torch.float32, as_codes), layers, dtype=x.dtype)
