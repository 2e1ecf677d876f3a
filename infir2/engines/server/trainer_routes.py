"""The routes that a trainer uses: token ids in and out, and new weights (`--weight-updates`).

Log-probabilities are written so that they read back as the same float32. A request names the
version of the weights that it wants; the answer to another version is 409.
"""

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from infir2.engines.server.checks import check_tokens
from infir2.engines.server.connection import while_connected
from infir2.engines.server.errors import ApiError, json_response
from infir2.engines.server.served import Served
from infir2.engines.types import Completion, SamplingParams, UpdatableEngine
from infir2.engines.types import Request as EngineRequest
from infir2.errors import CheckpointError, ConfigError


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerateBody(_Body):
    """One response to generate, as `infir2.engines.types.Request`; `key` is a decimal number."""

    id: Annotated[str, Field(min_length=1, max_length=1000)]
    token_ids: Annotated[list[int], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)]
    stop_ids: list[int] = []
    key: Annotated[str, Field(pattern=r"^[0-9]{1,20}$")]
    policy_version: int


class CancelBody(_Body):
    ids: list[str]


class UpdateBody(_Body):
    """`directory`: absolute path of an exported Hugging Face directory on this machine."""

    directory: str
    policy_version: Annotated[int, Field(ge=0)]


def trainer_routes(served: Served) -> APIRouter:
    """Routes below /infir2."""
    router, driver = APIRouter(prefix="/infir2"), served.driver

    @router.post("/generate")
    async def generate(body: GenerateBody, http: Request) -> Response:
        served.require_ready()
        request = _engine_request(body)
        check_tokens(served, request, "token_ids")
        work = driver.complete(request, body.policy_version)
        try:
            return _answer(await while_connected(http, work))
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    @router.post("/cancel")
    async def cancel(body: CancelBody) -> Response:
        driver.cancel(body.ids)
        return json_response({})

    @router.post("/update_weights")
    async def update_weights(body: UpdateBody) -> Response:
        served.require_ready()
        directory = Path(body.directory)
        if not directory.is_absolute():
            raise ApiError(400, f"directory: {directory} is not absolute", param="directory")

        def update(engine: UpdatableEngine) -> dict[str, str]:
            driver.cancel_all()
            engine.update_from_directory(directory, body.policy_version)
            return engine.weights_digest()

        try:
            return json_response({"digest": await driver.call(update)})
        except (CheckpointError, ConfigError) as error:
            raise ApiError(400, f"{error}; the old weights stay", param="directory") from error

    @router.get("/weights_digest")
    async def weights_digest() -> Response:
        served.require_ready()
        return json_response(await driver.call(lambda engine: engine.weights_digest()))

    @router.get("/info")
    async def info() -> Response:
        served.require_ready()
        return json_response(await driver.call(lambda engine: _info(served, engine)))

    return router


def _engine_request(body: GenerateBody) -> EngineRequest:
    if int(body.key) >= 2**64:
        raise ApiError(400, "key has more than 64 bits", param="key")
    params = SamplingParams(body.temperature, body.max_tokens, tuple(body.stop_ids), body.top_p)
    return EngineRequest(body.id, body.token_ids, params, int(body.key))


def _answer(completion: Completion) -> Response:
    if not np.isfinite(completion.rollout_logprobs).all():
        raise ApiError(500, "a log-probability is not finite: the weights are unusable")
    return json_response(
        {
            "token_ids": completion.token_ids,
            "logprobs": completion.rollout_logprobs.tolist(),
            "finish": completion.finish,
            "policy_version": completion.policy_version,
        }
    )


def _info(served: Served, engine: UpdatableEngine) -> dict[str, Any]:
    tokenizer_file = served.tokenizer.directory / "tokenizer.json"
    return {
        "model": served.name,
        "policy_version": engine.policy_version,
        "scale_format": engine.scale_format,
        "max_positions": served.max_positions,
        "max_running_requests": engine.max_running_requests,
        "cache_tokens": engine.cache_tokens,
        "tokenizer_sha256": sha256(tokenizer_file.read_bytes()).hexdigest(),
    }
