"""Errors as OpenAI's API writes them: {"error": {"message", "type", "param", "code"}}."""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from infir2.engines.server.driver import CanceledError, QueueFullError, WrongVersionError
from infir2.engines.types import RequestFailedError

RETRY_SECONDS = 1
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_CLIENT_CLOSED = 499  # nobody reads the answer


class ApiError(Exception):
    """An answer other than 200.

    Example: `ApiError(400, "n is 200; it must be at most 128", param="n")`.
    """

    def __init__(self, status: int, message: str, code: str = "", param: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class ClientGoneError(Exception):
    """The client closed its connection before the response was complete."""


def json_response(content: Any, status: int = 200, **headers: str) -> Response:
    """`content` as JSON. Floats read back with the same bits; not finite ones raise ValueError."""
    return Response(json_bytes(content), status, headers, media_type="application/json")


def json_bytes(content: Any) -> bytes:
    """JSON in UTF-8. Half of a surrogate pair, which a request may have, becomes "?"."""
    return _JSON.encode(content).encode("utf-8", "replace")


def error_content(error: ApiError) -> dict[str, Any]:
    """The body of the answer to a request that failed."""
    content = {
        "message": str(error),
        "type": "invalid_request_error" if error.status < 500 else "server_error",
        "param": error.param or None,
        "code": error.code or None,
    }
    return {"error": content}


def error_response(error: ApiError) -> Response:
    """The answer to a request that failed."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status == 503 else {}
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return json_response(error_content(error), error.status, **headers)


def as_api_error(error: Exception) -> ApiError:
    """What an error says to a client."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(503, "the queue is full; try again later", "queue_full")
        case CanceledError():
            return ApiError(503, str(error), "canceled")
        case RequestFailedError():
            return ApiError(503, f"the engine failed ({error}); send it again", "engine_failed")
        case WrongVersionError():
            return ApiError(409, str(error), "policy_version")
        case RequestValidationError():
            # Of a union, the alternative that came farthest.
            worst = max(error.errors(), key=lambda each: len(each["loc"]))
            path = ".".join(filter(_is_field, map(str, worst["loc"])))
            return ApiError(400, f"{path or 'the body'}: {worst['msg']}", param=path)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case ClientGoneError():
            return ApiError(_CLIENT_CLOSED, "the client has gone")
        case _:
            return ApiError(500, "internal error; the server's log has it")


def _is_field(part: str) -> bool:
    """Whether a part of a validation error's location is a name or an index, not a type."""
    return part not in ("body", "str") and "[" not in part and "(" not in part


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app in OpenAI's form."""

    async def answer(_request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error))

    kinds = (ApiError, QueueFullError, CanceledError, RequestFailedError, WrongVersionError)
    for kind in (*kinds, ClientGoneError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
