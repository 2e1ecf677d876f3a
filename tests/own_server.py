"""Our own server in this process, with a tiny model, and plain requests to it."""

import contextlib
import json
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from token_apis import APPS

from infir2.config.schema import ShapeSection
from infir2.convert import export_fp8, selfcheck
from infir2.data import load_tokenizer
from infir2.engines.native import NativeEngine
from infir2.engines.remote_engine import RemoteEngine
from infir2.engines.server.app import build_app
from infir2.engines.server.driver import EngineDriver
from infir2.engines.server.engine_process import ProcessEngine
from infir2.engines.server.engine_worker import run_engine
from infir2.engines.server.run import Server
from infir2.engines.server.served import Served
from infir2.engines.server_process import RunningServer
from infir2.engines.streams import SglangStreams, VllmStreams
from infir2.model import Decoder, exported_weights, write_hf

KEY = "sk-test"
Serve = subprocess.Popen[str]
SHAPE = ShapeSection(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=136,
    max_positions=512,
)


def write_model(directory: Path, tokenizer: Path, seed: int = 3, fp8: bool = True) -> Path:
    """A model of random weights as a Hugging Face directory, FP8 or BF16."""
    model = Decoder.from_shape(SHAPE, load_tokenizer(tokenizer).vocab_size, seed=seed)
    bf16 = directory / f"bf16-{seed}"
    if not bf16.exists():
        write_hf(bf16, exported_weights(model), model.config.to_hf(), tokenizer)
    if not fp8:
        return bf16
    target = directory / f"fp8-{seed}"
    small, selfcheck.SMALL_MODEL_PARAMETERS = selfcheck.SMALL_MODEL_PARAMETERS, 0
    try:
        export_fp8(bf16, target, "pow2")
    finally:
        selfcheck.SMALL_MODEL_PARAMETERS = small
    return target


class OwnServer:
    """`infir2 serve` without its command line.

    Attributes:
        engine: what generates; with `kind` "sglang" or "vllm" behind that server's routes.
    """

    def __init__(
        self, directory: Path, max_running: int = 8, max_requests: int = 64, kind: str = "native"
    ) -> None:
        model = Decoder.from_hf(directory)
        tokenizer = load_tokenizer(directory)
        self.engine = NativeEngine(
            model, max_running, cache_gib=0.01, keep_cache=True, decode=tokenizer.decode
        )
        self.kind, self.back_url, config = kind, "", model.config
        self._max_positions, self._max_running = config.max_positions, max_running
        open_engine = self._open_native if kind == "native" else self._open_remote
        self._decode = tokenizer.decode
        self.driver: EngineDriver[Any] = EngineDriver(open_engine, max_requests)
        self.served = Served(
            "tiny", tokenizer, config.max_positions, config.vocab_size, self.driver
        )

    @contextlib.contextmanager
    def run(self, key: str = KEY, **options: Any) -> Iterator["OwnServer"]:
        with contextlib.ExitStack() as stack:
            if self.kind != "native":
                self.back = EngineDriver(lambda: self.engine, 1024)
                app = APPS[self.kind](self.back, KEY, self._max_positions)
                self.back_url = stack.enter_context(listening(app, self.back))
            app = build_app(self.served, key, **options)
            self.url, self.key = stack.enter_context(listening(app, self.driver)), key
            yield self
        if self.kind == "native":
            self.connection.close()

    def _open_native(self) -> ProcessEngine:
        """As `infir2 serve`, with a thread in the place of the engine's process."""
        self.connection, theirs = multiprocessing.Pipe()
        run = partial(run_engine, theirs, lambda: self.engine)
        threading.Thread(target=run, daemon=True).start()
        return ProcessEngine(self)

    def how_it_ended(self) -> str:
        """As `EngineWorker`."""
        return "code 0"

    def _open_remote(self) -> RemoteEngine:
        streams = {"sglang": SglangStreams, "vllm": VllmStreams}[self.kind]
        host = RunningServer(self.back_url, KEY, streams, lambda *_: None, 0)
        return RemoteEngine(host, self._decode, self._max_running)

    def call(
        self, path: str, body: Any = None, key: str | None = None, parse: bool = True
    ) -> tuple[int, Any]:
        """Status and JSON, or the text, of a GET request, or of a POST request with a body."""
        headers = {"Content-Type": "application/json"}
        if key != "":
            headers["Authorization"] = f"Bearer {key or self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if parse else text

    def wait_until_idle(self, seconds: float = 1.0) -> float:
        """Seconds until no request was left; fails after `seconds`."""
        start = time.monotonic()
        while self.driver.num_requests or self.engine.num_unfinished:
            assert time.monotonic() < start + seconds, "a request still runs"
            time.sleep(0.005)
        return time.monotonic() - start


@contextlib.contextmanager
def listening(app: FastAPI, driver: EngineDriver[Any]) -> Iterator[str]:
    """The URL of an app whose engine is ready."""
    server = Server(driver, app)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not (server.started and driver.is_ready):
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def begin_serve(model: Path, directory: Path, *options: str) -> tuple[Serve, str]:
    """`infir2 serve` in a process, once it is ready, and its URL; /health was 503 before."""
    (directory / "key").write_text(KEY + "\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "infir2", "serve", str(model), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--api-key-file", str(directory / "key"), *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    url, statuses = f"http://127.0.0.1:{port}", set()
    while 200 not in statuses:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
        try:
            statuses.add(urllib.request.urlopen(f"{url}/health", timeout=60).status)
        except urllib.error.HTTPError as error:
            statuses.add(error.code)
        except OSError:
            continue
    assert statuses <= {200, 503}
    return process, url
