"""A decoder's operations on a GPU: kernels around one GEMM per group of layers, in BF16 and in FP8 alike.

    attention_inputs   norm -> [q | k | v] -> bias, rotation       one autograd node, residual gradient added in the norm's
    add_linear         residual + linear(x)                        backward
    linear             the outputs of layers that share x
    feed_forward       x + down(silu(gate) * up) of norm(x)

Layers that share an input are one matrix where their codes may be stacked (same kind; FP8 rows in whole blocks of 128), so
that there is one product for out, one for grad_x and one for grad_W. `SavedActivations` says what is kept for the backward; whatever
is not kept is made again with the same bits. Nothing here waits for the GPU. `infir2.numerics.ops` is the definition.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infir2.numerics.formats import GROUP, ROW_BLOCK, TILE_BLOCK, Fp8Tensor
from infir2.numerics.gemm_reference import fp32_product
from infir2.numerics.gemm_scaled import gemm_nt
from infir2.numerics.kernels import usable
from infir2.numerics.saved_activations import SavedActivations
from infir2.numerics.weight_cache import cached_jointly, replace_cached, rounded

Operand = Tensor | Fp8Tensor  # BF16, or codes


@dataclass(frozen=True)
class Stack:
    """Layers that share an input, multiplied as one matrix W [N, K], N the sum of theirs."""

    layers: tuple[nn.Linear, ...]

    @property
    def scale_format(self) -> str:
        """Scale format of the codes; empty for BF16."""
        return _format(self.layers[0])

    @property
    def sizes(self) -> list[int]:
        """Rows of each layer."""
        return [layer.out_features for layer in self.layers]

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """(weight, bias) of each layer, flat."""
        return tuple(p for layer in self.layers for p in (layer.weight, layer.bias))

    def bias(self) -> Tensor | None:
        """FP32 [N]; None where no layer has one."""
        if all(layer.bias is None for layer in self.layers):
            return None
        return torch.cat(
            [
                layer.weight.new_zeros(layer.out_features)
                if layer.bias is None
                else layer.bias.detach()
                for layer in self.layers
            ]
        )

    def operand(self) -> Operand:
        """W as the forward reads it: codes [N, K] or BF16."""
        return _stacked_codes(self.layers) if self.scale_format else _stacked_values(self.layers)

    def operand_t(self, keep: bool) -> Operand:
        """W as the input gradient reads it: codes of W.T [K, N], or BF16 W. `keep`: until the weights change."""
        codes = self.operand()
        if isinstance(codes, Tensor):
            return codes
        if not keep:
            return kernels().transpose(codes)
        return cached_jointly(
            [_identity(layer) for layer in self.layers],
            "transposed",
            lambda: kernels().transpose(codes),
        )


def stack(layers: Sequence[nn.Linear]) -> Stack | None:
    """The layers as one matrix; None where they differ in kind or their blocks do not meet."""
    kinds = {_format(layer) for layer in layers}
    aligned = "" in kinds or all(layer.out_features % GROUP == 0 for layer in layers[:-1])
    return Stack(tuple(layers)) if len(kinds) == 1 and aligned else None


def serves(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether these operations take x, whose values are of `dtype` if not of its own: BF16 on a GPU with the kernels."""
    return x.is_cuda and (dtype or x.dtype) == torch.bfloat16 and usable(x.device)


def attention_inputs(
    x: Tensor,
    weight: Tensor,
    eps: float,
    layers: Stack,
    head_dim: int,
    rope: tuple[Tensor, Tensor] | None,
    saved: SavedActivations,
) -> tuple[Tensor, ...]:
    """(x, q, k, v) with heads [T, N, H]; q and k rotated if `rope` is given. Use the returned x for the residual."""
    return _NormLinear.apply(x, weight, eps, layers, head_dim, rope, saved, *layers.parameters)


def linear(
    x: Tensor, layers: Sequence[nn.Linear], out_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, ...]:
    """The outputs [T, N_i] of layers that share x [T, K]; keeps the codes of x, or x where a layer is BF16.

    x may be FP32 with BF16 values, its gradient then is FP32 too; outputs that are not BF16 are as the GEMM sums them.
    """
    whole = stack(layers)
    if whole is None:
        return tuple(linear(x, (layer,), out_dtype)[0] for layer in layers)
    return _AddLinear.apply(
        None, x, whole, SavedActivations(), False, out_dtype, *whole.parameters
    ).split(whole.sizes, dim=1)


def add_linear(residual: Tensor, x: Tensor, layers: Stack, saved: SavedActivations) -> Tensor:
    """`residual + linear(x)`; keeps x itself, which its producer (attention) keeps anyway."""
    return _AddLinear.apply(residual, x, layers, saved, True, torch.bfloat16, *layers.parameters)


