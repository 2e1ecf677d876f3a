"""All linears of one decoder layer, forward and backward, in BF16 and in FP8, as closures to time.

Attention, RoPE and residuals are left out because both share them. BF16 uses PyTorch's matrix
product with BF16 weight gradients (FP32 in FP8) and the same fused norm and SwiGLU kernels without
the quantizer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infir2.numerics.formats import Fp8Tensor
from infir2.numerics.gemm_scaled import gemm_nt
from infir2.numerics.kernels import api

# Tokens, and (N, K) of each fused linear.
MODELS = {
    "1.5B": (
        16384,
        {"qkv": (2048, 1536), "o": (1536, 1536), "gate_up": (17920, 1536), "down": (1536, 8960)},
    ),
    "7B": (
        8192,
        {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    ),
}
EPS = 1e-6


def product(a: Fp8Tensor, b: Fp8Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`a @ b.T` with the default backend, the fastest one measured."""
    return gemm_nt(a.codes, a.scale, b.codes, b.scale, a.block, b.block, dtype)


class LayerLinears:
    """Random weights, activations and gradients of one layer's linears."""

    def __init__(self, tokens: int, linears: dict[str, tuple[int, int]]) -> None:
        def draw(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)

        self.masters = {name: draw(n, k).float() * 0.02 for name, (n, k) in linears.items()}
        self.weights = {name: master.bfloat16() for name, master in self.masters.items()}
        self.inputs = {name: draw(tokens, k) for name, (_, k) in linears.items()}
        self.gradients = {name: draw(tokens, n) for name, (n, _) in linears.items()}
        self.norm_weight = torch.ones(linears["qkv"][1], device="cuda")
        pair = draw(tokens, linears["gate_up"][0])
        half = pair.shape[1] // 2
        self.gate, self.up = pair[:, :half], pair[:, half:]
        self.quantize_weights()
        self.operands = {
            name: (
                api.quantize_input(self.inputs[name]),
                api.quantize_gradient(self.gradients[name]),
            )
            for name in linears
        }

    def quantize_weights(self) -> None:
        """Quantize every FP32 master in both layouts, as training does once per optimizer step."""
        self.quantized = {}
        for name, master in self.masters.items():
            codes = api.quantize_weight(master)
            self.quantized[name] = (codes, api.transpose(codes))

    def variants(self) -> dict[str, Callable[[], Any]]:
        """The closures to time, by name."""
        return {
            "bf16 linears": self.bf16_linears,
            "fp8 linears": self.fp8_linears,
            "fp8 GEMMs only": self.fp8_gemms,
            "bf16 forward": lambda: [self.inputs[n] @ w.t() for n, w in self.weights.items()],
            "fp8 forward": lambda: [
                product(api.quantize(self.inputs[n]), w[0]) for n, w in self.quantized.items()
            ],
            "bf16 with producers": self.bf16_layer,
            "fp8 fused": self.fp8_layer,
        }

    def bf16_linears(self) -> None:
        """out, grad_x, grad_W of every linear."""
        for name, weight in self.weights.items():
            x, grad = self.inputs[name], self.gradients[name]
            x @ weight.t()
            self._bf16_backward(name, x, grad)

    def fp8_linears(self) -> None:
        """The same in FP8, with a separate quantizer for every activation and gradient."""
        for name, (weight, _) in self.quantized.items():
            x, x_t = api.quantize_input(self.inputs[name])
            product(x, weight)
            self._fp8_backward(name, x_t, *api.quantize_gradient(self.gradients[name]))

    def fp8_gemms(self) -> None:
        """The same GEMMs on operands that are already quantized."""
        for name, ((x, x_t), gradients) in self.operands.items():
            product(x, self.quantized[name][0])
            self._fp8_backward(name, x_t, *gradients)

    def bf16_layer(self) -> None:
        """The linears with norm and SwiGLU, forward and backward."""
        hidden = self.inputs["qkv"]
        normed, rstd = api.rms_norm(hidden, self.norm_weight, EPS)
        normed @ self.weights["qkv"].t()
        self.inputs["o"] @ self.weights["o"].t()
        second, second_rstd = api.rms_norm(hidden, self.norm_weight, EPS)
        second @ self.weights["gate_up"].t()
        y = api.swiglu_product(self.gate, self.up)
        y @ self.weights["down"].t()
        grad_y = self._bf16_backward("down", y, self.gradients["down"])
        grad_second = self._bf16_backward(
            "gate_up", second, api.swiglu_backward(grad_y, self.gate, self.up)
        )
        api.rms_norm_backward(grad_second, hidden, second_rstd, self.norm_weight, None)
        self._bf16_backward("o", self.inputs["o"], self.gradients["o"])
        grad_normed = self._bf16_backward("qkv", normed, self.gradients["qkv"])
        api.rms_norm_backward(grad_normed, hidden, rstd, self.norm_weight, None)

    def fp8_layer(self) -> None:
        """The same in FP8, with quantizers fused into norm, SwiGLU and SwiGLU's backward."""
        hidden = self.inputs["qkv"]
        normed, rstd = api.rms_norm_quantize(hidden, self.norm_weight, EPS)
        product(normed, self.quantized["qkv"][0])
        attended, attended_t = api.quantize_input(self.inputs["o"])
        product(attended, self.quantized["o"][0])
        second, second_rstd = api.rms_norm_quantize(hidden, self.norm_weight, EPS)
        product(second, self.quantized["gate_up"][0])
        y = api.swiglu_quantize(self.gate, self.up)
        product(y, self.quantized["down"][0])
        grad_y = self._fp8_backward(
            "down", api.transpose(y), *api.quantize_gradient(self.gradients["down"])
        )
        gradient = api.swiglu_backward_quantize(grad_y, self.gate, self.up)
        grad_second = self._fp8_backward("gate_up", api.transpose(second), *gradient)
        api.rms_norm_backward(grad_second, hidden, second_rstd, self.norm_weight, None)
        self._fp8_backward("o", attended_t, *api.quantize_gradient(self.gradients["o"]))
        grad_normed = self._fp8_backward(
            "qkv", api.transpose(normed), *api.quantize_gradient(self.gradients["qkv"])
        )
        api.rms_norm_backward(grad_normed, hidden, rstd, self.norm_weight, None)

    def _bf16_backward(self, name: str, x: Tensor, grad: Tensor) -> Tensor:
        grad.t() @ x
        return grad @ self.weights[name]

    def _fp8_backward(
        self, name: str, x_t: Fp8Tensor, grad: Fp8Tensor, grad_t: Fp8Tensor
    ) -> Tensor:
        product(grad_t, x_t, torch.float32)
        return product(grad, self.quantized[name][1])
