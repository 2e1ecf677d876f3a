"""The gateway on loopback between evalscope and the engines.

evalscope sends each prompt k times without saying which is which, with one seed, and gives up on
what it does not like. Here the i-th request of a prompt is its sample i with a seed of its own, an
answer is on the disk before it is passed on, and whatever was answered once is never asked again.
An answer that no engine gives becomes an error that evalscope does not repeat.

The standard library's server is enough: one short request and one answer per sample, from one
client on this machine. The engines are asked in one thread with an event loop.
"""

import asyncio
import hashlib
import json
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from infir2.engines.http_client import HttpClient
from infir2.errors import UserError
from infir2.evaluate.journal import Journal, Key, Row
from infir2.evaluate.upstream import (
    Engine,
    NoAnswerError,
    Restarts,
    Upstream,
    response_text,
)

MAX_BODY_BYTES = 1 << 26
MAX_RESTARTS = 3  # of an engine of ours that ended
# A status that neither evalscope nor its client repeats, and that is not scored as a wrong answer.
NO_ANSWER = 410
# What does not change what is asked, or what the gateway decides.
_IGNORED = (
    *("model", "stream", "stream_options", "n", "seed", "user"),
    *(
        "do_sample",
        "max_new_tokens",
    ),  # of no server: the reference's scripts send them all the same
)


@dataclass(frozen=True)
class Task:
    """How the requests of one benchmark are sent on.

    Attributes:
        samples: k, answers per prompt.
        seed: every sample's own seed is drawn from it.
        begin: text with which the assistant's turn begins, such as "<think>\\n".
    """

    samples: int
    seed: int = 0
    begin: str = ""


