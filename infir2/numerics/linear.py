"""Linear layers that share an input, plain or FP8, and the FP8 layer itself.

`linear(x, layers)` reads x once for all layers: one quantisation per scale format, one sum of input gradients in FP32
that is rounded once. What is saved for backward is the FP8 codes of x (BF16 x only where a plain layer needs it), never
the product of a layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infir2.numerics import gemm_reference as gemm
from infir2.numerics import ops_cuda as fused
from infir2.numerics.formats import E4M3, TILE_BLOCK, Fp8Tensor, check_format, scale_shape
from infir2.numerics.quantize import dequantize, quantize_weight
from infir2.numerics.weight_cache import cached, invalidate, rounded

_PLAIN = ""  # stands among the scale formats for "not quantised"


class Fp8Linear(nn.Linear):
    """nn.Linear whose GEMMs read FP8: weight in 128x128 blocks, activation and output gradient in 1x128 groups.

    The parameter stays the FP32 master [N, K]; its codes are those of the BF16-rounded master and belong to one version
    of it. After `load_codes` there is no master: the layer serves the given bytes and cannot be trained.

    Attributes:
        scale_format: "pow2" or "fp32".
        quantizations: how often this layer's weight has been quantised; one per version of the weight.
    """

    quantizations: int = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scale_format: str = "pow2",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_format(TILE_BLOCK, scale_format)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.scale_format = scale_format
        # Bytes, so that module.to(dtype) leaves them alone; not in the state dict, which holds masters.
        self.register_buffer("code_bytes", None, persistent=False)
        self.register_buffer("scale_bytes", None, persistent=False)

    @classmethod
    def from_linear(
        cls,
        source: nn.Linear,
        scale_format: str = "pow2",
        masters: dict[Tensor, nn.Parameter] | None = None,
    ) -> "Fp8Linear":
        """The FP8 layer of a plain one.

        An FP32 parameter is shared, another dtype gets a new FP32 master. Calls that pass the same `masters` give
        layers that share a parameter the same master.
        """
        masters = {} if masters is None else masters
        layer = cls(
            source.in_features,
            source.out_features,
            bias=False,
            scale_format=scale_format,
            device="meta",
        )
        layer.weight = _master(source.weight, masters)
        if source.bias is not None:
            layer.bias = _master(source.bias, masters)
        return layer.train(source.training)

    def __setattr__(self, name: str, value: Any) -> None:
        """Setting `weight` ends its version: torch's `fully_shard` fills the memory of a tensor again and sets it after each gather."""
        if name == "weight" and isinstance(value, Tensor):
            invalidate(value)
        super().__setattr__(name, value)

    def quantized_weight(self) -> Fp8Tensor:
        """Codes [N, K] and scales of the current weight, 128x128 blocks; the same object until the weight changes."""
        return cached(self._source(), ("fp8", self.scale_format), self._quantize_weight)

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """Dequantised weight [N, K] in FP32 or FP64; kept with the codes for the emulated GEMMs."""
        return cached(
            self._source(),
            ("fp8", self.scale_format, dtype),
            lambda: dequantize(self.quantized_weight(), dtype),
        )

    def load_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Serve these bytes and drop the master (inference only).

        Args:
            codes: float8_e4m3fn [N, K].
            scale: float32 [ceil(N / 128), ceil(K / 128)], finite, positive, powers of two where `scale_format` says so.

        Raises:
            ValueError: wrong shape or dtype, or scales that do not fit the scale format.
        """
        shape = (self.out_features, self.in_features)
        if codes.dtype != E4M3 or tuple(codes.shape) != shape:
            raise ValueError(
                f"codes of this layer must be float8_e4m3fn {list(shape)}; got {codes.dtype} {list(codes.shape)}"
            )
        if scale.dtype != torch.float32 or tuple(scale.shape) != scale_shape(*shape, TILE_BLOCK):
            raise ValueError(
                f"scales of this layer must be float32 {list(scale_shape(*shape, TILE_BLOCK))}; got {scale.dtype} {list(scale.shape)}"
            )
        if not bool(torch.all(torch.isfinite(scale) & (scale > 0))):
            raise ValueError("scales must be finite and positive; export the weights again")
        if self.scale_format == "pow2" and bool(torch.any(torch.frexp(scale).mantissa != 0.5)):
            raise ValueError(
                'scales are not powers of two; set fp8.scale_format = "fp32" or export with "pow2"'
            )
        self.register_parameter("weight", None)
        with torch.inference_mode(False):  # tensors that count versions, wherever this is called
            self.code_bytes = codes.detach().contiguous().view(torch.uint8).clone()
            self.scale_bytes = scale.detach().contiguous().view(torch.int32).clone()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype (under autocast, autocast's)."""
        out = linear(x.reshape(-1, self.in_features), (self,))[0]
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_format={self.scale_format}"

    def _source(self) -> Tensor:
        return self.weight if self.weight is not None else self.code_bytes

    def _quantize_weight(self) -> Fp8Tensor:
        if self.weight is None:
            return Fp8Tensor(
                self.code_bytes.view(E4M3),
                self.scale_bytes.view(torch.float32),
                TILE_BLOCK,
                self.scale_format,
            )
        self.quantizations += 1
        return quantize_weight(self.weight, self.scale_format)


