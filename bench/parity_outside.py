"""A run of bench/parity.py whose linear layers are torchao's FP8, or torch's own in BF16.

    python bench/parity_outside.py {rowwise,tensorwise,torch}[-compile] RECIPE... [OPTIONS]

Everything else is `infir2 cpt`'s: initial weights, order of data, attention, norms, head, AdamW.
Nothing is fused around these layers, and by itself torchao makes each conversion of several
kernels: `-compile` gives each layer to torch.compile, as torchao's documentation advises.

The recipe says fp8.enabled = false. torchao 0.17 belongs to torch 2.11; pip install torchao.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infir2.cli import main as infir2
from infir2.numerics.composed import Composed
from infir2.numerics.ops import Operations, replaced
from infir2.numerics.ops_reference import rotate
from infir2.train import loop

COMPILE = "-compile"
# Each layer's shape, with and without gradients, is a graph of its own.
GRAPHS = 64


class TorchLinear(nn.Linear):
    """An FP32 master that is rounded to the input's dtype for each product."""

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Outside:
    """`Operations` that call the layers instead of reading their weights."""

    def __init__(self, base: Operations) -> None:
        self.rms_norm, self.swiglu = base.rms_norm, base.swiglu
        composed = Composed(self.linear, base.rms_norm, base.swiglu, rotate)
        self.attention_inputs, self.add_linear = composed.attention_inputs, composed.add_linear
        self.feed_forward = composed.feed_forward

    def linear(
        self, x: Tensor, layers: Sequence[nn.Linear], dtype: torch.dtype, out_dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """The outputs [T, N_i] of layers that share the input x [T, K]."""
        return tuple(layer(x) for layer in layers)


def convert(model: nn.Module, kind: str) -> nn.Module:
    """Replace the linear layers of all blocks, in place; their parameters stay the same objects."""
    blocks: Any = model.get_submodule("model.layers")
    if kind.removesuffix(COMPILE) == "torch":
        for name, layer in list(blocks.named_modules()):
            if isinstance(layer, nn.Linear):
                plain = TorchLinear(1, 1, bias=False, device="meta")
                plain.weight, plain.bias = layer.weight, layer.bias
                blocks.set_submodule(name, plain)
    else:
        _convert_to_torchao(blocks, kind.removesuffix(COMPILE))
    if kind.endswith(COMPILE):
        torch._dynamo.config.recompile_limit = GRAPHS
        for layer in blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.compile()
    return model


def _convert_to_torchao(blocks: nn.Module, recipe: str) -> None:
    from dataclasses import replace

    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    convert_to_float8_training(
        blocks, config=replace(config, emulate=not torch.cuda.is_available())
    )


def main(arguments: Sequence[str]) -> int:
    kind, *rest = arguments
    build = loop.build_model

    def build_converted(*words: Any) -> nn.Module:
        return convert(build(*words), kind)

    loop.build_model = build_converted  # type: ignore[assignment]
    with replaced(Outside):
        return infir2(["cpt", *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
