"""OpenAI's API, and the numbers that Prometheus reads."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from infir2.engines.server.answer import Answer
from infir2.engines.server.choices import ChatForm, CompletionForm
from infir2.engines.server.errors import json_response
from infir2.engines.server.prompts import chat_prompt, completion_prompts
from infir2.engines.server.schema import ChatBody, CompletionBody
from infir2.engines.server.served import Served
from infir2.engines.types import ServedEngine

_METRICS = {
    "prompt_tokens_total": "tokens of answered prompts",
    "generated_tokens_total": "generated tokens",
    "requests_running": "requests that have a slot",
    "requests_waiting": "queued requests",
    "cache_tokens": "tokens that fit the KV cache",
    "cache_tokens_used": "tokens of pages in use",
    "policy_version": "version of the weights",
}
_COUNTERS = ("prompt_tokens_total", "generated_tokens_total")


def openai_routes(served: Served) -> APIRouter:
    """Routes below /v1, and /metrics."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        served.require_ready()
        return json_response({"object": "list", "data": [_model(served)]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        served.require_ready()
        served.require_model(name)
        return json_response(_model(served))

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        _check(served, body)
        prompts = [await chat_prompt(served, body)]
        return await Answer(served, body, prompts, ChatForm(served, body)).respond(http)

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        _check(served, body)
        prompts = await completion_prompts(served, body)
        return await Answer(served, body, prompts, CompletionForm(served, body)).respond(http)

    @router.get("/metrics")
    async def metrics() -> Response:
        served.require_ready()
        text = await served.driver.call(lambda engine: _metrics(served, engine))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _check(served: Served, body: ChatBody | CompletionBody) -> None:
    served.require_ready()
    served.require_model(body.model)
    body.check()


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "infir2",
        "max_model_len": served.context_tokens,
    }


def _metrics(served: Served, engine: ServedEngine) -> str:
    """Prometheus' text format."""
    counts, values = served.driver.counts, engine.gauges()
    values["requests_waiting"] = engine.num_unfinished - values["requests_running"]
    values["policy_version"] = engine.policy_version
    values |= {name: counts[name.removesuffix("_total")] for name in _COUNTERS}
    lines = [
        f"# HELP infir2_{name} {text}\n"
        f"# TYPE infir2_{name} {'counter' if name in _COUNTERS else 'gauge'}\n"
        f"infir2_{name} {values[name]}"
        for name, text in _METRICS.items()
        if name in values
    ]
    name = "infir2_requests_total"
    lines.append(f"# HELP {name} responses by how they ended\n# TYPE {name} counter")
    for reason in ("finished_stop", "finished_length", "canceled"):
        label = reason.removeprefix("finished_")
        lines.append(f'{name}{{finish="{label}"}} {counts[reason]}')
    return "\n".join(lines) + "\n"
