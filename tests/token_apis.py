"""SGLang's and vLLM's routes for token ids, over our own engine.

What is in front of them can so be compared with the engine itself: same tokens, same
log-probabilities. As a script it takes the command line of either server.
"""

import argparse
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse

from infir2.engines.native import NativeEngine
from infir2.engines.server.access import Access
from infir2.engines.server.driver import EngineDriver
from infir2.engines.sglang import RESERVED_TOKENS, ROUTES
from infir2.engines.types import Completion, Request, SamplingParams, Tokens
from infir2.engines.vllm import ID_PREFIX

Driver = EngineDriver[NativeEngine]
Format = Callable[[Tokens, str | None], dict[str, Any]]


def sglang_app(driver: Driver, key: str, max_positions: int) -> FastAPI:
    """As SGLang 0.5.12 with --incremental-streaming-output."""
    app = _app(driver, key)

    @app.post("/generate")
    async def generate(body: dict[str, Any]) -> Response:
        params = body["sampling_params"]
        request = Request(
            body.get("rid", "warm-up"),
            body["input_ids"],
            SamplingParams(
                params["temperature"],
                params["max_new_tokens"],
                tuple(params.get("stop_token_ids", ())),
                params.get("top_p", 1.0),
                top_logprobs=body.get("top_logprobs_num", 0),
            ),
            params.get("sampling_seed", 0) << 1,
            streams=True,
        )
        return await _answer(
            driver, request, body.get("stream", False), params.get("stream_interval", 1), as_event
        )

    def as_event(tokens: Tokens, finish: str | None) -> dict[str, Any]:
        pairs = zip(tokens.logprobs, tokens.token_ids, strict=True)
        meta = {
            "output_token_logprobs": [[logprob, token, None] for logprob, token in pairs],
            "finish_reason": finish and {"type": finish},
            "weight_version": "0",
        }
        if tokens.top_logprobs:
            tops = [[[value, token, None] for token, value in top] for top in tokens.top_logprobs]
            meta["output_top_logprobs"] = tops
        return {"output_ids": tokens.token_ids, "meta_info": meta}

    @app.post("/abort_request")
    async def abort_request(body: dict[str, Any]) -> dict[str, Any]:
        driver.cancel([body["rid"]])
        return {}

    @app.get("/server_info")
    async def server_info() -> dict[str, Any]:
        return {
            "version": "0.5.12.post1",
            "model_path": "/m",
            "max_req_input_len": max_positions - RESERVED_TOKENS,
            "incremental_streaming_output": True,
            "internal_states": [{}],
        }

    @app.get("/health_generate")
    async def health() -> Response:
        return Response(status_code=200 if driver.is_ready else 503)

    @app.get("/openapi.json")
    async def openapi() -> dict[str, Any]:
        return {"paths": {path: {} for path in ROUTES}}

    return app


