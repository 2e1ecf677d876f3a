"""Client of an SGLang server, releases 0.5.12 to 0.5.23, by its native routes.

Without SGLANG_RETURN_ORIGINAL_LOGPROB its `output_token_logprobs` are the logarithm of the softmax
at the sampling temperature, before top-p (`layers/sampler.py`): our `rollout_logprobs`.
"""

import asyncio
import json
import os
import secrets
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from infir2.config.schema import RolloutSection
from infir2.engines.http_client import HttpClient
from infir2.engines.remote import (
    BadAnswerError,
    EngineError,
    PublishedWeights,
    ServerInfo,
    WeightProbe,
    WeightsDifferError,
    checked_completion,
    reading_answer,
    requiring_route,
)
from infir2.engines.server_process import Place, ServerCommand, write_private
from infir2.engines.sglang_batches import SglangBatches
from infir2.engines.sglang_checksum import checksums, differing
from infir2.engines.sglang_weights import SglangWeights
from infir2.engines.types import Completion, Request
from infir2.errors import ConfigError
from infir2.model.safetensors_io import read_json

ROUTES = {
    *("/generate", "/health_generate", "/server_info", "/abort_request", "/flush_cache"),
    *("/update_weights_from_disk", "/weights_checker"),
}
OLDEST_RELEASE = "0.5.12"
SPARE_POSITIONS = 8  # SGLang cuts a response short that would fill its context
MAX_PROBE_DIFFERENCE = 0.5  # mean |difference| of log-probabilities; wrong weights have several
COLD = 0.02  # a temperature at which the likeliest token is nearly certain
_ONE_GREEDY_TOKEN: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0.0}
RESERVED_TOKENS = 4  # a request may have so many more than `max_req_input_len` (tp_worker.py)


