"""A scripted server for tests of the pool and of the clients: it answers, or fails as told.

`FakeServer` has the routes of `infir2 serve --weight-updates`. A fake of another server overrides
`generate_route`, `read_request`, `format_answer` and `call`.
"""

import asyncio
import contextlib
import http.server
import json
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

FAULTS = ("500", "hang", "cut", "fewer_logprobs", "not_finite", "old_version", "die", "slow")

BAD_ANSWERS = (  # a fault, and the reason of the EngineError that it becomes
    ("500", "status"),
    ("cut", "cut"),
    ("fewer_logprobs", "logprobs"),
    ("not_finite", "not_finite"),
    ("old_version", "version"),
)


class Status(Exception):
    """Answer with this status."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # with the usual 5 the kernel breaks connections that come together


class FakeServer:
    """Answers on a free port of 127.0.0.1 until `stop`. A response depends on its prompt only.

    Attributes:
        faults: what the next generate requests suffer, in order: of FAULTS, or "" for none.
        calls: (route, JSON body) of every request that has arrived.
        policy_version: of the weights that it has.
        hold: while it is not set, no request that changes or checks anything is answered.
    """

    generate_route = "/infir2/generate"

    def __init__(self, faults: Iterable[str] = (), api_key: str = "", port: int = 0) -> None:
        self.faults, self.api_key = deque(faults), api_key
        self.calls: list[tuple[str, Any]] = []
        self.policy_version = 0
        self.digest = {"w": "0" * 64}
        self.hold = threading.Event()
        self.hold.set()
        self._connections: set[socket.socket] = set()
        self._stopped = threading.Event()
        self._server = _Server(("127.0.0.1", port), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As a killed process: nothing listens any more, and open connections break."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._server.shutdown()
            self._server.server_close()
            for connection in list(self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def routes_called(self) -> list[str]:
        return [route for route, _ in self.calls]

    # What another API overrides.

    def read_request(self, body: Any) -> tuple[list[int], int, list[int]]:
        """(prompt, max_tokens, stop_ids) of a generate request."""
        if body["policy_version"] != self.policy_version:
            raise Status(409)
        return body["token_ids"], body["max_tokens"], body["stop_ids"]

    def format_answer(
        self, body: Any, token_ids: list[int], logprobs: list[float], policy_version: int
    ) -> Any:
        finish = "stop" if token_ids[-1] in body["stop_ids"] else "length"
        answer = {"token_ids": token_ids, "logprobs": logprobs, "finish": finish}
        return answer | {"policy_version": policy_version}

    def call(self, route: str, body: Any) -> Any:
        """The answer to any other request; raises Status."""
        if route == "/infir2/update_weights":
            self.policy_version = body["policy_version"]
            return {"digest": self.digest}
        if route == "/infir2/weights_digest":
            return {"digest": self.digest}
        if route == "/infir2/info":
            return {"policy_version": self.policy_version, "max_positions": 4096}
        if route in ("/infir2/cancel", "/health"):
            return {}
        raise Status(404)

    # The machinery.

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                fake._connections.add(self.request)
                super().setup()

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                if fake.api_key and self.headers["Authorization"] != f"Bearer {fake.api_key}":
                    return self.send(401, b"{}")
                fake.calls.append((self.path, body))
                try:
                    fake._respond(self, self.path, body)
                except Status as status:
                    self.send(int(str(status)), b'{"error": "scripted"}')

            def do_POST(self) -> None:
                self.do_GET()

            def send(self, status: int, data: bytes, cut: int = 0) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) - cut])
                self.close_connection = cut > 0

            def log_message(self, *_: object) -> None:
                pass

            def finish(self) -> None:
                with contextlib.suppress(OSError):  # the server was stopped meanwhile
                    super().finish()

        return Handler

    def _respond(self, handler: Any, route: str, body: Any) -> None:
        if route != self.generate_route:
            while not self.hold.wait(0.02) and not self._stopped.is_set():
                pass
            return handler.send(200, json.dumps(self.call(route, body)).encode())
        fault = self.faults.popleft() if self.faults else ""
        if fault == "500":
            raise Status(500)
        if fault == "hang":
            self._stopped.wait()
            return None
        if fault == "die":
            return self.stop()
        if fault == "slow":
            time.sleep(0.3)
        data = self.encode_answer(body, fault)
        return handler.send(200, data, cut=len(data) // 2 if fault == "cut" else 0)

    def encode_answer(self, body: Any, fault: str) -> bytes:
        return json.dumps(self.answer_request(body, fault)).encode()

    def answer_request(self, body: Any, fault: str) -> Any:
        token_ids, logprobs = scripted_response(*self.read_request(body))
        if fault == "fewer_logprobs":
            logprobs = logprobs[:-1]
        if fault == "not_finite":
            logprobs[-1] = math.nan
        version = self.policy_version - (fault == "old_version")
        return self.format_answer(body, token_ids, logprobs, version)


def scripted_response(
    prompt: list[int], max_tokens: int, stop_ids: Iterable[int]
) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities that follow from the prompt alone."""
    token_ids: list[int] = []
    while len(token_ids) < max_tokens and not (token_ids and token_ids[-1] in stop_ids):
        token_ids.append((sum(prompt) * 31 + 7 * len(token_ids)) % 97)
    return token_ids, [-0.25 - token / 128 for token in token_ids]


def ask(
    open_client: Callable[[str, str], Any],
    server: FakeServer,
    do: Callable[[Any], Coroutine[Any, Any, Any]],
) -> Any:
    """What `do` returns of a client of the server, which is then closed."""

    async def run() -> Any:
        client = open_client(server.url, server.api_key)
        try:
            return await do(client)
        finally:
            await client.close()

    return asyncio.run(asyncio.wait_for(run(), 20))


def main() -> None:
    """A server in a process of its own, with a child that leaves its session, as SGLang's do.

    Arguments: port, file with the key. The first line of its log names the pid of the child.
    """
    import subprocess
    import sys
    from pathlib import Path

    key = Path(sys.argv[2]).read_text(encoding="utf-8").strip()
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print(f"child {child.pid}", flush=True)
    server = FakeServer(api_key=key, port=int(sys.argv[1]))
    server._stopped.wait()


if __name__ == "__main__":
    main()
