"""Who may use a server, and how large a request may be."""

import re
import secrets
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infir2.engines.server.errors import ApiError, error_response

MAX_BODY_BYTES = 2**24
_PORT = re.compile(r":[0-9]*$")
OPEN_PATHS = ("/health",)


class Access:
    """ASGI middleware: refuses requests without the key, and bodies above MAX_BODY_BYTES.

    Args:
        app: answers the other requests.
        key: required as `Authorization: Bearer KEY`, but for OPEN_PATHS; empty: none is required.
        hosts: accepted in the header Host, without the port; empty: all. Without a key, a page in a
            browser could otherwise reach the server by a name of its own that resolves to loopback.
    """

    def __init__(self, app: ASGIApp, key: str, hosts: Collection[str]) -> None:
        self._app, self._key, self._hosts = app, key.encode(), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := self._refusal(scope["path"], Headers(scope=scope)):
            await error_response(refusal)(scope, receive, send)
        else:
            await self._app(scope, _bounded(receive), send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        host = _PORT.sub("", headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            return ApiError(403, "without a key, the server answers to its loopback address only")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        is_right = scheme.lower() == "bearer" and secrets.compare_digest(key.encode(), self._key)
        if self._key and path not in OPEN_PATHS and not is_right:
            return ApiError(401, "the API key is missing or wrong", "invalid_api_key")
        return None


def _bounded(receive: Receive) -> Receive:
    size = 0

    async def bounded_receive() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"a request has at most {MAX_BODY_BYTES:,} bytes")
        return message

    return bounded_receive