class SglangClient:
    """An `EngineClient`."""

    incremental = False  # whether a stream's events have what is new, or all until then

    def __init__(self, url: str, api_key: str) -> None:
        self._http = HttpClient(url, api_key)
        self.url = self._http.url
        self._batches = SglangBatches(self._http)
        self._weights = SglangWeights(self._http)
        self._ranks: list[tuple[int, int]] = []  # the server's, after the first proof
        self._server_ids: dict[str, str] = {}  # of the requests in flight, by our id

    async def info(self) -> ServerInfo:
        """As `EngineClient`."""
        answer = await self._http.get("/server_info")
        with reading_answer(self.url):
            release, state = str(answer["version"]), answer["internal_states"][0]
            running = state.get("effective_max_running_requests_per_dp")
            info = ServerInfo(
                release=f"sglang {release}",
                model=str(answer["model_path"]),
                max_positions=int(answer["max_req_input_len"]) + RESERVED_TOKENS,
                max_running_requests=running or answer.get("max_running_requests"),
            )
        if answer.get("incremental_streaming_output") and not self.incremental:
            raise ConfigError(
                f"{self.url}: its streams have parts of a response; start SGLang without "
                "--incremental-streaming-output."
            )
        await self._check_routes(release)
        await self._check_temperature()
        return info

    async def check_health(self) -> None:
        """As `EngineClient`: the route answers once a token was generated."""
        with requiring_route(
            f"{self.url} has no route /health_generate: it is no SGLang, or one older than "
            f"{OLDEST_RELEASE}; install that or a newer one."
        ):
            await self._http.get("/health_generate")

    async def generate(self, request: Request, policy_version: int) -> Completion:
        """As `EngineClient`."""
        # An aborted request keeps its id for seconds: each attempt has one of its own.
        server_id = f"{request.id}#{secrets.token_hex(4)}"
        self._server_ids[request.id] = server_id
        params = sampling_params(request)
        try:
            answer = await self._batches.generate(server_id, list(request.token_ids), params)
        except EngineError:
            self._server_ids.pop(request.id, None)
            raise
        self._server_ids.pop(request.id, None)  # after a cancellation `cancel` needs it
        with reading_answer(self.url):
            meta, token_ids = answer["meta_info"], list(map(int, answer["output_ids"]))
            entries = meta["output_token_logprobs"]
            logprobs = list(map(itemgetter(0), entries))
            named_ids = list(map(itemgetter(1), entries))
            version, reason = meta["weight_version"], meta["finish_reason"]
        if version != str(policy_version):
            raise BadAnswerError("version", f"{self.url} answers with weights {version!r}")
        if isinstance(reason, dict) and reason.get("type") == "abort":
            raise BadAnswerError("aborted", f"{self.url} aborted request {request.id}: {reason}")
        if named_ids != token_ids:
            raise BadAnswerError("logprobs", f"{self.url}: log-probabilities of other tokens")
        return checked_completion(request, token_ids, logprobs, policy_version)

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """As `EngineClient`."""
        server_ids = [self._server_ids.pop(request_id, "") for request_id in request_ids]
        aborts = (self._http.post("/abort_request", {"rid": each}) for each in server_ids if each)
        await asyncio.gather(*aborts)

    async def update_weights(self, weights: PublishedWeights) -> None:
        """As `EngineClient`: see `sglang_weights`."""
        await self._weights.update(weights)

    async def sleep(self) -> None:
        """As `SleepingClient`."""
        await self._weights.sleep()

    async def prove_weights(self, weights: PublishedWeights) -> None:
        """As `EngineClient`: the checksum of every parameter on every rank."""
        asked = self._weights.succeed("/weights_checker", {"action": "checksum"})
        answer, _ = await asyncio.gather(asked, self._compute_checksums(weights))
        with reading_answer(self.url):
            ranks = [
                (place["tp_rank"], place["tp_size"], rank["checksums"])
                for rank in answer["ranks"]
                if (place := rank["parallelism_info"]).get("role", "target") == "target"
            ]
            size = max(size for _, size, _ in ranks)
            if {rank for rank, _, _ in ranks} != set(range(size)):
                raise WeightsDifferError(f"{self.url}: not every rank told its checksums")
        self._ranks = [(tp_rank, tp_size) for tp_rank, tp_size, _ in ranks]
        for tp_rank, tp_size, held in ranks:
            names = await asyncio.to_thread(differing, held, weights, tp_rank, tp_size)
            if names:
                raise WeightsDifferError(
                    f"{self.url}: {names[0]} and {len(names) - 1} more are not the trainer's "
                    f"(rank {tp_rank} of {tp_size})"
                )
        if weights.probe is not None:
            await self._check_probe(weights.probe)

    async def close(self) -> None:
        """As `EngineClient`."""
        await self._batches.close()
        await self._weights.close()
        await self._http.close()

    async def _compute_checksums(self, weights: PublishedWeights) -> None:
        """Ours, while the server computes its own; they are kept for the comparison."""
        for tp_rank, tp_size in self._ranks:
            await asyncio.to_thread(checksums, weights, tp_rank, tp_size)

    async def _check_probe(self, probe: WeightProbe) -> None:
        """The cache was emptied, and a fixed prompt has the trainer's log-probabilities."""
        body = {"input_ids": probe.token_ids, "sampling_params": _ONE_GREEDY_TOKEN}
        first = await self._http.post("/generate", body)
        answer = await self._http.post(
            "/generate", body | {"return_logprob": True, "logprob_start_len": 0}
        )
        with reading_answer(self.url):
            num_cached = int(first["meta_info"]["cached_tokens"])
            entries = answer["meta_info"]["input_token_logprobs"][1:]
            logprobs = np.array([entry[0] for entry in entries], dtype=np.float32)
            difference = float(np.abs(logprobs - probe.logprobs).mean())
        if num_cached:
            raise WeightsDifferError(f"{self.url}: its cache still has {num_cached} old tokens")
        if not difference <= MAX_PROBE_DIFFERENCE:
            raise WeightsDifferError(
                f"{self.url}: the log-probabilities of a fixed prompt differ by {difference:.3g} "
                f"on average from the trainer's (at most {MAX_PROBE_DIFFERENCE})"
            )

    async def _check_temperature(self) -> None:
        """Raise ConfigError if the log-probabilities are those before the temperature."""
        for prompt in ([1], [2, 3], [5, 7, 11], [13, 4, 6, 8]):
            plain_token, plain = await self._first_token(prompt, 0.0)
            cold_token, cold = await self._first_token(prompt, COLD)
            if plain_token != cold_token or plain > -0.1:
                continue  # says nothing: near 1 both are 0
            if cold > plain / 2:
                return  # at a low temperature the likeliest token is nearly certain
            raise ConfigError(
                f"{self.url}: its log-probabilities are those before the temperature; start SGLang "
                "without SGLANG_RETURN_ORIGINAL_LOGPROB."
            )

    async def _first_token(self, prompt: list[int], temperature: float) -> tuple[int, float]:
        params = _ONE_GREEDY_TOKEN | {"temperature": temperature}
        body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
        answer = await self._http.post("/generate", body)
        with reading_answer(self.url):
            logprob, token = answer["meta_info"]["output_token_logprobs"][0][:2]
            return int(token), float(logprob)

    async def _check_routes(self, release: str) -> None:
        try:
            paths = (await self._http.get("/openapi.json"))["paths"]
        except (EngineError, LookupError, TypeError) as error:
            if isinstance(error, EngineError) and error.reason != "status":
                raise
            return  # DISABLE_OPENAPI_DOC; a route that is missing shows itself when it is used
        if missing := ROUTES - set(paths):
            raise ConfigError(
                f"{self.url}: SGLang {release} has no route {', '.join(sorted(missing))}; install "
                f"SGLang {OLDEST_RELEASE} or newer."
            )


