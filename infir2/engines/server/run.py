"""`infir2 serve`: everything that can refuse it, then the server until SIGTERM."""

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from infir2.data import ChatTokenizer, load_tokenizer
from infir2.engines.http_client import is_loopback
from infir2.engines.server.app import build_app
from infir2.engines.server.driver import EngineDriver
from infir2.engines.server.opening import Opening, ServerOptions, engine_opening
from infir2.engines.server.served import Served
from infir2.errors import ConfigError, disk_reason
from infir2.files import read_regular
from infir2.model import ModelConfig
from infir2.model.safetensors_io import read_config
from infir2.terminal import begin_phase, log

DRAIN_SECONDS = 2  # for responses in progress, after SIGTERM
MAX_KEY_BYTES = 4096


def run_server(options: ServerOptions) -> None:
    """Serve a Hugging Face directory until SIGTERM or Ctrl-C; `options.check` was called.

    Raises ConfigError for a missing key, a port in use or a file that is none of a model's; the
    errors of loading the model; and what ended the engine.
    """
    key = _read_key(options)
    listening = _bind(options.host, options.port)
    config = read_config(options.model)
    name = options.served_name or options.model.resolve().name
    with contextlib.closing(engine_opening(options, f"{name} at {_address(listening)}/v1")) as each:
        driver = _serve(options, name, key, listening, config, each)
    if driver.failure is not None:
        raise driver.failure
    log("the server has stopped.", "serve")
    # Python's own end takes seconds with torch on a busy machine, and waits for a step in progress.
    os._exit(0)


def _serve(
    options: ServerOptions,
    name: str,
    key: str,
    listening: socket.socket,
    config: ModelConfig,
    opening: Opening,
) -> EngineDriver[Any]:
    """Until SIGTERM or Ctrl-C, or the end of the engine."""
    begin_phase("loading the tokenizer")
    tokenizer = load_tokenizer(options.model)
    _check_vocabulary(options.model, tokenizer, config)
    tokenizer.eos_token_ids  # noqa: B018 - renders the template, which takes a second
    driver = EngineDriver(
        lambda: opening.open(tokenizer),
        options.max_running_requests + options.max_waiting_requests,
        on_end=lambda: setattr(server, "should_exit", True),
    )
    served = Served(name, tokenizer, config.max_positions, config.vocab_size, driver)
    hosts = () if key else ("127.0.0.1", "localhost", "[::1]", options.host)
    app = build_app(served, key, hosts, options.weight_updates, options.allow_origin)
    server = Server(driver, app)
    # uvicorn raises the signal that ended it once more; SIGTERM is how a server ends.
    previous = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    try:
        server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, previous)
    return driver


class Server(uvicorn.Server):
    """uvicorn, which at its end cancels what the engine still generates."""

    def __init__(self, driver: EngineDriver[Any], app: FastAPI, port: int = 0) -> None:
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
