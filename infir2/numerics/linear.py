"""FP8 training of a linear layer: three GEMMs, two layouts, one quantization per tensor.

A linear layer with x [T, K] and W [N, K] needs three products per step:

    out    = x      @ W.T      x      in 1x128 along K,         W   in 128x128
    grad_x = grad   @ W        grad   in 1x128 along N,         W.T in 128x128
    grad_W = grad.T @ x        grad.T in 1x128 along tokens,    x.T in 128x128

A block shares one scale: `x ~= codes * scale`, codes in E4M3 (`formats`). The scales of a GEMM have
to lie along the dimension that it sums over (K, N, tokens), which is why one tensor may be needed
in two layouts. 1x128 isolates the outliers of one token; 128x128 is the same block seen from both
sides, so a weight and its transpose are the same bytes in another order.

Each tensor is read once in high precision:

- W: the FP32 master, rounded to BF16, then quantized, once per optimizer step. Forward, backward,
  recomputation, export and rollout engines use the same codes.
- x: quantized to 1x128 once for all layers that share it, and saved for the backward as these
  codes, 1.03 bytes per value. With "pow2" scales, x.T in 128x128 is computed from the codes:
  bringing the rows of a tile to one scale multiplies codes by powers of two, which is exact away
  from subnormals. With "fp32" scales that would round twice, so the forward also quantizes x.T.
- grad: read once, quantized in both layouts.

Master gradients are FP32. Sums are FP32 on a GPU. On a CPU the GEMMs are emulated: the forward sums
in FP64 and rounds once, so that a token's result does not depend on the batch around it; the
backward sums in FP32.

Left out: per-tensor scaling (one outlier costs all other values their precision), delayed scaling
(state between steps), E5M2 gradients (a scale per 128 values leaves no use for the range),
stochastic rounding of operands, and FP8 heads and embeddings (`convert_to_fp8` skips them).

This file has the layer. `ops_reference.linear` defines the autograd node over these products,
`gemm_reference` their operands; `ops_cuda` runs them on a GPU.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from infir2.numerics.formats import E4M3, TILE_BLOCK, Fp8Tensor, check_format, scale_shape
from infir2.numerics.gemm_scaled import missing_block_scaling
from infir2.numerics.kernels import usable
from infir2.numerics.ops import linear
from infir2.numerics.quantize import dequantize, quantize_weight
from infir2.numerics.weight_cache import cached, invalidate

_NOT_TRACED = (
    "an FP8 layer is not traced, because its codes belong to one version of the weight; "
    "use torch.compile without fullgraph=True, which compiles what lies between the layers"
)
_KEPT_FP32 = (
    "FP8 layers keep their FP32 masters, which a conversion to another dtype would round; "
    "all other parameters of the model are converted"
)


class Fp8Linear(nn.Linear):
    """nn.Linear whose three GEMMs read FP8.

    The parameter is the FP32 master [N, K]. Its codes are those of the BF16-rounded master,
    computed once per version of the master (`infir2.numerics.weight_cache`). The first codes of the
    process register a hook on torch's optimizers, so that the codes are never stale after a step.
    After `load_codes` there is no master: the layer serves the given bytes and cannot be trained.

    Attributes:
        scale_format: "pow2" or "fp32".
        quantizations: number of times that the weight was quantized; one per version.
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
        # Integers, so that module.to(dtype) does not convert them. Not in the state dict, which
        # holds masters.
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

        An FP32 parameter is shared, another dtype gets a new FP32 master. Calls with the same dict
        `masters` give layers that share a parameter the same master.
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
        """Set an attribute; setting `weight` ends its version.

        torch's `fully_shard` refills the memory of a tensor without moving its counter, and sets it
        after each all-gather.
        """
        if name == "weight" and isinstance(value, Tensor):
            invalidate(value)
        super().__setattr__(name, value)

    def quantized_weight(self) -> Fp8Tensor:
        """The current weight [N, K] in 128x128 blocks; the same object until the weight changes."""
        return cached(self._versioned_tensor(), ("fp8", self.scale_format), self._quantize_weight)

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """Dequantized weight [N, K] in FP32 or FP64, cached with the codes for emulated GEMMs."""
        return cached(
            self._versioned_tensor(),
            ("fp8", self.scale_format, dtype),
            lambda: dequantize(self.quantized_weight(), dtype),
        )

    def load_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Serve these bytes and drop the master (inference only).

        Args:
            codes: float8_e4m3fn [N, K].
            scale: float32 [ceil(N / 128), ceil(K / 128)], finite and positive; powers of two if
                `scale_format` is "pow2".

        Raises:
            ValueError: wrong shape or dtype, or scales that do not match the scale format.
        """
        self._check_codes(codes, scale)
        self.register_parameter("weight", None)
        with torch.inference_mode(False):  # inference tensors would have no version counter
            self.code_bytes = codes.detach().contiguous().view(torch.uint8).clone()
            self.scale_bytes = scale.detach().contiguous().view(torch.int32).clone()

    def _check_codes(self, codes: Tensor, scale: Tensor) -> None:
        shape = (self.out_features, self.in_features)
        if codes.dtype != E4M3 or tuple(codes.shape) != shape:
            raise ValueError(
                f"codes of this layer must be float8_e4m3fn {list(shape)}; "
                f"got {codes.dtype} {list(codes.shape)}"
            )
        blocks = scale_shape(*shape, TILE_BLOCK)
        if scale.dtype != torch.float32 or tuple(scale.shape) != blocks:
            raise ValueError(
                f"scales of this layer must be float32 {list(blocks)}; "
                f"got {scale.dtype} {list(scale.shape)}"
            )
        if not bool(torch.all(torch.isfinite(scale) & (scale > 0))):
            raise ValueError("scales must be finite and positive; export the weights again")
        if self.scale_format == "pow2" and bool(torch.any(torch.frexp(scale).mantissa != 0.5)):
            raise ValueError(
                'scales are not powers of two; set fp8.scale_format = "fp32" or export with "pow2"'
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype, or in autocast's dtype.

        torch.compile does not trace it: it compiles what lies between two FP8 layers.
        """
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=_NOT_TRACED)
            return _eager_product(self, x)
        return _product(self, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp8Linear":
        """Moves the layer as `nn.Module._apply` does, but keeps FP32 masters in FP32."""

        def keep_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype != torch.float32 or moved.dtype == torch.float32:
                return moved
            warnings.warn(_KEPT_FP32, stacklevel=2)
            return tensor.to(moved.device)

        return super()._apply(keep_fp32, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Loads as nn.Module does; `assign=True` makes FP32 masters of tensors of another dtype."""
        if local_metadata.get("assign_to_params_buffers"):
            for name in (f"{prefix}{leaf}" for leaf in self._parameters):
                if name in state_dict:
                    state_dict[name] = state_dict[name].float()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_format={self.scale_format}"

    def _versioned_tensor(self) -> Tensor:
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


def _product(layer: Fp8Linear, x: Tensor) -> Tensor:
    """`layer(x)`: x [..., K] -> [..., N]."""
    if x.shape[-1] != layer.in_features:
        raise ValueError(
            f"{layer} needs an input of {layer.in_features} features; got {list(x.shape)}"
        )
    if x.is_cuda:
        autocast = torch.is_autocast_enabled("cuda")
        _warn_if_emulated(x.device, torch.get_autocast_dtype("cuda") if autocast else x.dtype)
    out = linear(x.reshape(-1, layer.in_features), (layer,))[0]
    return out.view(*x.shape[:-1], layer.out_features)


# torch.compiler.disable would import torch._dynamo now, which takes longer than all of infir2.
_eager_product: Callable[[Fp8Linear, Tensor], Tensor] = torch._disable_dynamo(_product)


@cache  # once per device and dtype
def _warn_if_emulated(device: torch.device, dtype: torch.dtype) -> None:
    """Warn if FP8 layers of this GPU are slow, because no kernel reads this input."""
    reason = missing_block_scaling(device)
    if reason:
        warnings.warn(f"FP8 is emulated, and slower than BF16: {reason}", stacklevel=2)
    elif dtype != torch.bfloat16:
        warnings.warn(
            f"FP8 is emulated, many times slower than BF16, for inputs of {dtype}; run the "
            "forward under torch.autocast('cuda', torch.bfloat16)",
            stacklevel=2,
        )
    elif not usable(device):
        warnings.warn(
            "FP8 is emulated, many times slower than BF16: Triton is missing; "
            "pip install 'infir2[gpu]'",
            stacklevel=2,
        )


def _master(parameter: Tensor, masters: dict[Tensor, nn.Parameter]) -> nn.Parameter:
    if isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32:
        return parameter
    if parameter not in masters:
        master = parameter.detach().float()
        masters[parameter] = nn.Parameter(master, requires_grad=parameter.requires_grad)
    return masters[parameter]
