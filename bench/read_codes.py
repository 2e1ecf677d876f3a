"""What a forward reads of FP8 weights, for the comparisons of several processes."""

from collections.abc import Callable

import torch
from torch import Tensor

from infir2.model import Decoder
from infir2.numerics import Fp8Linear, Fp8Tensor


def on_read(model: Decoder, note: Callable[[str, Fp8Tensor], None]) -> None:
    """Call `note(name, codes)` whenever an operation reads the codes or values of an FP8 layer."""
    for name, layer in model.named_modules():
        if isinstance(layer, Fp8Linear):

            def read(name: str = name, layer: Fp8Linear = layer) -> Fp8Tensor:
                codes = Fp8Linear.quantized_weight(layer)
                note(name, codes)
                return codes

            def read_values(
                dtype: torch.dtype, layer: Fp8Linear = layer, read: Callable[[], Fp8Tensor] = read
            ) -> Tensor:
                read()  # they may have been cached together with the codes
                return Fp8Linear.weight_values(layer, dtype)

            layer.quantized_weight = read  # type: ignore[method-assign]
            layer.weight_values = read_values  # type: ignore[method-assign]