def feed_forward(
    x: Tensor, weight: Tensor, eps: float, gate_up: Stack, down: Stack, saved: SavedActivations
) -> Tensor:
    """`x + down(silu(gate(n)) * up(n))`, n = norm(x); layers without bias."""
    return _FeedForward.apply(
        x, weight, eps, gate_up, down, saved, *gate_up.parameters, *down.parameters
    )


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, layers: Stack, head_dim: int, rope: tuple[Tensor, Tensor] | None, saved: SavedActivations,
        *_: Tensor | None
    ) -> tuple[Tensor, ...]:  # fmt: skip
        normed, rstd = _norm(x, weight, eps, layers.scale_format)
        out = product(normed, layers.operand())
        sizes = [size // head_dim for size in layers.sizes]
        bias = layers.bias()
        if rope is None:
            heads = (out if bias is None else out.add_(bias.bfloat16())).view(
                len(out), -1, head_dim
            )
        else:
            parts = out.view(len(out), -1, head_dim).split(sizes, dim=1)
            heads = kernels().rope(*parts, bias, *rope, False).view(len(out), -1, head_dim)
        kept = normed if saved.keeps_norms(layers.scale_format) else None
        ctx.save_for_backward(x, weight, rstd, *(rope or (None, None)), *_tensors(kept))
        ctx.layers, ctx.saved, ctx.eps, ctx.rotated = layers, saved, eps, rope is not None
        return x, *heads.split(sizes, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual: Tensor | None, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd, cos, sin, *kept = ctx.saved_tensors
        if ctx.rotated:
            grad = kernels().rope(*grads, None, cos, sin, True)
        else:
            grad = torch.cat([g.flatten(1) for g in grads], dim=1)
        layers = ctx.layers
        rows, columns = _gradient(grad, layers.scale_format)
        normed_t = _normed_t(x, weight, rstd, ctx.eps, kept, layers.scale_format)
        weights = _weight_gradients(ctx, 7, layers, columns, normed_t, grad)
        grad_normed = product(
            rows, layers.operand_t(ctx.saved.keep_transposed_weights), transposed=True
        )
        grad_x, grad_weight = kernels().rms_norm_backward(grad_normed, x, rstd, weight, residual)
        return grad_x, grad_weight, None, None, None, None, None, *weights


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor | None,
        x: Tensor,
        layers: Stack,
        saved: SavedActivations,
        keep_x: bool,
        out_dtype: torch.dtype,
        *_: Tensor | None,
    ) -> Tensor:
        scale_format, ctx.x_dtype = layers.scale_format, x.dtype
        x = x.bfloat16()  # exact
        kept: Operand = x
        if scale_format and (keep_x or scale_format == "pow2"):
            operand: Operand = kernels().quantize(x, ROW_BLOCK, scale_format)
            kept = x if keep_x else operand
        elif scale_format:
            operand, kept = kernels().quantize_input(x, scale_format)
        else:
            operand = x
        bias = layers.bias()
        out = product(operand, layers.operand(), add=residual, dtype=out_dtype)
        ctx.save_for_backward(*_tensors(kept))
        ctx.layers, ctx.saved, ctx.block = (
            layers,
            saved,
            kept.block if isinstance(kept, Fp8Tensor) else None,
        )
        return out if bias is None else out.add_(bias.bfloat16())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers, (x, *scale) = ctx.layers, ctx.saved_tensors
        x_t: Operand = x
        if ctx.block is not None:
            codes = Fp8Tensor(x, scale[0], ctx.block, layers.scale_format)
            x_t = codes if ctx.block == TILE_BLOCK else kernels().transpose(codes)
        elif layers.scale_format:
            x_t = kernels().quantize_transposed(x, layers.scale_format)
        grad, grad_x = (
            grad.bfloat16(),
            None,
        )  # exact: that of an unrounded output comes from a rounded sum
        rows, columns = _gradient(grad, layers.scale_format)
        weights = _weight_gradients(ctx, 6, layers, columns, x_t, grad)
        if ctx.needs_input_grad[1]:
            weight_t = layers.operand_t(ctx.saved.keep_transposed_weights)
            grad_x = product(rows, weight_t, transposed=True, dtype=ctx.x_dtype)
        return grad if ctx.needs_input_grad[0] else None, grad_x, None, None, None, None, *weights


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        gate_up: Stack,
        down: Stack,
        saved: SavedActivations,
        *_: Tensor | None,
    ) -> Tensor:
        normed, rstd = _norm(x, weight, eps, gate_up.scale_format)
        pre = product(normed, gate_up.operand())
        gate, up = pre.chunk(2, dim=1)
        y: Operand = (
            kernels().swiglu_quantize(gate, up, down.scale_format)
            if down.scale_format
            else kernels().swiglu_product(gate, up)
        )
        out = product(y, down.operand(), add=x)
        small = saved.pre_activations == "fp8"
        kept_pre: Operand = kernels().quantize(pre) if small else pre
        kept_normed = normed if saved.keeps_norms(gate_up.scale_format) else None
        kept_y = None
        if (
            saved.keeps_products()
        ):  # "fp32" codes cannot be transposed: the second layout is kept instead
            kept_y = (
                kernels().swiglu_transposed(gate, up, "fp32") if down.scale_format == "fp32" else y
            )
        parts = [_tensors(kept_pre, small), _tensors(kept_normed), _tensors(kept_y, small)]
        ctx.save_for_backward(x, weight, rstd, *(t for part in parts for t in part))
        ctx.counts = [len(part) for part in parts]
        ctx.gate_up, ctx.down, ctx.saved, ctx.eps = gate_up, down, saved, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd, *rest = ctx.saved_tensors
        pre_count, normed_count, _ = ctx.counts
        kept_normed, kept_y = (
            rest[pre_count : pre_count + normed_count],
            rest[pre_count + normed_count :],
        )
        gate_up, down, keep = ctx.gate_up, ctx.down, ctx.saved.keep_transposed_weights
        pre = (
            rest[0]
            if pre_count == 1
            else kernels().dequantize(_restored(rest[0], rest[1], ROW_BLOCK, "pow2"))
        )
        gate, up = pre.chunk(2, dim=1)
        rows, columns = _gradient(grad, down.scale_format)
        down_weights = _weight_gradients(
            ctx,
            6 + len(gate_up.parameters),
            down,
            columns,
            _product_t(gate, up, kept_y, down.scale_format),
            grad,
        )
        grad_y = product(rows, down.operand_t(keep), transposed=True)
        if gate_up.scale_format and gate.shape[1] % GROUP == 0:
            rows, columns = kernels().swiglu_backward_quantize(
                grad_y, gate, up, gate_up.scale_format
            )
        else:
            rows, columns = _gradient(
                kernels().swiglu_backward(grad_y, gate, up), gate_up.scale_format
            )
        del grad_y, pre, gate, up
        normed_t = _normed_t(x, weight, rstd, ctx.eps, kept_normed, gate_up.scale_format)
        gate_up_weights = _weight_gradients(ctx, 6, gate_up, columns, normed_t, None)
        grad_normed = product(rows, gate_up.operand_t(keep), transposed=True)
        grad_x, grad_weight = kernels().rms_norm_backward(grad_normed, x, rstd, weight, grad)
        return grad_x, grad_weight, None, None, None, None, *gate_up_weights, *down_weights


