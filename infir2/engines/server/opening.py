"""Which engine a server gets: the native one, or SGLang or vLLM in a process that we start."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from infir2.data import ChatTokenizer
from infir2.engines.engine_options import EngineOptions, check_model, remote_host
from infir2.engines.remote_engine import RemoteEngine
from infir2.engines.server.engine_process import EngineWorker, ProcessEngine
from infir2.engines.types import ServedEngine
from infir2.errors import ConfigError
from infir2.terminal import begin_phase, log


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
    engine: EngineOptions = field(default_factory=EngineOptions)
    engine_dir: Path | None = None

    def check(self) -> None:
        """Raise ConfigError for a directory that is no model's, or options that do not fit."""
        check_model("MODEL", self.model)
        self.engine.check(self.model)
        kind = self.engine.engine
        if kind != "native" and self.weight_updates:
            raise ConfigError(f"--weight-updates is for --engine native, not {kind}; leave it out.")
        if self.cache_gib and (kind == "sglang" or (kind == "vllm" and torch.cuda.is_available())):
            raise ConfigError(f"--cache-gib is not for {kind}; name --memory-fraction instead.")


@dataclass(frozen=True)
class Opening:
    """How an engine is opened, in the thread that drives it, and how it is ended."""

    open: Callable[[ChatTokenizer], ServedEngine]
    close: Callable[[], None]


def engine_opening(options: ServerOptions, what: str) -> Opening:
    """`what` is served, for the message when it is."""
    opening = _native_opening if options.engine.engine == "native" else _remote_opening
    return opening(options, what)


def _native_opening(options: ServerOptions, what: str) -> Opening:
    worker = EngineWorker()  # it starts while this process loads the tokenizer

    def open_engine(_tokenizer: ChatTokenizer) -> ProcessEngine:
        begin_phase("loading the model")
        engine = ProcessEngine(
            worker,
            model=str(options.model),
            max_running_requests=options.max_running_requests,
            cache_gib=options.cache_gib,
        )
        begin_phase("")
        log(f"{what}, {engine.cache_tokens:,} tokens of KV cache", "serve")
        return engine

    return Opening(open_engine, worker.kill)


def _remote_opening(options: ServerOptions, what: str) -> Opening:
    directory = options.engine_dir or Path(tempfile.mkdtemp(prefix="infir2-serve-"))
    host = remote_host(
        options.model, options.engine, options.max_running_requests, options.cache_gib, directory
    )

    def open_engine(tokenizer: ChatTokenizer) -> RemoteEngine:
        begin_phase(f"starting {options.engine.engine}; its log is in {directory}")
        engine = RemoteEngine(host, tokenizer.decode, options.max_running_requests)
        begin_phase("")
        log(f"{what}, by {engine.info.release}", "serve")
        return engine

    def close() -> None:
        ended = host.has_ended
        host.kill()
        if options.engine_dir is None and not ended:  # else its log tells why
            shutil.rmtree(directory, ignore_errors=True)

    return Opening(open_engine, close)
