"""A key on every route of vLLM: its own key guards only paths that begin with /v1 or /inference.

Without it any process of the machine could replace the weights of a server that RL uses
(`/collective_rpc`, `/update_weights`), pause it or end its requests.
"""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class RequireKey:
    """ASGI middleware: 401 for an HTTP request whose bearer token is not VLLM_API_KEY."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "http" and hmac.compare_digest(given, self._expected):
            return await self._app(scope, receive, send)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})
        else:
            await send({"type": "websocket.close", "code": 1008})