def sampling_params(request: Request) -> dict[str, Any]:
    """SGLang's parameters; every one that could change the distribution is named."""
    params = request.params
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "max_new_tokens": params.max_tokens,
        "stop_token_ids": list(params.stop_ids),
        "ignore_eos": not params.stop_ids,  # it would ignore the stop ids too
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
    }


def sglang_command(rollout: RolloutSection, place: Place) -> ServerCommand:
    """How to start SGLang; the key is in a file, because it has no other option than arguments."""
    options = place.directory / "options.yaml"
    write_private(options, json.dumps({"api-key": place.api_key}))  # JSON is YAML
    max_positions = int(read_json(Path(rollout.model) / "config.json")["max_position_embeddings"])
    arguments = [
        *(rollout.python, "-m", "sglang.launch_server", "--config", str(options)),
        *("--model-path", str(Path(rollout.model).resolve()), "--skip-tokenizer-init"),
        *("--host", place.host, "--port", str(place.port)),
        *("--tp-size", str(rollout.tensor_parallel)),
        *("--max-running-requests", str(rollout.max_running_requests)),
        *("--context-length", str(max_positions + SPARE_POSITIONS)),
        *("--kv-cache-dtype", rollout.kv_cache_dtype),
    ]
    if rollout.memory_fraction:
        arguments += ["--mem-fraction-static", str(rollout.memory_fraction)]
    if rollout.sleep:
        # Weights come back from host memory: without that the scales of the KV cache, which are
        # no part of a checkpoint, are 0, and the next load from a directory ends SGLang.
        arguments += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
    variables = {
        "HF_HUB_OFFLINE": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        # Otherwise the port plus 10,000, and no start above port 55,535; nothing listens there.
        "SGLANG_GRPC_PORT": "1",
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "0",
        # SGLang would set 0, and NCCL needs the trainer's: the two share memory. -2 is NCCL's own.
        "NCCL_CUMEM_ENABLE": os.environ.get("NCCL_CUMEM_ENABLE", "-2"),
    }
    return ServerCommand([*arguments, *rollout.server_options], variables)
