"""What a training step keeps between forward and backward, chosen by the recipe."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Memory:
    """Example: `Memory(recompute="selective", pre_activations="fp8")` keeps the least without running a GEMM twice.

    Attributes:
        recompute: "none"; "selective" makes norms and SwiGLU products again from their inputs.
        pre_activations: "bf16", or "fp8" to keep gate and up as 1x128 codes (gradients then see rounded values).
        keep_transposed_weights: keep the second layout of FP8 weights until they change; otherwise make it in each backward.
    """

    recompute: Literal["none", "selective"] = "none"
    pre_activations: Literal["bf16", "fp8"] = "bf16"
    keep_transposed_weights: bool = True

    def keeps_norms(self, scale_format: str) -> bool:
        """Whether the normed input of linears is kept; not with "fp32" scales, whose codes cannot be transposed."""
        return self.recompute == "none" and scale_format != "fp32"

    def keeps_products(self) -> bool:
        """Whether silu(gate) * up is kept. What is made again from gate and up in FP8 is the product of the rounded values."""
        return self.recompute == "none"
