"""Sampling whose randomness depends on the request alone: one counter-based uniform number per token."""

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """SplitMix64 of key + counter as float64 in [0, 1).

    Args:
        keys: uint64 [n], one per request.
        counters: [n], index of the token about to be sampled.
    """
    with np.errstate(over="ignore"):
        z = keys + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(
    logits: Tensor, temperature: float, top_p: float, draws: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: FP32 [B, V].
        temperature: 0 takes the most likely token (its log-probability is then given at temperature 1).
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        draws: float64 [B], uniform in [0, 1).

    Returns:
        token_ids [B], and their FP32 log-probabilities [B] at the temperature, before top_p.
    """
    scaled = logits.double() / (temperature or 1.0)
    logprobs = scaled - torch.logsumexp(scaled, dim=-1, keepdim=True)
    if temperature == 0:
        chosen = logits.argmax(-1)
    else:
        chosen = _invert(logprobs.exp(), top_p, torch.from_numpy(draws).to(logits.device))
    return chosen, logprobs.gather(1, chosen[:, None]).squeeze(1).float()


def _invert(probabilities: Tensor, top_p: float, draws: Tensor) -> Tensor:
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
    cumulative = probabilities.cumsum(-1)
    index = torch.searchsorted(
        cumulative, (draws * cumulative[:, -1])[:, None], right=True
    ).squeeze(1)
    # the last token with any probability, should rounding put the draw at the very end
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return torch.minimum(index, last)
