"""What proves that a vLLM server holds the published weights, after each publish.

1. Its version is the published one.
2. What each layer computes with is bit for bit what the files have, the LM head too
   (`inside_vllm/infir2_worker.py`). FP8 layers are not compared.
3. The probe's first request finds none of its prompt in the cache: the cache was reset.
4. Its log-probabilities of the probe are the trainer's within MAX_PROBE_DIFFERENCE, and they have
   changed since the version before if the trainer's have.
"""

import asyncio
import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infir2.engines.http_client import HttpClient
from infir2.engines.remote import (
    PublishedWeights,
    WeightProbe,
    WeightsDifferError,
    reading_answer,
)
from infir2.engines.sglang_checksum import fused_parameters
from infir2.errors import ConfigError

GENERATE = "/inference/v1/generate"
MAX_PROBE_DIFFERENCE = 0.25  # mean |difference| of log-probabilities


class WeightProof:
    """Proves one publish after another of a server; remembers the probe in between."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http
        self._before: tuple[np.ndarray, np.ndarray] | None = None  # the trainer's, the server's

    async def prove(self, weights: PublishedWeights) -> None:
        """Raises WeightsDifferError for weights that are not `weights`."""
        answer = await self._http.get("/weight_info")
        with reading_answer(self._http.url):
            held = str(answer["weight_version"])
        if held != str(weights.policy_version):
            raise self._differ(f"its weights are version {held}, not {weights.policy_version}")
        await self._check_digests(weights)
        if weights.probe is not None:
            await self._check_probe(weights.probe)

    async def _check_digests(self, weights: PublishedWeights) -> None:
        answer = await self._http.post("/collective_rpc", {"method": "infir2_digests"})
        with reading_answer(self._http.url):
            ranks = [
                (rank["tp_rank"], rank["tp_size"], rank["digests"]) for rank in answer["results"]
            ]
        for tp_rank, tp_size, held in ranks:
            expected = await asyncio.to_thread(_digests, weights, tp_rank, tp_size)
            names = sorted(n for n in expected if held.get(n) not in (expected[n], "quantized"))
            if names:
                raise self._differ(
                    f"{names[0]} and {len(names) - 1} more are not those of "
                    f"{weights.directory} (rank {tp_rank} of {tp_size})"
                )

    async def _check_probe(self, probe: WeightProbe) -> None:
        num_cached, _ = await self._probe(probe, {})
        if num_cached:
            raise self._differ(f"its cache has {num_cached} tokens of a prompt; it was not reset")
        _, logprobs = await self._probe(probe, {"prompt_logprobs": 0})
        difference = float(np.abs(logprobs - probe.logprobs).mean())
        if not difference <= MAX_PROBE_DIFFERENCE:
            raise self._differ(
                f"the log-probabilities of a fixed prompt differ by {difference:.3g} on average "
                f"from the trainer's (at most {MAX_PROBE_DIFFERENCE})"
            )
        before = self._before
        if before and _moved(before[0], probe.logprobs) and not _moved(before[1], logprobs):
            raise self._differ("it computes what it computed with the weights before")
        self._before = probe.logprobs, logprobs

    async def _probe(self, probe: WeightProbe, more: dict[str, Any]) -> tuple[int, np.ndarray]:
        """(tokens of the prompt that were in the cache, log-probabilities of the prompt)."""
        sampling = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
        body = {"token_ids": probe.token_ids, "sampling_params": sampling | more}
        answer = await self._http.post(GENERATE, body)
        with reading_answer(self._http.url):
            details = answer["usage"]["prompt_tokens_details"]
            entries = (answer["prompt_logprobs"] or [None])[1:]
            tokens = zip(entries, probe.token_ids[1:], strict=False)
            values = [entry[str(token)]["logprob"] for entry, token in tokens]
        if details is None:
            raise ConfigError(
                f"{self._http.url}: start vLLM with --enable-prompt-tokens-details; without it "
                "nothing shows that its cache was reset after new weights."
            )
        return int(details["cached_tokens"] or 0), np.array(values, dtype=np.float32)

    def _differ(self, problem: str) -> WeightsDifferError:
        return WeightsDifferError(f"{self._http.url}: {problem}")


def _moved(before: np.ndarray, after: np.ndarray) -> bool:
    return not np.array_equal(before, after)


@lru_cache(maxsize=4)
def _digests(weights: PublishedWeights, tp_rank: int, tp_size: int) -> dict[str, str]:
    """As `Infir2Worker.infir2_digests` of a rank that holds `weights`."""
    parameters = fused_parameters(weights, tp_rank, tp_size, torch.device("cpu"))
    digests = {name: _sha256(make()) for name, make in parameters.items()}
    digests.setdefault("lm_head.weight", digests["model.embed_tokens.weight"])
    return digests


def _sha256(tensor: Tensor) -> str:
    values = (tensor.t() if tensor.dim() == 2 else tensor).contiguous() + 0  # -0 counts as 0
    raw: Any = values.reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()
