"""The trainer's weights in the precision of the engine (`rollout.precision`).

Which weights are FP8 is what the files in `rollout.model` say. FP8 codes are those that a trainer
in FP8 would send: of the BF16-rounded masters, by the one definition.
"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from infir2.config.schema import Fp8Section, RlRecipe
from infir2.model.hf_names import SCALE_SUFFIX
from infir2.model.safetensors_io import HfWeights
from infir2.numerics.quantize import quantize_weight
from infir2.parallel.parallel_model import ParallelModel


def engine_weights(parallel_model: ParallelModel, recipe: RlRecipe) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights with their exported names; every rank must exhaust the iterator."""
    in_fp8 = engine_fp8(recipe).enabled
    if in_fp8 == recipe.fp8.enabled:
        yield from parallel_model.exported()
    elif not in_fp8:
        yield from parallel_model.exported(masters=True)
    else:
        names = set(HfWeights(Path(recipe.rollout.model)).names())
        for name, weight in parallel_model.exported():
            if name + SCALE_SUFFIX not in names:
                yield name, weight
                continue
            quantized = quantize_weight(weight, recipe.fp8.scale_format)
            yield name, quantized.codes
            yield name + SCALE_SUFFIX, quantized.scale


def engine_fp8(recipe: RlRecipe) -> Fp8Section:
    """The section `fp8` of the engine."""
    if recipe.rollout.precision == "trainer":
        return recipe.fp8
    return recipe.fp8.model_copy(update={"enabled": recipe.rollout.precision == "fp8"})


def engine_scale_format(recipe: RlRecipe) -> str:
    """Of the engine's FP8 weights, "pow2" or "fp32"; "none" for an engine in BF16."""
    fp8 = engine_fp8(recipe)
    return fp8.scale_format if fp8.enabled else "none"