def linear(
    x: Tensor,
    layers: Sequence[nn.Linear],
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The outputs [T, N_i] of layers that share the input x [T, K], each in x's dtype.

    Each layer is an `Fp8Linear` or an nn.Linear. A plain layer multiplies its weight rounded to x's dtype; sums run in
    FP64 on a CPU. Gradients of masters and biases are FP32.
    For sums that other ranks complete and round, whose parts are not: `dtype` is that of x's values where x is FP32 so that its
    gradient is; `out_dtype` is a wider one for the outputs.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return linear(x.to(torch.get_autocast_dtype(device)), layers)
    dtypes = (dtype or x.dtype, out_dtype or dtype or x.dtype)
    if fused.serves(x, dtype):
        return fused.linear(x, layers, dtypes[1])
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    if torch.is_grad_enabled() and (
        x.requires_grad or any(p is not None and p.requires_grad for p in parameters)
    ):
        return _SharedInput.apply(tuple(layers), x, dtypes, *parameters)
    return _forward(x, layers, *dtypes)[0]


class _SharedInput(torch.autograd.Function):
    """(layers, x, dtypes of its values and of outputs, weight_0, bias_0, weight_1, ...) -> outputs.

    The parameters are inputs so that gradients reach them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: tuple[nn.Linear, ...],
        x: Tensor,
        dtypes: tuple[torch.dtype, torch.dtype],
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, quantized = _forward(x, layers, *dtypes)
        ctx.layers, ctx.x_dtype, ctx.dtype = layers, x.dtype, dtypes[0]
        ctx.set_materialize_grads(False)
        trained = [
            layer
            for layer, needed in zip(layers, ctx.needs_input_grad[3::2], strict=True)
            if needed
        ]
        formats = {layer.scale_format for layer in trained if isinstance(layer, Fp8Linear)}
        saved = {name: gemm.input_for_backward(x, quantized[name]) for name in sorted(formats)}
        ctx.saved_formats = [(t.block, t.scale_format) for t in saved.values()]
        keep_x = any(not isinstance(layer, Fp8Linear) for layer in trained)
        # The weights are saved so that autograd notices a change between forward and backward; they take no memory.
        ctx.save_for_backward(
            x if keep_x else None,
            *(part for t in saved.values() for part in (t.codes, t.scale)),
            *parameters[::2],
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(_device_of(grads), enabled=False):
            grad_x, *rest = _backward(ctx, grads)
        return None, grad_x, None, *rest


def _forward(
    x: Tensor, layers: Sequence[nn.Linear], dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, Fp8Tensor]]:
    """Outputs of all layers and the quantised x by scale format."""
    quantized: dict[str, Fp8Tensor] = {}
    values: dict[str, Tensor] = {}
    outputs = []
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.to(dtype).to(out_dtype)
        if isinstance(layer, Fp8Linear):
            name = layer.scale_format
            if name not in values:
                quantized[name], values[name] = gemm.quantize_input(x, name)
            weight = layer.weight_values(torch.float64)
        else:
            name = _PLAIN
            if name not in values:
                values[name] = x.to(gemm.plain_dtype(x))
            weight = rounded(layer.weight, dtype, gemm.plain_dtype(x))
        outputs.append(gemm.output(values[name], weight, bias, out_dtype))
    return tuple(outputs), quantized


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of (x, weight_0, bias_0, ...)."""
    x, *parts = ctx.saved_tensors
    saved = {
        name: Fp8Tensor(parts[2 * i], parts[2 * i + 1], block, name)
        for i, (block, name) in enumerate(ctx.saved_formats)
    }
    x_values: dict[str, Tensor] = {name: gemm.input_values(t) for name, t in saved.items()}
    if x is not None:
        x_values[_PLAIN] = x.to(gemm.backward_dtype(x))
    grad_x: Tensor | None = None
    results: list[Tensor | None] = []
    for i, (layer, grad) in enumerate(zip(ctx.layers, grads, strict=True)):
        need_weight, need_bias = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
        if grad is None:
            results += [None, None]
            continue
        by_row, by_column = _gradient_operands(layer, grad, ctx.needs_input_grad[1], need_weight)
        if by_row is not None:
            grad_x = gemm.fp32_product(by_row, _backward_weight(layer, grad, ctx.dtype), grad_x)
        results.append(None if by_column is None else _weight_gradient(layer, by_column, x_values))
        results.append(grad.sum(0, dtype=torch.float32).to(layer.bias.dtype) if need_bias else None)
    return [None if grad_x is None else grad_x.to(ctx.x_dtype), *results]


def _gradient_operands(
    layer: nn.Linear, grad: Tensor, by_row: bool, by_column: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Values [T, N] of the output gradient for grad_x and for grad_W, where asked for."""
    if isinstance(layer, Fp8Linear):
        return gemm.gradient_values(grad, layer.scale_format, by_row, by_column)
    values = grad.to(gemm.backward_dtype(grad))
    return values if by_row else None, values if by_column else None


def _backward_weight(layer: nn.Linear, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that the forward multiplied, in the dtype of the operands of grad_x."""
    if isinstance(layer, Fp8Linear):
        return layer.weight_values(torch.float32)
    return rounded(layer.weight, dtype, gemm.backward_dtype(grad))


def _weight_gradient(layer: nn.Linear, grad: Tensor, x_values: dict[str, Tensor]) -> Tensor:
    """`grad.T @ x` [N, K], summed in FP32."""
    x = x_values[layer.scale_format if isinstance(layer, Fp8Linear) else _PLAIN]
    return gemm.fp32_product(grad.t(), x).to(layer.weight.dtype)


def _device_of(grads: Sequence[Tensor | None]) -> str:
    return next((g.device.type for g in grads if g is not None), "cpu")


def _master(parameter: Tensor, masters: dict[Tensor, nn.Parameter]) -> nn.Parameter:
    if isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32:
        return parameter
    if parameter not in masters:
        master = parameter.detach().float()
        masters[parameter] = nn.Parameter(master, requires_grad=parameter.requires_grad)
    return masters[parameter]
