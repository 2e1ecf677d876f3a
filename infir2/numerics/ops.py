"""The operations that a decoder is made of: norm into linears, SwiGLU into a linear, linear.

Each operation has two definitions with the same signature: `ops_reference` defines the result,
`ops_cuda` fuses it into kernels around the GEMMs. `definitions_for` chooses, here and nowhere else.
Whether a layer is plain or FP8 is the layer's own type (`infir2.numerics.linear.Fp8Linear`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from infir2.numerics import ops_reference
from infir2.numerics.composed import Rope
from infir2.numerics.joint_weights import quantize_together
from infir2.numerics.kernels import usable
from infir2.numerics.saved_activations import SavedActivations

_SAVE_ALL = SavedActivations()


class Operations(Protocol):
    """The signatures of `ops_reference` and `ops_cuda`."""

    def linear(
        self, x: Tensor, layers: Sequence[nn.Linear], dtype: torch.dtype, out_dtype: torch.dtype
    ) -> tuple[Tensor, ...]: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def swiglu(self, gate: Tensor, up: Tensor, saved: SavedActivations) -> Tensor: ...
    def attention_inputs(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        layers: Sequence[nn.Linear],
        head_dim: int,
        rope: Rope | None,
        saved: SavedActivations,
    ) -> tuple[Tensor, ...]: ...
    def add_linear(
        self, residual: Tensor, x: Tensor, layer: nn.Linear, saved: SavedActivations
    ) -> Tensor: ...
    def feed_forward(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Linear,
        saved: SavedActivations,
    ) -> Tensor: ...


def runs_on_kernels(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the CUDA definitions compute with x: BF16 on a GPU that has the kernels.

    `dtype` is that of x's values if x is stored in a wider one.
    """
    return x.is_cuda and (dtype or x.dtype) == torch.bfloat16 and usable(x.device)


def definitions_for(x: Tensor, dtype: torch.dtype | None = None) -> Operations:
    """The module whose operations compute with x, or what `replaced` makes of it."""
    if not runs_on_kernels(x, dtype):
        return _replacement(ops_reference)
    from infir2.numerics import ops_cuda  # imports triton, which may be missing elsewhere

    return _replacement(ops_cuda)


def _as_they_are(definitions: Operations) -> Operations:
    return definitions


_replacement: Callable[[Operations], Operations] = _as_they_are


@contextmanager
def replaced(replacement: Callable[[Operations], Operations]) -> Iterator[None]:
    """Inside, operations are those that `replacement` makes of the definitions."""
    global _replacement
    _replacement = replacement
    try:
        yield
    finally:
        _replacement = _as_they_are


def quantize_weights(x: Tensor, groups: Iterable[Sequence[nn.Linear]]) -> None:
    """Quantize the FP8 weights that changed, before a forward of x; all in one launch on a GPU.

    On a CPU, the small ones together. Without it, each operation quantizes its own weights when it
    needs them.

    Args:
        x: as the operations will get it, or of the same dtype and device.
        groups: the layers of each operation that will run.
    """
    if runs_on_kernels(x):
        from infir2.numerics import stacked_weights

        stacked_weights.quantize_weights(groups)
    elif x.device.type == "cpu":
        quantize_together(layer for group in groups for layer in group)


def requantizer(groups: Iterable[Sequence[nn.Linear]]) -> Callable[[], Tensor] | None:
    """`stacked_weights.requantizer`, on a GPU that has the kernels."""
    from infir2.numerics import stacked_weights

    return stacked_weights.requantizer(groups)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension.

    weight: FP32 master [D], rounded to x's dtype.
    """

    def __init__(
        self, size: int, eps: float = 1e-6, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def linear(
    x: Tensor,
    layers: Sequence[nn.Linear],
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The outputs [T, N_i] of layers that share the input x [T, K].

    x is quantized once for all layers, and its gradient is summed over the layers in FP32 and
    rounded once. A plain nn.Linear multiplies its weight rounded to x's dtype. Gradients of masters
    and biases are FP32. Under autocast, x is cast to autocast's dtype.

    Args:
        x: [T, K].
        layers: `Fp8Linear` or nn.Linear, mixed in any way.
        dtype: dtype of x's values, by default x.dtype. Tensor parallelism passes an FP32 x with
            BF16 values, so that the gradient of x is FP32: ranks sum it before it is rounded.
        out_dtype: dtype of the outputs, by default `dtype`. Tensor parallelism asks for unrounded
            partial sums, which ranks sum before they are rounded.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return linear(x.to(torch.get_autocast_dtype(device)), layers)
    value_dtype = dtype or x.dtype
    definitions = definitions_for(x, dtype)
    return definitions.linear(x, layers, value_dtype, out_dtype or value_dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., D] over D, times weight [D] rounded to x's dtype; rounded once."""
    return definitions_for(x).rms_norm(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor, saved: SavedActivations = _SAVE_ALL) -> Tensor:
    """`silu(gate) * up`, both [..., F], rounded once.

    `saved` may ask to save gate and up, then [T, F], as FP8 for the backward.
    """
    return definitions_for(gate).swiglu(gate, up, saved)


def attention_inputs(
    x: Tensor,
    norm: RMSNorm,
    layers: Sequence[nn.Linear],
    head_dim: int,
    rope: Rope | None,
    saved: SavedActivations,
) -> tuple[Tensor, ...]:
    """(x, q, k, v): heads [T, N, H] of `layer(norm(x))`, q and k rotated if `rope` is given.

    Use the returned x for the residual sum: its gradient is then added inside the norm's backward.
    """
    definitions = definitions_for(x)
    return definitions.attention_inputs(x, norm.weight, norm.eps, layers, head_dim, rope, saved)


def add_linear(residual: Tensor, x: Tensor, layer: nn.Linear, saved: SavedActivations) -> Tensor:
    """`residual + layer(x)`, both [T, N]; x [T, K]."""
    return definitions_for(x).add_linear(residual, x, layer, saved)


def feed_forward(
    x: Tensor,
    norm: RMSNorm,
    gate: nn.Linear,
    up: nn.Linear,
    down: nn.Linear,
    saved: SavedActivations,
) -> Tensor:
    """`x + down(silu(gate(n)) * up(n))` with n = norm(x), [T, D] -> [T, D]."""
    return definitions_for(x).feed_forward(x, norm.weight, norm.eps, gate, up, down, saved)
