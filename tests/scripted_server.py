"""An OpenAI-compatible server that answers from a script and fails on demand, on loopback."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def say(body: dict[str, Any]) -> dict[str, Any]:
    """A message that tells what was asked, and with which seed."""
    return {"content": f"{body['messages'][-1]['content']} seed {body.get('seed')}"}


@dataclass
class Script:
    """What the server does.

    `faults` maps the number of a chat request (from 1) to a fault: a status ("500", "429"),
    "context", "hang", "empty", "null", "nochoices", "html", "cut", "drop". `always` is the fault of
    all other requests.
    """

    answer: Answer = say
    faults: dict[int, str] = field(default_factory=dict)
    always: str = ""
    latency: float = 0.0
    models: tuple[str, ...] = ("tiny",)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    most_running: int = 0


class ScriptedServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, script: Script, port: int = 0) -> None:
        self.script, self.lock, self.running = script, threading.Lock(), 0
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is a part of the tests."""


@contextlib.contextmanager
def serving(script: Script, port: int = 0) -> Iterator[ScriptedServer]:
    server = ScriptedServer(script, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(200, {"data": [{"id": name} for name in self.server.script.models]})

    def do_POST(self) -> None:
        server, script = self.server, self.server.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if server.ended.is_set():  # this thread has outlived its server
            self.close_connection = True
            return self.connection.close()
        with server.lock:
            script.requests.append(body)
            script.keys.add(self.headers.get("Authorization", ""))
            number = len(script.requests)
            server.running += 1
            script.most_running = max(script.most_running, server.running)
        try:
            self._answer(script.faults.get(number, script.always), body)
        finally:
            with server.lock:
                server.running -= 1

    def _answer(self, fault: str, body: dict[str, Any]) -> None:
        if fault.isdecimal():
            return self._reply(int(fault), {"error": {"message": "scripted"}})
        if fault == "context":
            message = "This model's maximum context length is 10 tokens"
            return self._reply(400, {"error": {"message": message}})
        if fault == "hang":
            self.server.ended.wait(60)
        if fault in ("drop", "hang"):
            self.close_connection = True
            return self.connection.close()
        if fault == "html":
            return self._send(200, b"<html>busy</html>", "text/html")
        time.sleep(self.server.script.latency)
        message = self.server.script.answer(body)
        if fault in ("empty", "null"):
            message["content"] = "" if fault == "empty" else None
        finish = message.pop("finish", "stop")
        choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": finish}
        tokens = len((message["content"] or "").split())
        usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
        reply = {"id": "x", "choices": [] if fault == "nochoices" else [choice], "usage": usage}
        data = json.dumps(reply).encode()
        if fault == "cut":
            self.close_connection = True
            return self._send(200, data[:-9], "application/json", len(data))
        self._send(200, data, "application/json")

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str, length: int = -1) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if length < 0 else length))
        self.end_headers()
        self.wfile.write(data)