def product(
    a: Operand,
    b: Operand,
    add: Tensor | None = None,
    transposed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`a @ b.T (+ add)` [M, N] in BF16, or as it is summed (FP32) for a wider `dtype`.

    With `transposed`, b is W.T's codes or, in BF16, W itself.
    """
    if isinstance(a, Fp8Tensor):
        assert isinstance(b, Fp8Tensor)
        out = gemm_nt(a.codes, a.scale, b.codes, b.scale, a.block, b.block, dtype)
        return out if add is None else out.add_(add)
    assert isinstance(b, Tensor)
    right = b if transposed else b.t()
    if dtype != torch.bfloat16:
        return fp32_product(a, right)
    return a @ right if add is None else torch.addmm(add, a, right)


def _norm(x: Tensor, weight: Tensor, eps: float, scale_format: str) -> tuple[Operand, Tensor]:
    return (
        kernels().rms_norm_quantize(x, weight, eps, scale_format)
        if scale_format
        else kernels().rms_norm(x, weight, eps)
    )


def _gradient(grad: Tensor, scale_format: str) -> tuple[Operand, Operand]:
    """The output gradient as grad_x and as grad_W read it."""
    return kernels().quantize_gradient(grad, scale_format) if scale_format else (grad, grad)


def _normed_t(
    x: Tensor, weight: Tensor, rstd: Tensor, eps: float, kept: Sequence[Tensor], scale_format: str
) -> Operand:
    """norm(x) as the weight gradient reads it."""
    if not scale_format:
        return kept[0] if kept else kernels().rms_norm(x, weight, eps)[0]
    if kept:
        return kernels().transpose(Fp8Tensor(kept[0], kept[1], ROW_BLOCK, scale_format))
    return kernels().rms_norm_transposed(x, rstd, weight, scale_format)


def _product_t(gate: Tensor, up: Tensor, kept: Sequence[Tensor], scale_format: str) -> Operand:
    """silu(gate) * up as the weight gradient reads it."""
    if not scale_format:
        return kept[0] if kept else kernels().swiglu_product(gate, up)
    if kept and scale_format == "fp32":
        return _restored(kept[0], kept[1], TILE_BLOCK, scale_format)
    if kept:
        return kernels().transpose(_restored(kept[0], kept[1], ROW_BLOCK, scale_format))
    return kernels().swiglu_transposed(gate, up, scale_format)


def _weight_gradients(
    ctx: Any, first: int, layers: Stack, grad_t: Operand, x_t: Operand, grad: Tensor | None
) -> list[Tensor | None]:
    """FP32 gradients of (weight, bias) of each layer; `first` is where they stand among the node's inputs."""
    needed = ctx.needs_input_grad[first : first + len(layers.parameters)]
    stacked: Tensor | None = None
    if any(needed[::2]):
        if isinstance(grad_t, Fp8Tensor):
            assert isinstance(x_t, Fp8Tensor)
            stacked = gemm_nt(
                grad_t.codes,
                grad_t.scale,
                x_t.codes,
                x_t.scale,
                grad_t.block,
                x_t.block,
                torch.float32,
            )
        else:
            assert isinstance(x_t, Tensor)
            stacked = fp32_product(grad_t.t(), x_t)
    bias = (
        grad.sum(0, dtype=torch.float32).split(layers.sizes)
        if grad is not None and any(needed[1::2])
        else None
    )
    results: list[Tensor | None] = []
    for index, weight in enumerate(
        stacked.split(layers.sizes) if stacked is not None else [None] * len(layers.layers)
    ):
        results += [
            weight if needed[2 * index] else None,
            bias[index] if bias is not None and needed[2 * index + 1] else None,
        ]
    return results


def _stacked_codes(layers: tuple[nn.Linear, ...]) -> Fp8Tensor:
    parts: list[Fp8Tensor] = [cast(Any, layer).quantized_weight() for layer in layers]
    if len(parts) == 1:
        return parts[0]

    def make() -> Fp8Tensor:
        codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(
            parts[0].codes.dtype
        )
        whole = Fp8Tensor(
            codes, torch.cat([part.scale for part in parts]), TILE_BLOCK, parts[0].scale_format
        )
        first_row = first_block = 0
        for layer, part in zip(
            layers, parts, strict=True
        ):  # the layers' own codes become views of the whole
            rows, blocks = part.shape[0], part.scale.shape[0]
            view = Fp8Tensor(
                codes[first_row : first_row + rows],
                whole.scale[first_block : first_block + blocks],
                TILE_BLOCK,
                part.scale_format,
            )
            replace_cached(_identity(layer), ("fp8", part.scale_format), view)
            first_row, first_block = first_row + rows, first_block + blocks
        return whole

    return cached_jointly([_identity(layer) for layer in layers], "stacked codes", make)


def _stacked_values(layers: tuple[nn.Linear, ...]) -> Tensor:
    first = layers[0].weight
    if len(layers) == 1 and hasattr(first, "precomputed"):  # gathered in BF16
        return rounded(first, torch.bfloat16, torch.bfloat16)

    def make() -> Tensor:
        whole = torch.empty(
            (sum(layer.out_features for layer in layers), first.shape[1]),
            dtype=torch.bfloat16,
            device=first.device,
        )
        for part, layer in zip(
            whole.split([layer.out_features for layer in layers]), layers, strict=True
        ):
            part.copy_(layer.weight.detach())
        return whole

    return cached_jointly([layer.weight for layer in layers], "stacked values", make)


def _format(layer: nn.Linear) -> str:
    return getattr(layer, "scale_format", "")


def _identity(layer: nn.Linear) -> Tensor:
    """The tensor whose version the layer's codes belong to."""
    return layer.weight if layer.weight is not None else layer.code_bytes


def _tensors(kept: Operand | None, small: bool = False) -> tuple[Tensor, ...]:
    """What is saved for the backward; `small`: of a power-of-two scale only the exponent, one byte instead of four."""
    if kept is None or isinstance(kept, Tensor):
        return () if kept is None else (kept,)
    if small and kept.scale_format == "pow2":
        return kept.codes, (kept.scale.view(torch.int32) >> 23).to(torch.uint8)
    return kept.codes, kept.scale


def _restored(codes: Tensor, scale: Tensor, block: tuple[int, int], scale_format: str) -> Fp8Tensor:
    """The inverse of `_tensors`; the exponent of a NaN comes back as Inf, which spoils the products as well."""
    if scale.dtype == torch.uint8:
        scale = (scale.to(torch.int32) << 23).view(torch.float32)
    return Fp8Tensor(codes, scale, block, scale_format)


def kernels() -> Any:
    """The kernels, imported at the first use: importing triton costs time and may be impossible where they are not used."""
    from infir2.numerics.kernels import api as operations

    return operations
