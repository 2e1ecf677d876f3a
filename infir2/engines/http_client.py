"""JSON over HTTP to one server, hundreds of requests at a time in one thread.

A redirect would carry the key to another server, and a proxy would read it, so neither is followed.
An answer is bounded in bytes; the caller limits the time, or `ask_once`.
"""

import asyncio
import contextlib
import ipaddress
import json
import os
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import httpx2
from pydantic_core import from_json

from infir2.engines.remote import BadAnswerError, EngineGoneError, HungUpError
from infir2.errors import ConfigError, first_line

KEY_VARIABLE = "INFIR2_ENGINE_KEY"
MAX_ANSWER_BYTES = 2**26  # 32,768 tokens with their log-probabilities are 2 MB
CONNECT_SECONDS = 10.0
TIMEOUT_SECONDS = 120.0  # of `ask_once`: a server may send one byte per minute for ever


def require_urls(urls: Sequence[str]) -> None:
    """`check_url` of `rollout.urls`, with this environment's key."""
    for url in urls:
        check_url("rollout.urls", url, os.environ.get(KEY_VARIABLE, ""))


def check_url(key_name: str, url: str, api_key: str, variable: str = KEY_VARIABLE) -> None:
    """Raise ConfigError for what is no server's address, and for one elsewhere without a key.

    `key_name` is the recipe's key that has the URL, `variable` the environment's with the key.
    """
    try:
        address = urllib.parse.urlsplit(url)
        host, _ = address.hostname or "", address.port
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL) as error:
        raise ConfigError(f"{key_name}: {url!r} is no URL ({first_line(error)}).") from error
    if address.scheme not in ("http", "https") or not host or address.query or address.fragment:
        raise ConfigError(f"{key_name}: {url!r} is not of the form http://HOST:PORT.")
    if address.username or address.password:
        raise ConfigError(f"{key_name}: the URL of {host} has a key; set {variable} instead.")
    if not api_key and not is_loopback(host):
        raise ConfigError(
            f"{key_name}: {url} is not on this machine and there is no key: start the server with "
            f"one and set {variable}."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class HttpClient:
    """Sends JSON to one server, with a key that goes to that server only."""

    def __init__(self, url: str, api_key: str = "") -> None:
        if not api_key.isascii() or not api_key.isprintable():
            raise ConfigError("the key has characters that no key has; set it again.")
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        is_tls = self.url.startswith("https:")
        self._verify: ssl.SSLContext | bool = httpx2.create_ssl_context() if is_tls else False
        # One connection each: a client's own pool looks at all its connections for each request.
        self._idle: list[httpx2.AsyncClient] = []

    async def get(self, route: str) -> Any:
        """As `post`, for a GET request."""
        return await self._call("GET", route, None)

    async def post(self, route: str, body: Any) -> Any:
        """What the server answers to a JSON body: JSON if it says so, else text, or None.

        Raises EngineGoneError; BadAnswerError with reason "status" or "cut"; ConfigError for a
        refused key.
        """
        return await self._call("POST", route, body)

    async def close(self) -> None:
        """Close all connections."""
        while self._idle:
            await self._idle.pop().aclose()

    async def events(self, route: str, body: Any) -> AsyncGenerator[Any, None]:
        """The JSON of each server-sent event, until `[DONE]`, in answer to a JSON body.

        Raises as `post`. MAX_ANSWER_BYTES bounds one event.
        """
        async with self._stream("POST", route, body) as response:
            label = f"{self.url}{route}"
            if response.status_code != 200:
                _decode(response.status_code, await self._read(response, label), label, True)
            pending, is_done = bytearray(), False
            async for part in response.aiter_bytes():
                pending += part
                *lines, rest = pending.split(b"\n")
                pending = bytearray(rest)
                for line in lines:
                    data = line.removeprefix(b"data:").strip()
                    is_done |= data == b"[DONE]"
                    if data and not is_done:  # reading to the end keeps the connection
                        yield _decode(200, bytes(data), label, False)
                if len(pending) > MAX_ANSWER_BYTES:
                    raise BadAnswerError("cut", f"{label}: more than {MAX_ANSWER_BYTES:,} bytes")

    async def _call(self, method: str, route: str, body: Any) -> Any:
        label = f"{self.url}{route}"
        async with self._stream(method, route, body) as response:
            data = await self._read(response, label)
        # SGLang's /flush_cache answers a sentence without any content type.
        is_text = "json" not in response.headers.get("content-type", "")
        return _decode(response.status_code, data, label, is_text)

    @contextlib.asynccontextmanager
    async def _stream(self, method: str, route: str, body: Any) -> AsyncIterator[httpx2.Response]:
        """An answer whose body is still to be read; errors of the connection are ours."""
        label = f"{self.url}{route}"
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if content is not None else {}
        client, is_answered = self._idle.pop() if self._idle else self._open(), False
        try:
            async with client.stream(method, route, content=content, headers=headers) as response:
                is_answered = True
                yield response
        except (httpx2.RemoteProtocolError, httpx2.DecodingError) as error:
            if not is_answered and "disconnected" in str(error):
                raise HungUpError(f"{label}: {first_line(error)}") from error
            raise BadAnswerError("cut", f"{label}: {first_line(error)}") from error
        except httpx2.TransportError as error:
            raise EngineGoneError(f"{label}: {first_line(error)}") from error
        finally:
            self._idle.append(client)

    def _open(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            trust_env=False,
            verify=self._verify,
        )

    async def _read(self, response: httpx2.Response, label: str) -> bytes:
        data = bytearray()
        async for part in response.aiter_bytes():
            data += part
            if len(data) > MAX_ANSWER_BYTES:
                raise BadAnswerError("cut", f"{label}: more than {MAX_ANSWER_BYTES:,} bytes")
        return bytes(data)


def ask_once(url: str, api_key: str, route: str, body: Any = None) -> Any:
    """One request, a POST if it has a body, from outside of an event loop, in TIMEOUT_SECONDS.

    Raises as `HttpClient.post`.
    """

    async def ask() -> Any:
        client = HttpClient(url, api_key)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await (client.get(route) if body is None else client.post(route, body))
        except TimeoutError as error:
            message = f"{url}{route}: no whole answer in {TIMEOUT_SECONDS:g} s"
            raise EngineGoneError(message) from error
        finally:
            await client.close()

    return asyncio.run(ask())


def _decode(status: int, data: bytes, label: str, is_text: bool) -> Any:
    if status == 401:
        raise ConfigError(f"{label}: the server refuses the key; set INFIR2_ENGINE_KEY to its own.")
    if status in range(300, 400):
        message = f"{label}: it redirects (status {status}); name the server itself"
        raise BadAnswerError("status", message, status)
    if status != 200:
        is_page = data.lstrip().startswith(b"<")
        text = "" if is_page else data[:300].decode(errors="replace").replace("\n", " ")
        message = f"{label}: status {status} {text}".rstrip()
        raise BadAnswerError("status", message, status, _sentence(data))
    if is_text or not data.strip():
        return data.decode(errors="replace") or None
    try:
        return from_json(data)  # as json.loads, but for half a surrogate pair; 2.5 times as fast
    except ValueError:
        pass
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadAnswerError("cut", f"{label}: no JSON ({first_line(error)})") from error


def _sentence(data: bytes) -> str:
    """The message of an error of OpenAI's form; "" for anything else."""
    try:
        return str(from_json(data)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return ""
