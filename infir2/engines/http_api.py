"""Requests to a server's OpenAI API, with a key that goes to that server only.

A redirect would carry the key to another server, and a proxy would read it, so neither is followed.
An answer is bounded in bytes and in time, whatever the server sends.
"""

import contextlib
import http.client
import json
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

TIMEOUT_SECONDS = 120.0  # for one whole answer
MAX_ANSWER_BYTES = 2**22


def call_json(url: str, key: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that a server answers to a GET request, or to a POST request with a JSON `body`.

    Raises ValueError with a sentence's end for anything but such an answer, OSError if the server
    cannot be reached.
    """
    if not key.isascii() or not key.isprintable():
        raise ValueError("the key has characters that no key has")  # http.client would print it
    address = urllib.parse.urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if address.scheme not in kinds or not address.hostname:
        raise ValueError("it is no http:// or https:// address")
    try:
        connection = kinds[address.scheme](address.hostname, address.port, timeout=TIMEOUT_SECONDS)
        connection.connect()
        with contextlib.closing(connection), _time_limit(connection.sock):
            _send(connection, address.path, key, body)
            return _decode(connection.getresponse())
    except http.client.HTTPException as error:
        raise ValueError(f"its answer broke off or is not HTTP ({type(error).__name__})") from error


def _send(
    connection: http.client.HTTPConnection, path: str, key: str, body: dict[str, Any] | None
) -> None:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("GET" if data is None else "POST", path, data, headers)


@contextlib.contextmanager
def _time_limit(connected: socket.socket) -> Iterator[None]:
    """End the request after TIMEOUT_SECONDS: a server may send one byte per minute for ever."""
    timer = threading.Timer(TIMEOUT_SECONDS, _shut_down, [connected])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut_down(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was closed meanwhile
        connected.shutdown(socket.SHUT_RDWR)


def _decode(response: http.client.HTTPResponse) -> Any:
    if response.status in range(300, 400):
        raise ValueError(f"it redirects (status {response.status}); name the server itself")
    if response.status != 200:
        raise ValueError(f"status {response.status}")
    data = response.read(MAX_ANSWER_BYTES + 1)
    if len(data) > MAX_ANSWER_BYTES:
        raise ValueError(f"its answer has more than {MAX_ANSWER_BYTES:,} bytes")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("its answer is nested too deeply") from error
