"""Which activations a training step saves for the backward, as chosen by the recipe."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SavedActivations:
    """What each block saves for its backward; the rest is recomputed with the same bits.

    Example: `SavedActivations(recompute="selective", pre_activations="fp8")` uses the least memory
    that needs no GEMM to run twice.

    Attributes:
        recompute: "none", or "selective" to recompute RMSNorm outputs and SwiGLU products from
            their inputs.
        pre_activations: "bf16", or "fp8" to save gate and up as 1x128 codes; gradients are then
            those of the rounded values.
        keep_transposed_weights: cache the transposed codes of FP8 weights until the weights change;
            otherwise each backward transposes them again.
    """

    recompute: Literal["none", "selective"] = "none"
    pre_activations: Literal["bf16", "fp8"] = "bf16"
    keep_transposed_weights: bool = True

    def keeps_norms(self, scale_format: str) -> bool:
        """Whether the normalized input of the linears is saved.

        Never with "fp32" scales: those 1x128 codes cannot be transposed for the weight gradient.
        """
        return self.recompute == "none" and scale_format != "fp32"

    def keeps_products(self) -> bool:
        """Whether silu(gate) * up is saved.

        A product that is recomputed from gate and up in FP8 is the product of the rounded values.
        """
        return self.recompute == "none"
