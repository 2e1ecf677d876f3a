"""The native engine: batched generation with a KV cache and continuous batching, on the trainer's own decoder.

It runs the exported weights (FP8 codes, no masters). On a CPU a token's log-probability is the trainer's to the last bit,
because every forward sum is in FP64 (docs/numerics.md): batch, chunk and cache do not matter.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from infir2.engines.kv_cache import KvCache, cached_hidden_states
from infir2.engines.sampling import sample, uniforms
from infir2.engines.types import Completion, Ended, Request, SamplingParams
from infir2.model import Decoder
from infir2.model.hf_names import exported_fp8_weights, load_weights, weights_digest
from infir2.numerics import head_logits

PREFILL_TOKENS = 4096  # prompt tokens in one forward pass, so that memory stays bounded


@dataclass
class _Running:
    """A sequence that occupies a slot of the cache."""

    index: int  # of its request
    request: Request
    slot: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the newest generated token stands."""
        return len(self.request.token_ids) + len(self.token_ids) - 1


class NativeEngine:
    """An `Engine` in this process. `policy_version` is that of the weights it holds."""

    def __init__(self, model: Decoder, max_running_requests: int, policy_version: int = 0) -> None:
        self.model = model.eval().requires_grad_(False)
        self.policy_version, self.shared = policy_version, False
        self._max_running = max_running_requests

    @classmethod
    def from_hf(
        cls,
        directory: Path,
        max_running_requests: int,
        compute_dtype: torch.dtype,
        device: torch.device,
    ) -> "NativeEngine":
        """Serve an exported Hugging Face directory, FP8 or BF16. Errors: CheckpointError."""
        return cls(
            Decoder.from_hf(directory, compute_dtype=compute_dtype).to(device), max_running_requests
        )

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """One completion per request, in order."""
        completions = dict(chain.from_iterable(self.stream(requests, params)))
        return [completions[i] for i in range(len(requests))]

    @torch.inference_mode()
    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[list[Ended]]:
        """As `Engine`, once a token. A freed slot is taken by the next waiting request at once."""
        if not requests:
            return
        num_slots = min(self._max_running, len(requests))
        longest = max(len(request.token_ids) for request in requests) + params.max_tokens
        cache = KvCache(
            self.model.config,
            num_slots,
            longest,
            self.model.compute_dtype,
            self.model.head_weight.device,
        )
        # longest prompts first: similar lengths stay together, which keeps padding small
        waiting = sorted(range(len(requests)), key=lambda i: len(requests[i].token_ids))
        free, running = list(range(num_slots)), list[_Running]()
        while waiting or running:
            admitted = self._admit(requests, waiting, free)
            for sequences in (admitted, running):
                if sequences:
                    self._advance(sequences, cache, params)
            running += admitted
            finished = [s for s in running if self._finished(s, params)]
            for sequence in finished:
                running.remove(sequence)
                free.append(sequence.slot)
            yield [(sequence.index, self._complete(sequence, params)) for sequence in finished]

    @torch.inference_mode()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Load weights under their exported names (FP8 pairs stay FP8). No cache outlives a `generate`, so none is stale."""
        load_weights(self.model, weights)
        self.policy_version = policy_version

    def weights_digest(self) -> dict[str, str]:
        """sha256 of each weight's bytes by exported name."""
        return weights_digest(exported_fp8_weights(self.model))

    def _admit(
        self, requests: Sequence[Request], waiting: list[int], free: list[int]
    ) -> list[_Running]:
        admitted, tokens = list[_Running](), 0
        while (
            waiting
            and free
            and (not admitted or tokens + len(requests[waiting[-1]].token_ids) <= PREFILL_TOKENS)
        ):
            index = waiting.pop()
            tokens += len(requests[index].token_ids)
            admitted.append(_Running(index, requests[index], free.pop()))
        return admitted

    def _advance(self, sequences: list[_Running], cache: KvCache, params: SamplingParams) -> None:
        """One forward pass over what each sequence has not yet put into the cache, and one new token for each."""
        new = [s.token_ids[-1:] or list(s.request.token_ids) for s in sequences]
        lengths = np.array([len(tokens) for tokens in new])
        ends = np.cumsum(lengths)
        last = np.array([s.position for s in sequences])
        positions = np.concatenate(
            [
                np.arange(end - length + 1, end + 1)
                for end, length in zip(last, lengths, strict=True)
            ]
        )
        device = self.model.head_weight.device
        hidden = cached_hidden_states(
            self.model,
            cache,
            torch.tensor([s.slot for s in sequences], device=device),
            torch.tensor([token for tokens in new for token in tokens], device=device),
            torch.from_numpy(positions).to(device),
            torch.from_numpy(np.concatenate([[0], ends])).to(device, torch.int32),
        )
        logits = head_logits(hidden[torch.from_numpy(ends - 1).to(device)], self.model.head_weight)
        keys = np.array([s.request.key for s in sequences], dtype=np.uint64)
        draws = uniforms(keys, np.array([len(s.token_ids) for s in sequences]))
        chosen, logprobs = sample(logits, params.temperature, params.top_p, draws)
        for sequence, token, logprob in zip(
            sequences, chosen.tolist(), logprobs.tolist(), strict=True
        ):
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)

    def _finished(self, sequence: _Running, params: SamplingParams) -> bool:
        return (
            sequence.token_ids[-1] in params.stop_ids
            or len(sequence.token_ids) >= params.max_tokens
        )

    def _complete(self, sequence: _Running, params: SamplingParams) -> Completion:
        finish: Literal["stop", "length"] = "length"
        if sequence.token_ids[-1] in params.stop_ids:
            finish = "stop"
        logprobs = np.array(sequence.logprobs, dtype=np.float32)
        return Completion(
            sequence.request.id, sequence.token_ids, logprobs, finish, self.policy_version
        )
