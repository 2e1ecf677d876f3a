"""Rotary position embedding (arXiv 2104.09864) with Llama 3's frequency scaling.

Angles, cosines and sines are computed in FP64 from the token's position and rounded once to FP32:
they do not depend on the number of positions in a call. `infir2.numerics.apply_rope` rotates.
"""

import functools
import math

import torch
from torch import Tensor

from infir2.model.config import ModelConfig


@functools.lru_cache(maxsize=8)
def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair, FP64 [H/2] on the CPU."""
    exponents = (
        torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    )
    plain = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return plain
    # Llama 3.1 stretches long wavelengths by `factor`, keeps short ones and interpolates between.
    factor, low, high = (
        config.rope_scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    wavelengths = 2 * math.pi / plain
    smooth = (config.rope_scaling["original_max_position_embeddings"] / wavelengths - low) / (
        high - low
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * plain / factor + smooth * plain


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, FP32 [T, 1, H/2] each, for `positions` [T]."""
    frequencies = _frequencies_on(config, positions.device)
    angles = positions.to(torch.float64)[:, None, None] * frequencies
    return angles.cos().float(), angles.sin().float()


@functools.lru_cache(maxsize=8)
def _frequencies_on(config: ModelConfig, device: torch.device) -> Tensor:
    return inverse_frequencies(config).to(device)
