"""What FP8 does to the operands of each linear layer: the operations of a decoder, taken apart.

`Observed` computes with the unfused operations of the definitions that it is made of, so that each
operand exists in high precision beside its codes. It is for a forward and backward of its own: a
fused backward adds gradients in another order.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from infir2.numerics.composed import Composed
from infir2.numerics.formats import E4M3_MAX, ROW_BLOCK, Fp8Tensor
from infir2.numerics.linear import Fp8Linear
from infir2.numerics.ops import Operations
from infir2.numerics.ops_reference import rotate, scale_format_of
from infir2.numerics.quantize import dequantize, quantize, quantize_weight

MEASURES = ("underflow", "saturation", "cosine", "relative_error", "kurtosis")


@torch.no_grad()
def measure(x: Tensor, quantized: Fp8Tensor) -> Tensor:
    """`MEASURES` of x [R, C] against its codes, FP64 [5]; NaN where one is not defined.

    underflow: share of the values other than zero whose code is zero.
    saturation: share of the codes that are +-448, the largest ("fp32" scales bring each block's
        largest value there, so 1/128 of rows is their least).
    cosine, relative_error: of the dequantized values to x; `|v - x| / |x|`, Frobenius norms.
    kurtosis: of x, fourth central moment over squared variance; 3 for a Gaussian.
    """
    values, x = dequantize(quantized).double(), x.double()
    nonzero, norm = x != 0, torch.linalg.vector_norm(x)
    central = x - x.mean()
    squares = central.square_()
    return torch.stack(
        [
            (nonzero & (values == 0)).sum() / nonzero.sum(),
            (quantized.codes.float().abs() == E4M3_MAX).double().mean(),
            (values * x).sum() / (torch.linalg.vector_norm(values) * norm),
            torch.linalg.vector_norm(values - x) / norm,
            squares.square().mean() / squares.mean() ** 2,
        ]
    )


class Observed:
    """`Operations` that measure the operands of the layers in `names`.

    Example: `with replaced(lambda base: Observed(base, names, "pow2", found)): ...` fills `found`
    with {(name, "activation" | "weight" | "gradient"): FP64 [5]}.

    Args:
        base: definitions to compute with.
        names: name of each layer.
        scale_format: for layers that are not FP8, which are measured as if they were.
        found: gets the measurements.
    """

    def __init__(
        self,
        base: Operations,
        names: Mapping[nn.Linear, str],
        scale_format: str,
        found: dict[tuple[str, str], Tensor],
    ) -> None:
        self._base, self._names, self._found = base, names, found
        self._scale_format = scale_format
        self.rms_norm, self.swiglu = base.rms_norm, base.swiglu
        composed = Composed(self.linear, base.rms_norm, base.swiglu, rotate)
        self.attention_inputs, self.add_linear = composed.attention_inputs, composed.add_linear
        self.feed_forward = composed.feed_forward

    def linear(
        self, x: Tensor, layers: Sequence[nn.Linear], dtype: torch.dtype, out_dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """As the definitions' `linear`; measures x, the weights and, in the backward, gradients."""
        known: dict[str, Tensor] = {}
        for layer in layers:
            form = scale_format_of(layer) or self._scale_format
            if form not in known:
                known[form] = measure(x.detach(), quantize(x.detach(), ROW_BLOCK, form))
            self._found[self._names[layer], "activation"] = known[form]
            self._found[self._names[layer], "weight"] = _measure_weight(layer, form)
        outputs = self._base.linear(x, layers, dtype, out_dtype)
        for layer, out in zip(layers, outputs, strict=True):
            self._await_gradient(layer, out)
        return outputs

    def _await_gradient(self, layer: nn.Linear, out: Tensor) -> None:
        def measure_gradient(grad: Tensor) -> None:
            form = scale_format_of(layer) or self._scale_format
            found = measure(grad, quantize(grad, ROW_BLOCK, form))
            self._found[self._names[layer], "gradient"] = found

        if out.requires_grad:
            out.register_hook(measure_gradient)


def _measure_weight(layer: nn.Linear, scale_format: str) -> Tensor:
    """Of the BF16-rounded master, whose codes these are."""
    master = layer.weight.detach()
    if isinstance(layer, Fp8Linear):
        return measure(master.bfloat16(), layer.quantized_weight())
    return measure(master.bfloat16(), quantize_weight(master, scale_format))
