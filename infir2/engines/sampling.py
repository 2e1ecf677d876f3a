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


def advance_key(key: int, count: int) -> int:
    """The key whose uniform numbers are those of `key` from number `count` on."""
    return (key + count * int(_GOLDEN)) % 2**64


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


def sample_on_device(
    logits: Tensor, inverse_temperatures: Tensor, top_ps: Tensor, draws: Tensor, truncate: bool
) -> tuple[Tensor, Tensor]:
    """`sample` on a GPU, in FP32 and without waiting for it.

    Args:
        logits: FP32 [B, V].
        inverse_temperatures: FP32 [B]; 0 is greedy.
        top_ps: FP32 [B], read only if `truncate`.
        draws: FP32 [B].
        truncate: whether a top_p is below 1; sorting the tokens takes longer than all the rest.

    Returns:
        As `sample`; the log-probabilities have the bits of the trainer's on equal logits.
    """
    from infir2.numerics.kernels import api as kernels  # imports triton

    token_ids, logprobs = kernels.sample_rows(
        logits, inverse_temperatures, draws, draws.new_empty(0, dtype=torch.int64)
    )
    if not truncate:
        return token_ids, logprobs
    is_truncated = (top_ps < 1) & (inverse_temperatures > 0)
    inverse = torch.where(is_truncated, inverse_temperatures, 1.0)
    ordered, order = (logits * inverse[:, None]).softmax(-1).sort(descending=True, stable=True)
    kept = ordered.cumsum(-1) - ordered < top_ps[:, None]
    cumulative = torch.zeros_like(ordered).scatter_(1, order, ordered * kept).cumsum_(-1)
    total = cumulative[:, -1]
    # Below the total, or rounding could choose a token behind the last possible one.
    target = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    chosen = torch.where(is_truncated, drawn.clamp_max(logits.shape[1] - 1), token_ids)
    return kernels.sample_rows(logits, inverse_temperatures, draws, chosen)


def most_likely(logits: Tensor, temperatures: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens of each row and their log-probabilities at its temperature.

    Args:
        logits: [B, V]; their dtype is that of the sums.
        temperatures: of the same dtype, [B]; none is 0.
        count: tokens per row.

    Returns:
        Token ids int64 [B, min(count, V)] and FP32 log-probabilities, the most likely first.
    """
    logprobs = (logits / temperatures[:, None]).log_softmax(-1)
    values, token_ids = logprobs.topk(min(count, logits.shape[1]))
    return token_ids, values.float()


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
