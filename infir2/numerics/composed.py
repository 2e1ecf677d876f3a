"""A block's operations, composed of the smaller ones: what each of them means.

`ops_reference` is made of it, `ops_cuda` falls back on it where it has no fused operation, and
`observed` puts a measuring `linear` in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from infir2.numerics.saved_activations import SavedActivations

Rope = tuple[Tensor, Tensor]  # cos and sin, FP32 [T, 1, H / 2]


@dataclass(frozen=True)
class Composed:
    """The operations of a block from these four; signatures as in `ops.Operations`.

    `rotate` gives q and k [T, N, H] rotated by cos and sin, and v.
    """

    linear: Callable[..., tuple[Tensor, ...]]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor, SavedActivations], Tensor]
    rotate: Callable[..., Any]

    def attention_inputs(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        layers: Sequence[nn.Linear],
        head_dim: int,
        rope: Rope | None,
        saved: SavedActivations,
    ) -> tuple[Tensor, ...]:
        """(x, q, k, v): heads [T, N, H] of `layer(rms_norm(x))`, q and k rotated with `rope`."""
        outputs = self.linear(self.rms_norm(x, weight, eps), layers, x.dtype, x.dtype)
        q, k, v = (y.unflatten(1, (-1, head_dim)) for y in outputs)
        return (x, q, k, v) if rope is None else (x, *self.rotate(q, k, v, *rope))

    def add_linear(
        self, residual: Tensor, x: Tensor, layer: nn.Linear, saved: SavedActivations
    ) -> Tensor:
        """`residual + layer(x)`, both [T, N]; x [T, K]."""
        return residual + self.linear(x, (layer,), x.dtype, x.dtype)[0]

    def feed_forward(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Linear,
        saved: SavedActivations,
    ) -> Tensor:
        """`x + down(silu(gate(n)) * up(n))` with n = rms_norm(x), [T, D] -> [T, D]."""
        normed = self.rms_norm(x, weight, eps)
        gate_out, up_out = self.linear(normed, (gate, up), x.dtype, x.dtype)
        product = self.swiglu(gate_out, up_out, saved)
        return x + self.linear(product, (down,), x.dtype, x.dtype)[0]
