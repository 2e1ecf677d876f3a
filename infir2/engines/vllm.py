"""Client of vLLM: token ids in and out, weights from a directory, through its routes for RL.

Measured with 0.32.0. Those routes exist with VLLM_SERVER_DEV_MODE=1 in its environment, the one for
tokens with --enable-scale-out (`vllm_command` sets both). What vLLM does not say of itself is made
sure of here:

- Its key guards /v1 and /inference only, not the routes that change weights: the middleware in
  `inside_vllm` guards all.
- A reload on a CPU leaves the old LM head if embeddings are tied: `infir2_worker.py` reloads it.
- On a CPU with AMX the first request kills it if its prompt is short: the health check has a long
  one.
- A reload that fails leaves neither the old weights nor the new ones, and /health stays 200: the
  server must not be used any more.
- Keys and values that old weights computed stay in the prefix cache after a reload. The cache is
  reset, and every request has the version as its cache salt, so that one that stayed is not read.
- A paused server lets requests wait for ever: whatever happens, an update ends with /resume.
"""

import contextlib
import urllib.parse
from collections.abc import Sequence
from typing import Any

from infir2.engines.http_client import HttpClient, is_loopback
from infir2.engines.remote import (
    BadAnswerError,
    EngineError,
    PublishedWeights,
    ServerInfo,
    checked_completion,
    reading_answer,
    requiring_route,
)
from infir2.engines.types import Completion, Request
from infir2.engines.vllm_proof import GENERATE, WeightProof
from infir2.errors import ConfigError

ID_PREFIX = "generate-tokens-"  # of a request's id inside vLLM
MAX_TEMPERATURE = 2.0
LOGPROBS_MODE = "processed_logprobs"
WORKER_EXTENSION = "infir2_worker.Infir2Worker"
HEALTH_TOKENS = 64
OLDEST_RELEASE = "0.32"


