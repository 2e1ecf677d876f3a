"""Sampling tokens from logits, with randomness that is a function of the request.

The generator is counter-based: token i of a request uses the uniform number of (key, i). So a
response does not depend on the batch, and a rollout that is repeated after a crash is the same.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment, 2^64 / golden ratio


def sampling_key(seed: int, prompt_id: str, sample: int, policy_version: int) -> int:
    """64-bit key of a request: the first bytes of a SHA-256 over the arguments."""
    text = f"{seed}/{prompt_id}/{sample}/{policy_version}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def uniforms(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """SplitMix64 of key + counter as float64 [n] in [0, 1).

    Args:
        keys: uint64 [n], one per request.
        counters: int [n], index of the response token that is about to be sampled.
    """
    with np.errstate(over="ignore"):
        z = keys + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(
    logits: Tensor, temperatures: np.ndarray, top_ps: np.ndarray, draws: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverting the cumulative distribution.

    Each row has its own parameters, and its result does not depend on the other rows.

    Args:
        logits: FP32 [B, V].
        temperatures: float64 [B]; 0 takes the most likely token and reports its log-probability at
            temperature 1.
        top_ps: float64 [B]; sample from the smallest set of tokens with at least this probability,
            1 keeps all.
        draws: float64 [B], uniform in [0, 1).

    Returns:
        token_ids int64 [B], and their FP32 log-probabilities [B] at the temperature, before top-p
        truncation.
    """
    greedy = temperatures == 0
    divisors = torch.from_numpy(np.where(greedy, 1.0, temperatures)).to(logits.device)
    scaled = logits.double() / divisors[:, None]
    logprobs = scaled - torch.logsumexp(scaled, dim=-1, keepdim=True)
    if greedy.all():
        chosen = logits.argmax(-1)
    else:
        probabilities = _keep_top_p(logprobs.exp(), top_ps)
        chosen = _invert_cumulative(probabilities, torch.from_numpy(draws).to(logits.device))
        if greedy.any():
            is_greedy = torch.from_numpy(greedy).to(logits.device)
            chosen = torch.where(is_greedy, logits.argmax(-1), chosen)
    return chosen, logprobs.gather(1, chosen[:, None]).squeeze(1).float()


def _keep_top_p(probabilities: Tensor, top_ps: np.ndarray) -> Tensor:
    """Zero the tokens outside of each row's smallest set with probability at least `top_ps`."""
    truncated = torch.from_numpy(np.flatnonzero(top_ps < 1)).to(probabilities.device)
    if not len(truncated):
        return probabilities
    limits = torch.from_numpy(top_ps[top_ps < 1]).to(probabilities.device)[:, None]
    ordered, order = probabilities[truncated].sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= limits, 0.0)
    kept = torch.zeros_like(ordered).scatter_(1, order, ordered)
    return probabilities.index_copy(0, truncated, kept)


def _invert_cumulative(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The token [B] whose interval of the cumulative sum contains draw * (sum of the row)."""
    cumulative = probabilities.cumsum(-1)
    targets = (draws * cumulative[:, -1])[:, None]
    index = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    # If rounding puts the target at the very end, take the last token with a probability above 0.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return torch.minimum(index, last)
