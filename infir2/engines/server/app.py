"""The ASGI application: routes, errors, access."""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response

from infir2.engines.server.access import Access
from infir2.engines.server.errors import add_error_handlers, json_response
from infir2.engines.server.openai_routes import openai_routes
from infir2.engines.server.served import Served
from infir2.engines.server.trainer_routes import trainer_routes

STOP_SECONDS = 1.5  # for the engine's step in progress


def build_app(
    served: Served,
    key: str = "",
    hosts: Collection[str] = (),
    weight_updates: bool = False,
    origins: Collection[str] = (),
) -> FastAPI:
    """The application; its lifespan starts and ends the driver of `served`.

    `key` and `hosts` as in `Access`. `weight_updates` adds the trainer's routes. Pages of `origins`
    may use the server from a browser.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        served.driver.start()
        yield
        served.driver.close(STOP_SECONDS)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    add_error_handlers(app)
    app.add_middleware(Access, key=key, hosts=hosts)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )

    @app.get("/health")
    async def health() -> Response:
        served.require_ready()
        return json_response({"status": "ready"})

    app.include_router(openai_routes(served))
    if weight_updates:
        app.include_router(trainer_routes(served))
    return app
