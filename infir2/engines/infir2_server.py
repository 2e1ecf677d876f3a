"""Client of `infir2 serve --weight-updates`: exact rollouts from processes of their own.

Such a server generates with the native engine, from the key of each request, so on a CPU its
responses and log-probabilities are those of the trainer's process to the last bit.
"""

import sys
from collections.abc import Sequence

from infir2.config.schema import RolloutSection
from infir2.engines.http_client import HttpClient
from infir2.engines.remote import (
    BadAnswerError,
    PublishedWeights,
    ServerInfo,
    WeightsDifferError,
    checked_completion,
    reading_answer,
    requiring_route,
)
from infir2.engines.server_process import Place, ServerCommand, write_private
from infir2.engines.types import Completion, Request


class Infir2Client:
    """An `EngineClient`."""

    def __init__(self, url: str, api_key: str) -> None:
        self._http = HttpClient(url, api_key)
        self.url = self._http.url

    async def info(self) -> ServerInfo:
        """As `EngineClient`."""
        with requiring_route(
            f"{self.url}: this infir2 serve has no routes for a trainer; start it with "
            "--weight-updates and --api-key-file."
        ):
            answer = await self._http.get("/infir2/info")
        with reading_answer(self.url):
            return ServerInfo(
                release="infir2",
                model=str(answer.get("model") or ""),
                scale_format=answer.get("scale_format") or "none",
                max_positions=answer.get("max_positions"),
                max_running_requests=answer.get("max_running_requests"),
                tokenizer_sha256=answer.get("tokenizer_sha256") or "",
            )

    async def check_health(self) -> None:
        """As `EngineClient`: the server says so once it has generated a token."""
        with requiring_route(f"{self.url} is no infir2 serve: it has no route /health."):
            await self._http.get("/health")

    async def generate(self, request: Request, policy_version: int) -> Completion:
        """As `EngineClient`."""
        params = request.params
        body = {
            "id": request.id,
            "token_ids": list(request.token_ids),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_tokens,
            "stop_ids": list(params.stop_ids),
            "key": str(request.key),  # 64 bits, more than a JSON number keeps
            "policy_version": policy_version,
        }
        try:
            answer = await self._http.post("/infir2/generate", body)
        except BadAnswerError as error:
            if error.status == 409:
                raise BadAnswerError("version", f"{self.url} has other weights") from error
            raise
        with reading_answer(self.url):
            version = answer["policy_version"]
            token_ids, logprobs = list(answer["token_ids"]), list(answer["logprobs"])
        if version != policy_version:
            raise BadAnswerError("version", f"{self.url} answers with weights {version}")
        return checked_completion(request, token_ids, logprobs, policy_version)

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """As `EngineClient`."""
        await self._http.post("/infir2/cancel", {"ids": list(request_ids)})

    async def update_weights(self, weights: PublishedWeights) -> None:
        """As `EngineClient`."""
        body = {"directory": str(weights.directory), "policy_version": weights.policy_version}
        await self._http.post("/infir2/update_weights", body)

    async def prove_weights(self, weights: PublishedWeights) -> None:
        """As `EngineClient`: the SHA-256 of every tensor."""
        answer = await self._http.get("/infir2/weights_digest")
        with reading_answer(self.url):
            held = answer.get("digest", answer)
            differing = dict(held.items() ^ weights.digests.items())
        if differing:
            raise WeightsDifferError(f"{self.url}: {min(differing)} is not the trainer's")

    async def close(self) -> None:
        """As `EngineClient`."""
        await self._http.close()


def infir2_command(rollout: RolloutSection, place: Place) -> ServerCommand:
    """How to start `infir2 serve`."""
    key_file = place.directory / "key"
    write_private(key_file, place.api_key)
    arguments = [
        *(rollout.python or sys.executable, "-m", "infir2", "serve", rollout.model),
        *("--host", place.host, "--port", str(place.port), "--api-key-file", str(key_file)),
        *("--max-running-requests", str(rollout.max_running_requests)),
        "--weight-updates",
    ]
    if rollout.cache_gib:
        arguments += ["--cache-gib", str(rollout.cache_gib)]
    return ServerCommand([*arguments, *rollout.server_options], keeps_packages=True)
