"""Which layers vLLM, SGLang and transformers cannot load in block-wise FP8.

vLLM and SGLang merge q, k, v and gate, up into one matrix each: every part has to be FP8, or none,
and its rows have to fill whole 128x128 blocks. Both quantize activations in groups of 128, so the
columns have to fill them too. transformers derives the block size from the shape of the scales,
which is right only for sizes that are multiples of 128.
"""

import json
import re
from collections.abc import Mapping
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

from torch import nn

from infir2.config.schema import Fp8Section
from infir2.convert.weights import BLOCK, meta_decoder
from infir2.errors import ConfigError
from infir2.model.hf_names import SCALE_SUFFIX
from infir2.model.safetensors_io import HfWeights, read_config, read_json
from infir2.numerics import Fp8Linear

_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def unservable_layers(config: Mapping[str, Any], fp8: Fp8Section) -> list[str]:
    """Names of the FP8 layers that these servers refuse; a merged layer's parts as one.

    Args:
        config: of `config.json`.
        fp8: which layers are FP8.

    Example: ["model.layers.0.self_attn.q_proj", ...] for a k_proj of 64 rows.
    """
    modules = dict(meta_decoder(config, fp8).named_modules())
    return [
        name
        for name, module in modules.items()
        if isinstance(module, Fp8Linear)
        and not all(_is_servable(modules[part]) for part in _merged_with(name))
    ]


def as_patterns(config: Mapping[str, Any], fp8: Fp8Section, names: list[str]) -> list[str]:
    """Patterns for `fp8.skip_modules` that match `names`, and no other FP8 layer of the model.

    Example: ["model.layers.*.self_attn.q_proj"] if `names` has that layer of every block.
    """
    modules = meta_decoder(config, fp8).named_modules()
    fp8_names = [name for name, module in modules if isinstance(module, Fp8Linear)]
    patterns: dict[str, None] = {}
    for name in names:
        pattern = re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
        patterns[pattern if set(matching(fp8_names, pattern)) <= set(names) else name] = None
    return list(patterns)


def unservable_sentence(names: list[str], patterns: list[str]) -> str:
    """The sentence about layers that `unservable_layers` and `as_patterns` found."""
    return (
        f"vLLM, SGLang or transformers refuse {len(names)} layers in FP8:"
        f" {', '.join(patterns)}; the parts of a merged layer (q, k, v; gate, up) must all be FP8,"
        " with rows and columns that are multiples of 128."
    )


def require_servable(key: str, directory: Path, fp8: Fp8Section) -> None:
    """Raise ConfigError if these servers refuse layers of `directory`, the value of `key`."""
    config = read_json(directory / "config.json")
    if refused := unservable_layers(config, fp8):
        patterns = as_patterns(config, fp8, refused)
        raise ConfigError(
            f"{key}: {directory}: {unservable_sentence(refused, patterns)} Export it with "
            f"--servable, and train with fp8.skip_modules = "
            f"{json.dumps([*fp8.skip_modules, *patterns])}."
        )


def require_loadable(key: str, directory: Path, tensor_parallel: int = 1) -> None:
    """Raise ConfigError if SGLang and vLLM refuse `directory`, the value of `key`, on so many GPUs.

    They cut the rows of q, k, v, gate and up, and the columns of o and down.
    """
    config = read_config(directory)
    if config.num_heads % tensor_parallel:
        raise ConfigError(
            f"{key}: {directory} has {config.num_heads} attention heads, which SGLang and vLLM "
            f"cannot divide among {tensor_parallel} GPUs; name a divisor."
        )
    weights = HfWeights(directory)
    scaled = {n.removesuffix(SCALE_SUFFIX) for n in weights.names() if n.endswith(SCALE_SUFFIX)}
    for weight in sorted(scaled):
        layer = weight.removesuffix(".weight")
        parts = [f"{part}.weight" for part in _merged_with(layer)]
        sizes = [float(size) for size in weights.shape(weight)]
        sizes[len(parts) == 1] /= tensor_parallel
        if layer.endswith(("k_proj", "v_proj")):  # a GPU has at least one head
            sizes[0] = max(sizes[0], config.head_dim)
        if any(n % block for n, block in zip(sizes, BLOCK, strict=True)) or set(parts) - scaled:
            raise ConfigError(
                f"{key}: {directory}: SGLang and vLLM refuse its layer {layer} in FP8 on "
                f"{tensor_parallel} GPU, {sizes[0]:g} x {sizes[1]:g} on each: the parts of a "
                "merged layer (q, k, v; gate, up) must all be FP8, with rows and columns that are "
                "multiples of 128. Export it with infir2 export fp8 --servable, or use fewer GPUs "
                "or the native engine."
            )


def _is_servable(module: nn.Module) -> bool:
    if not isinstance(module, Fp8Linear):
        return False
    return module.out_features % BLOCK[0] == 0 and module.in_features % BLOCK[1] == 0


def _merged_with(name: str) -> list[str]:
    """The layers that a server merges with `name`, and `name` itself."""
    prefix, _, leaf = name.rpartition(".")
    parts = next((group for group in _MERGED if leaf in group), (leaf,))
    return [f"{prefix}.{part}" for part in parts]
