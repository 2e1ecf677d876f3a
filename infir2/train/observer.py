"""The error of FP8 operands over a run: `train.observe_every` writes operands.jsonl.

Before an observed step, the first tokens of its first micro-batch go through a forward and a
backward of their own, with the step's weights, in unfused operations (`infir2.numerics.observed`).
No parameter, gradient or random state changes, so a run trains the same bits with and without.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infir2.data import Batch
from infir2.model import Decoder
from infir2.numerics import Fp8Linear, nonfinite_blocks
from infir2.numerics.observed import MEASURES, Observed
from infir2.numerics.ops import replaced
from infir2.train.losses import next_token_loss
from infir2.train.trainer import score_batch

TOKENS = 4096  # of a step that are observed


def observe(
    model: Decoder, batches: Sequence[Batch], scale_format: str, chunk_tokens: int
) -> list[dict[str, Any]]:
    """One row per linear layer of the decoder's blocks; none if the tokens train nothing.

    A row is {"layer": "model.layers.0.mlp.up_proj", "fp8": true, "OPERAND_MEASURE": number, ...}
    for the operands activation, weight and gradient and the `MEASURES`, NaN where one is not
    defined. A layer in BF16 is measured as if it were FP8 with scales of `scale_format`.
    """
    batch = first_tokens(batches[0], TOKENS)
    if not batch.num_trained_tokens:
        return []
    layers = {
        layer: name
        for name, layer in model.model.named_modules(prefix="model")
        if isinstance(layer, nn.Linear)
    }
    for layer in layers:
        if isinstance(layer, Fp8Linear):
            layer.quantized_weight()  # counted for the step that follows, which finds it made
    found: dict[tuple[str, str], Tensor] = {}
    device = model.head_weight.device
    with (
        torch.enable_grad(),
        nonfinite_blocks.ignored(device),
        replaced(lambda base: Observed(base, layers, scale_format, found)),
    ):
        scores = score_batch(model, batch, 1.0, chunk_tokens, uniform_gradient=True)
        loss, _ = next_token_loss(scores)
        # The embedding is the first parameter: its gradient runs the backward of every block.
        torch.autograd.grad(loss / batch.num_trained_tokens, [model.model.embed_tokens.weight])
    numbers = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
    rows: dict[str, dict[str, Any]] = {
        name: {"layer": name, "fp8": isinstance(layer, Fp8Linear)} for layer, name in layers.items()
    }
    for (name, operand), values in numbers.items():
        rows[name] |= {f"{operand}_{m}": v for m, v in zip(MEASURES, values, strict=True)}
    return list(rows.values())


def first_tokens(batch: Batch, limit: int) -> Batch:
    """The batch without its tokens after the first `limit`."""
    size = min(limit, len(batch.token_ids))
    bounds = batch.cu_seqlens[batch.cu_seqlens < size]
    return Batch(
        token_ids=batch.token_ids[:size],
        positions=batch.positions[:size],
        labels=batch.labels[:size],
        loss_mask=batch.loss_mask[:size],
        cu_seqlens=torch.cat([bounds, bounds.new_tensor([size])]),
        token_inputs={name: values[:size] for name, values in batch.token_inputs.items()},
    )