@dataclass
class Gateway:
    """Answers evalscope's requests from the journal or from the engines.

    `judge` says whether a program passes. `on_answer` is called with each new row of the journal.
    `failure` is an error of the user or the disk, after which every request is refused. `missing`
    says why samples have no answer.
    """

    tasks: Mapping[str, Task]
    journal: Journal
    upstream: Upstream
    on_answer: Callable[[Row], None] = lambda row: None
    judge: Callable[[dict[str, Any]], bool] | None = None
    failure: UserError | None = None
    missing: dict[Key, str] = field(default_factory=dict)
    key: str = field(default_factory=lambda: secrets.token_hex(32))

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: set[Key] = set()
        self._watches: list[asyncio.Task[None]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server = _Server(self)
        self._serving = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "Gateway":
        self._thread.start()
        self._serving.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        asyncio.run_coroutine_threadsafe(self._end_watches(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def url(self, benchmark: str) -> str:
        """The base URL of a benchmark's requests, for OpenAI's clients."""
        return f"http://127.0.0.1:{self._server.server_port}/{benchmark}/v1"

    def judge_url(self, benchmark: str) -> str:
        """Where evalscope's driver asks for verdicts about programs."""
        return f"http://127.0.0.1:{self._server.server_port}/{benchmark}/judge"

    def open_engines(
        self, running: Sequence[Engine], started: Sequence[Restarts], name: str = "model"
    ) -> None:
        """Ask these engines, of which `started` are started first; blocks until all are ready.

        `name` is the model's at those that are started.
        Raises ConfigError for one that ends while it starts.
        """

        async def start(process: Restarts) -> Engine:
            url, api_key = await process.start()
            return Engine(url, name, HttpClient(url, api_key), process, MAX_RESTARTS)

        async def start_all() -> list[Engine]:
            engines = [*running, *await asyncio.gather(*map(start, started))]
            self._watches = [asyncio.create_task(process.watch()) for process in started]
            return engines

        call = asyncio.run_coroutine_threadsafe(start_all(), self._loop)
        self.upstream.engines = call.result()

    async def _end_watches(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)

    def replace_engine(self, number: int, url: str, api_key: str = "") -> None:
        """An engine has come back at another address."""
        self._loop.call_soon_threadsafe(self.upstream.replace, number, url, api_key)

    def answer(self, benchmark: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], list[Key]]:
        """(status, body, samples) for a chat request of a benchmark; blocks until there is one.

        A request for n samples gets those that are known. Whoever could not pass the answer on
        calls `release` with each sample.
        """
        asked = body.get("n")
        number = min(asked, self.tasks[benchmark].samples) if isinstance(asked, int) else 1
        if number <= 1:
            return self._answer_one(benchmark, body)
        with ThreadPoolExecutor(number) as threads:
            parts = list(threads.map(lambda _: self._answer_one(benchmark, body), range(number)))
        answers = [answer for status, answer, _ in parts if status == 200]
        status, first, _ = parts[0]
        samples = [sample for _, _, own in parts for sample in own]
        return (200, _joined(answers), samples) if answers else (status, first, samples)

    def _answer_one(
        self, benchmark: str, body: dict[str, Any]
    ) -> tuple[int, dict[str, Any], list[Key]]:
        task = self.tasks[benchmark]
        key = self._take(benchmark, _fingerprint(body), task.samples)
        if key is None:
            return NO_ANSWER, _error("every sample of this prompt was asked for"), []
        row = self.journal.get(key) or self._new(key, task, body)
        if row is None:
            self.release(key)
            return NO_ANSWER, _error(f"no answer: {self.missing.get(key, self.failure)}"), []
        if "refused" in row:
            return NO_ANSWER, _error(row["refused"]["message"]), []
        return 200, _passed_on(row["response"], task.begin), [key]

    def release(self, key: Key) -> None:
        """The answer did not arrive: another request of the prompt may get it."""
        with self._lock:
            self._taken.discard(key)

    def _take(self, benchmark: str, prompt: str, samples: int) -> Key | None:
        """The first sample of a prompt that nobody has; one that no engine answered comes last."""
        keys = [(benchmark, prompt, sample) for sample in range(samples)]
        with self._lock:
            free = [key for key in keys if key not in self._taken]
            key = min(free, key=lambda each: (each in self.missing, each), default=None)
            if key is not None:
                self._taken.add(key)
            return key

    def _new(self, key: Key, task: Task, body: dict[str, Any]) -> Row | None:
        """Ask the engines and keep what they say; None if they say nothing."""
        if self.failure is not None or key in self.missing:
            return None
        seed = _seed(task.seed, key)
        asked = {name: value for name, value in body.items() if name not in _IGNORED}
        row: Row = {"benchmark": key[0], "prompt": key[1], "sample": key[2], "seed": seed}
        call = self.upstream.answer(_begun(asked | {"seed": seed}, task.begin))
        future: Future[Any] = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            answer = future.result()
            row |= {"engine": answer.engine, "attempts": answer.attempts}
            row |= {"seconds": round(answer.seconds, 3), "response": answer.response}
        except NoAnswerError as error:
            if not error.final:
                self.missing[key] = f"{error.reason}: {error}"
                return None
            row["refused"] = {"reason": error.reason, "message": str(error)}
        except UserError as error:
            self.failure = error
            return None
        try:
            self.journal.add(row)
        except UserError as error:
            self.failure = error
            return None
        self.on_answer(row)
        return row


def _fingerprint(body: Mapping[str, Any]) -> str:
    asked = {name: value for name, value in body.items() if name not in _IGNORED}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _seed(seed: int, key: Key) -> int:
    """A seed of 31 bits, which every engine accepts."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _begun(body: dict[str, Any], begin: str) -> dict[str, Any]:
    """The request with an assistant's turn that the model continues."""
    if not begin:
        return body
    turn = {"role": "assistant", "content": begin}
    more = {"continue_final_message": True, "add_generation_prompt": False}
    return body | more | {"messages": [*body.get("messages", []), turn]}


def _passed_on(response: dict[str, Any], begin: str) -> dict[str, Any]:
    """The response with its whole text as one message, the beginning of its turn included."""
    choice = response["choices"][0]
    message = {"role": "assistant", "content": response_text(response, begin)}
    first = {"index": 0, "message": message, "finish_reason": choice.get("finish_reason") or "stop"}
    head = {"id": "answer", "object": "chat.completion", "created": 0, "model": "model"}
    usage = response.get("usage")
    return head | {"choices": [first]} | ({"usage": usage} if usage else {})


def _joined(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One response with the choice of each; their tokens stay with them."""
    usages = [answer.get("usage") or {} for answer in answers]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    total = {name: sum(usage.get(name) or 0 for usage in usages) for name in names}
    choices = [
        answer["choices"][0] | {"index": index, "usage": usage}
        for index, (answer, usage) in enumerate(zip(answers, usages, strict=True))
    ]
    return answers[0] | {"choices": choices, "usage": total}


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": None}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of a fault of ours; a client that has gone is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection of evalscope. It has the key, or nothing is answered."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """evalscope has its own log."""

    def do_GET(self) -> None:
        if self._is_allowed() and self.path.endswith("/v1/models"):
            self._reply(200, {"object": "list", "data": [{"id": "model"}]})
        else:
            self._reply(404, _error("not found"))

    def do_POST(self) -> None:
        gateway = self.server.gateway
        benchmark, _, route = self.path.lstrip("/").partition("/")
        length = self.headers.get("Content-Length", "")
        if not self._is_allowed() or not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._reply(403, _error("the key or the length is missing"))
            return
        body = _json_object(self.rfile.read(int(length)))
        if route == "judge" and gateway.judge is not None and body is not None:
            return self._judge(gateway.judge, body)
        if benchmark not in gateway.tasks or route != "v1/chat/completions" or body is None:
            self._reply(404, _error("there is no such route, or the body is not a JSON object"))
            return
        status, answer, samples = gateway.answer(benchmark, body)
        if not self._reply(status, answer):
            for sample in samples:
                gateway.release(sample)

    def _judge(self, judge: Callable[[dict[str, Any]], bool], body: dict[str, Any]) -> None:
        try:
            self._reply(200, {"passes": judge(body)})
        except Exception as error:
            self._reply(500, _error(f"no verdict: {type(error).__name__}: {error}"))

    def _is_allowed(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        return secrets.compare_digest(given, f"Bearer {self.server.gateway.key}".encode())

    def _reply(self, status: int, body: dict[str, Any]) -> bool:
        """Whether the reply could be sent; evalscope may have been killed."""
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True
            return False
        return True
