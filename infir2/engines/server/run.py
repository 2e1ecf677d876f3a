"""`infir2 serve`: everything that can refuse it, then the server until SIGTERM."""

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from infir2.checkpoint.fingerprint import is_run
from infir2.config.paths import check_model_directory
from infir2.data import ChatTokenizer, load_tokenizer
from infir2.engines.http_client import is_loopback
from infir2.engines.native import NativeEngine
from infir2.engines.server.app import build_app
from infir2.engines.server.driver import EngineDriver
from infir2.engines.server.served import Served
from infir2.errors import ConfigError, disk_reason
from infir2.files import read_regular
from infir2.model import Decoder, ModelConfig
from infir2.model.safetensors_io import read_json
from infir2.terminal import begin_phase, log

DRAIN_SECONDS = 2  # for responses in progress, after SIGTERM
CPU_CACHE_GIB = 1.0
MAX_KEY_BYTES = 4096


@dataclass(frozen=True)
class ServerOptions:
    """What `infir2 serve` is told; the names are those of its options."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str = ""
    api_key_file: Path | None = None
    cache_gib: float = 0.0
    max_running_requests: int = 64
    max_waiting_requests: int = 512
    weight_updates: bool = False
    allow_origin: Sequence[str] = ()


def run_server(options: ServerOptions) -> None:
    """Serve a Hugging Face directory until SIGTERM or Ctrl-C.

    Raises ConfigError for options that do not go together, a port in use or a file that is none of
    a model's; the errors of loading the model; and what ended the engine.
    """
    key = _read_key(options)
    check_model(options.model)
    listening = _bind(options.host, options.port)
    config = ModelConfig.from_hf(read_json(options.model / "config.json"))
    begin_phase("loading the tokenizer")
    tokenizer = load_tokenizer(options.model)
    _check_vocabulary(options.model, tokenizer, config)
    tokenizer.eos_token_ids  # noqa: B018 - renders the template, which takes a second
    name = options.served_name or options.model.resolve().name
    driver = EngineDriver(
        lambda: _open_engine(options, tokenizer, f"{name} at {_address(listening)}/v1"),
        options.max_running_requests + options.max_waiting_requests,
        on_end=lambda: setattr(server, "should_exit", True),
    )
    served = Served(name, tokenizer, config.max_positions, config.vocab_size, driver)
    hosts = () if key else ("127.0.0.1", "localhost", "[::1]", options.host)
    app = build_app(served, key, hosts, options.weight_updates, options.allow_origin)
    server = Server(driver, app)
    _run(server, listening, driver)


def check_model(path: Path) -> None:
    """Raise ConfigError unless `path` is a Hugging Face directory."""
    check_model_directory("MODEL", str(path))
    if is_run(path):
        raise ConfigError(
            f"MODEL: {path} is a run directory, and the engine loads an export: infir2 export fp8 "
            f"{path} --to DIR, then name DIR."
        )


class Server(uvicorn.Server):
    """uvicorn, which at its end cancels what the engine still generates."""

    def __init__(self, driver: EngineDriver, app: FastAPI, port: int = 0) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                port=port,
                log_config=None,
                access_log=False,
                ws="none",
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
        )
        self._driver = driver

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is unfinished with 503, then close the connections."""
        self._driver.close(0)
        await super().shutdown(sockets)


def _run(server: uvicorn.Server, listening: socket.socket, driver: EngineDriver) -> None:
    # uvicorn raises the signal that ended it once more; SIGTERM is how a server ends.
    previous = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    try:
        server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, previous)
    if driver.failure is not None:
        raise driver.failure
    log("the server has stopped.", "serve")
    # Python's own end takes seconds with torch on a busy machine, and waits for a step in progress.
    os._exit(0)


def _open_engine(options: ServerOptions, tokenizer: ChatTokenizer, what: str) -> NativeEngine:
    begin_phase("loading the model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Decoder.from_hf(options.model).to(device)
    cache_gib = options.cache_gib or (CPU_CACHE_GIB if device.type == "cpu" else 0.0)
    engine = NativeEngine(
        model,
        options.max_running_requests,
        cache_gib,
        keep_cache=True,
        decode=tokenizer.decode,
    )
    if not engine.cache_tokens:
        raise ConfigError(
            f"--cache-gib {cache_gib:g} holds no token of this model; allow more memory."
        )
    begin_phase("")
    log(f"{what}, {engine.cache_tokens:,} tokens of KV cache", "serve")
    return engine


def _read_key(options: ServerOptions) -> str:
    """The API key; "" without one. Raises ConfigError where one is required."""
    if options.api_key_file is None:
        if options.weight_updates:
            raise ConfigError(
                "--weight-updates needs --api-key-file FILE: who may send weights must have a key."
            )
        if not is_loopback(options.host):
            raise ConfigError(
                f"--host {options.host} is not loopback: name a file with a key by --api-key-file, "
                "or leave --host out."
            )
        return ""
    try:
        key = read_regular(options.api_key_file, MAX_KEY_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        reason = disk_reason(error)
        raise ConfigError(f"--api-key-file: {options.api_key_file}: {reason}.") from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"--api-key-file: {options.api_key_file} must have one line of printable ASCII "
            "characters without spaces, the key."
        )
    return key


def _bind(host: str, port: int) -> socket.socket:
    """A socket at the address, so that a port in use is known before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise ConfigError(
            f"--port {port} of {host} cannot be used ({error.strerror or error}); choose another, "
            "or end the program that has it."
        ) from error
    return listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _check_vocabulary(path: Path, tokenizer: ChatTokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"MODEL: the tokenizer in {path} has {tokenizer.vocab_size} tokens and the model "
            f"{config.vocab_size} rows; copy the model again."
        )