class VllmClient:
    """An `EngineClient`."""

    def __init__(self, url: str, api_key: str) -> None:
        self._http = HttpClient(url, api_key)
        self.url = self._http.url
        self._proof = WeightProof(self._http)
        self._is_asleep = False

    async def info(self) -> ServerInfo:
        """As `EngineClient`."""
        config = await self._config()
        with reading_answer(self.url):
            release = (await self._http.get("/version"))["version"]
            model, scheduler = config["model_config"], config["scheduler_config"]
            info = ServerInfo(
                release=f"vllm {release}",
                model=str(model["model"]),
                scale_format=None if model["quantization"] else "none",
                max_positions=model["max_model_len"],
                max_running_requests=scheduler["max_num_seqs"],
            )
            mode, extension = (
                model["logprobs_mode"],
                config["parallel_config"]["worker_extension_cls"],
            )
        if mode != LOGPROBS_MODE:
            raise ConfigError(
                f"{self.url}: its log-probabilities are {mode}, which ignore the temperature; "
                f"start vLLM with --logprobs-mode {LOGPROBS_MODE}."
            )
        if extension != WORKER_EXTENSION:
            raise ConfigError(
                f"{self.url}: nothing can prove which weights it has; start vLLM with "
                f"--worker-extension-cls {WORKER_EXTENSION}, as docs/engines.md shows."
            )
        await self._check_guarded()
        return info

    async def check_health(self) -> None:
        """As `EngineClient`: by a token, because /health is 200 when no request can succeed."""
        one_token = {"max_tokens": 1, "temperature": 0.0}
        with requiring_route(
            f"{self.url} has no route {GENERATE}: it is no vLLM, or one older than "
            f"{OLDEST_RELEASE}; install that or a newer one."
        ):
            await self._generate("health", [1] * HEALTH_TOKENS, one_token)

    async def generate(self, request: Request, policy_version: int) -> Completion:
        """As `EngineClient`. With top_p below 1, the log-probabilities are those after it."""
        if request.params.temperature > MAX_TEMPERATURE:
            raise ConfigError(
                f"temperature {request.params.temperature:g}: vLLM samples at "
                f"{MAX_TEMPERATURE:g} at most."
            )
        sampling, version = sampling_params(request), str(policy_version)
        choice = await self._generate(request.id, request.token_ids, sampling, version)
        with reading_answer(self.url):
            token_ids = list(choice["token_ids"])
            logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            versions = {span["version"] for span in choice["weight_versions"] or ()}
        if choice["finish_reason"] == "abort":
            raise EngineError("canceled", f"{self.url}: request {request.id} was ended there")
        if versions != {version}:
            held = ", ".join(sorted(versions))
            raise BadAnswerError("version", f"{self.url} answers with weights {held or 'unnamed'}")
        return checked_completion(request, token_ids, logprobs, policy_version)

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """As `EngineClient`."""
        ids = [ID_PREFIX + request_id for request_id in request_ids]
        if ids:  # without any, vLLM ends all requests
            await self._http.post("/abort_requests", {"request_ids": ids})

    async def update_weights(self, weights: PublishedWeights) -> None:
        """As `EngineClient`."""
        await self._http.post("/pause?mode=abort", {})
        try:
            await self._wake("weights")
            await self._reload(weights)
            await self._wake("kv_cache")
            self._is_asleep = False
        except EngineError:
            with contextlib.suppress(EngineError):
                await self._http.post("/resume", {})
            raise
        await self._http.post("/resume", {})

    async def sleep(self) -> None:
        """As `SleepingClient`. Level 2 keeps no copy of the weights, which come anew."""
        await self._http.post("/sleep?level=2", {})
        self._is_asleep = True

    async def prove_weights(self, weights: PublishedWeights) -> None:
        """As `EngineClient`: see `vllm_proof`."""
        await self._proof.prove(weights)

    async def close(self) -> None:
        """As `EngineClient`."""
        await self._http.close()

    async def _wake(self, part: str) -> None:
        if self._is_asleep:
            await self._http.post(f"/wake_up?tags={part}", {})

    async def _config(self) -> dict[str, Any]:
        with requiring_route(
            f"{self.url}: vLLM's routes for RL are off; start it with VLLM_SERVER_DEV_MODE=1 in "
            "its environment."
        ):
            answer = await self._http.get("/server_info?config_format=json")
        with reading_answer(self.url):
            config: dict[str, Any] = answer["vllm_config"]
            return config

    async def _check_guarded(self) -> None:
        """Raise ConfigError if whoever reaches the server over a network can change its weights."""
        if is_loopback(urllib.parse.urlsplit(self.url).hostname or ""):
            return
        anonymous = HttpClient(self.url)
        try:
            await anonymous.get("/is_paused")
        except ConfigError:
            return
        finally:
            await anonymous.close()
        raise ConfigError(
            f"{self.url}: vLLM's own key guards only /v1 and /inference, and anyone who reaches it "
            "can replace its weights; start it with the middleware of docs/engines.md."
        )

    async def _reload(self, weights: PublishedWeights) -> None:
        arguments = {"directory": str(weights.directory)}
        body = {"method": "infir2_reload", "kwargs": arguments}
        try:
            await self._http.post("/collective_rpc", body)
        except BadAnswerError as error:
            raise EngineError("reload", f"{error}; it holds no whole weights now") from error
        answer = await self._http.post("/reset_prefix_cache", {})
        with reading_answer(self.url):
            if not answer["success"]:
                raise EngineError("cache", f"{self.url}: the prefix cache was not reset")
        version = {"new_version": str(weights.policy_version)}
        await self._http.post("/update_weight_version", version)

    async def _generate(
        self, request_id: str, token_ids: Sequence[int], sampling: dict[str, Any], salt: str = ""
    ) -> dict[str, Any]:
        """The first choice of the answer."""
        body = {
            "request_id": request_id,
            "token_ids": list(token_ids),
            "sampling_params": {"logprobs": 0, "detokenize": False} | sampling,
        }
        try:
            answer = await self._http.post(GENERATE, body | ({"cache_salt": salt} if salt else {}))
        except BadAnswerError as error:
            if error.status != 403:
                raise
            raise ConfigError(
                f"{self.url}: its route for token ids is off; start vLLM with --enable-scale-out."
            ) from error
        with reading_answer(self.url):
            choice: dict[str, Any] = answer["choices"][0]
            return choice


def sampling_params(request: Request) -> dict[str, Any]:
    """vLLM's parameters for a request, whose stop ids alone end it before its length."""
    params = request.params
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "stop_token_ids": list(params.stop_ids),
        "ignore_eos": True,
        "seed": request.key >> 1,  # 63 bits; -1 would be no seed
    }