def vllm_app(driver: Driver, key: str, max_positions: int) -> FastAPI:
    """As vLLM 0.32.0 with our options."""
    app = _app(driver, key)

    @app.post("/inference/v1/generate")
    async def generate(body: dict[str, Any]) -> Response:
        params = body["sampling_params"]
        request = Request(
            ID_PREFIX + body["request_id"],
            body["token_ids"],
            SamplingParams(
                params["temperature"],
                params["max_tokens"],
                tuple(params.get("stop_token_ids", ())),
                params.get("top_p", 1.0),
                top_logprobs=min(20, params["logprobs"]),
            ),
            params.get("seed", 0) << 1,
            streams=True,
        )
        return await _answer(driver, request, body.get("stream", False), 1, as_choice)

    def as_choice(tokens: Tokens, finish: str | None) -> dict[str, Any]:
        tops = tokens.top_logprobs or [[] for _ in tokens.token_ids]
        content = []
        for token, logprob, top in zip(tokens.token_ids, tokens.logprobs, tops, strict=True):
            # The sampled token comes first, whatever its rank.
            pairs = [(token, logprob), *((i, value) for i, value in top if i != token)]
            entry = {"top_logprobs": [{"token_id": i, "logprob": value} for i, value in pairs]}
            content.append({"token_id": token, "logprob": logprob} | entry)
        choice = {"token_ids": tokens.token_ids, "logprobs": {"content": content}}
        return {"choices": [choice | {"finish_reason": finish, "weight_versions": []}]}

    @app.post("/abort_requests")
    async def abort_requests(body: dict[str, Any]) -> dict[str, Any]:
        driver.cancel(body["request_ids"])
        return {}

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": "0.32.0"}

    @app.get("/server_info")
    async def server_info() -> dict[str, Any]:
        model = {"model": "/m", "quantization": None, "max_model_len": max_positions}
        config = {
            "model_config": model | {"logprobs_mode": "processed_logprobs"},
            "scheduler_config": {"max_num_seqs": 8},
            "parallel_config": {"worker_extension_cls": "infir2_worker.Infir2Worker"},
        }
        return {"vllm_config": config}

    return app


APPS = {"sglang": sglang_app, "vllm": vllm_app}


def _app(driver: Driver, key: str) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        driver.start()
        yield
        driver.close(2)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_middleware(Access, key=key, hosts=())
    return app


async def _answer(
    driver: Driver, request: Request, streams: bool, interval: int, write: Format
) -> Response:
    parts = _parts(driver, request, interval if streams else 2**30)
    if not streams:
        tokens, finish = [part async for part in parts][-1]
        return JSONResponse(write(tokens, finish))

    async def events() -> AsyncIterator[bytes]:
        async for tokens, finish in parts:
            yield b"data: " + json.dumps(write(tokens, finish)).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def _parts(
    driver: Driver, request: Request, interval: int
) -> AsyncIterator[tuple[Tokens, str | None]]:
    """New tokens at least every `interval` tokens, and at the end with the reason."""
    new, num_sent = Tokens([], [], []), 0
    async with aclosing(driver.generate([request])) as events:  # type: ignore[type-var]
        async for _, event in events:
            if isinstance(event, Completion):
                start = num_sent + len(new.token_ids)
                logprobs = event.rollout_logprobs.tolist()[start:]
                event_tokens = Tokens(event.token_ids[start:], logprobs, event.top_logprobs[start:])
            else:
                event_tokens = event
            new = Tokens(
                new.token_ids + event_tokens.token_ids,
                new.logprobs + event_tokens.logprobs,
                [*new.top_logprobs, *event_tokens.top_logprobs],
            )
            if isinstance(event, Completion):
                yield new, event.finish
            elif len(new.token_ids) >= interval:
                yield new, None
                num_sent, new = num_sent + len(new.token_ids), Tokens([], [], [])


def main() -> None:
    """`-m sglang.launch_server ...` or `-P -m vllm.entrypoints.openai.api_server ...`."""
    import os

    import uvicorn

    from infir2.model import Decoder

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-P", action="store_true")
    parser.add_argument("-m", dest="module")
    for name in ("--config", "--model-path", "--model"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--port", type=int)
    options, others = parser.parse_known_args()
    kind = options.module.partition(".")[0]
    print(f"{kind}: {' '.join(others)}", file=sys.stderr, flush=True)
    if "--refuse" in others:
        sys.exit("the server refuses an option")
    key = os.environ.get("VLLM_API_KEY", "")
    if options.config:
        key = json.loads(options.config.read_text())["api-key"]
    model = Decoder.from_hf(options.model_path or options.model)
    driver = EngineDriver(lambda: NativeEngine(model, 8, cache_gib=0.01, keep_cache=True), 64)
    app = APPS[kind](driver, key, model.config.max_positions)
    uvicorn.run(app, port=options.port, log_config=None)


if __name__ == "__main__":
    main()
