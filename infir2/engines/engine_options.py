"""What generates behind `infir2 serve`, and how that is started."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from infir2.checkpoint.fingerprint import is_run
from infir2.config.paths import check_model_directory
from infir2.config.schema import RolloutSection
from infir2.engines.infir2_server import Infir2Client
from infir2.engines.remote import EngineClient, ServerInfo
from infir2.engines.server_process import Place, ServerCommand, ServerProcess, write_private
from infir2.engines.sglang import sglang_command
from infir2.engines.streams import SGLANG_OPTIONS, VLLM_OPTIONS, SglangStreams, VllmStreams
from infir2.engines.vllm_command import check_vllm_model, vllm_command
from infir2.errors import ConfigError
from infir2.model.safetensors_io import read_config

EngineKind = Literal["native", "sglang", "vllm"]
ENGINE_KINDS: tuple[str, ...] = get_args(EngineKind)


def check_model(key: str, directory: Path) -> None:
    """Raise ConfigError or CheckpointError unless `directory`, of `key`, is an exported model's."""
    check_model_directory(key, str(directory))
    if is_run(directory):
        raise ConfigError(
            f"{key}: {directory} is a run directory, and an engine loads an export: infir2 export "
            f"fp8 {directory} --to DIR, then name DIR."
        )
    read_config(directory)


@dataclass(frozen=True)
class EngineOptions:
    """Options of `infir2 serve`, by their names.

    Attributes:
        engine: of ENGINE_KINDS.
        python: the interpreter of SGLang's or vLLM's environment.
        server_option: further options of their command line.
        tensor_parallel: GPUs of one server.
        memory_fraction: of a GPU that it may take; 0: its own default.
    """

    engine: str = "native"
    python: str = ""
    server_option: Sequence[str] = ()
    tensor_parallel: int = 1
    memory_fraction: float = 0.0

    def check(self, model: Path) -> None:
        """Raise ConfigError for options that do not go together, or that cannot serve `model`."""
        if self.engine == "native":
            if self != EngineOptions():
                raise ConfigError(
                    "--python, --server-option, --tensor-parallel and --memory-fraction are for "
                    "--engine sglang or vllm; leave them out, or name one of these."
                )
            return
        if not Path(self.python).is_file():
            raise ConfigError(
                f"--engine {self.engine} needs --python, the interpreter of an environment with "
                f"{self.engine}, such as {self.engine}-env/bin/python"
                + (f"; {self.python} does not exist." if self.python else ".")
            )
        if self.engine == "vllm":
            check_vllm_model("MODEL", model)
        if (count := torch.cuda.device_count()) < self.tensor_parallel > 1:
            raise ConfigError(
                f"--tensor-parallel {self.tensor_parallel} needs more GPUs than the {count} here."
            )

    def arguments(self) -> list[str]:
        """The words of a command line."""
        words = [f"--engine={self.engine}"]
        words += [f"--python={self.python}"] if self.python else []
        words += [f"--server-option={each}" for each in self.server_option]
        if self.tensor_parallel > 1:
            words.append(f"--tensor-parallel={self.tensor_parallel}")
        return words + (
            [f"--memory-fraction={self.memory_fraction}"] if self.memory_fraction else []
        )


def remote_host(
    model: Path,
    options: EngineOptions,
    max_running_requests: int,
    cache_gib: float,
    directory: Path,
) -> ServerProcess:
    """The SGLang or vLLM that serves `model`; its log and its command are in `directory`."""
    is_sglang = options.engine == "sglang"
    extra = SGLANG_OPTIONS if is_sglang else VLLM_OPTIONS
    rollout = RolloutSection(
        model=str(model.resolve()),
        python=options.python,
        tensor_parallel=options.tensor_parallel,
        memory_fraction=options.memory_fraction,
        max_running_requests=max_running_requests,
        cache_gib=cache_gib,
        server_options=(*extra, *options.server_option),
    )
    command, streams = (sglang_command, SglangStreams) if is_sglang else (vllm_command, VllmStreams)
    return ServerProcess(
        options.engine,
        lambda place: command(rollout, place),
        streams,
        lambda *_: None,
        directory,
        max_restarts=0,
    )


class ServeClient(Infir2Client):
    """An `EngineClient` of an `infir2 serve` without a trainer's routes."""

    async def info(self) -> ServerInfo:
        """As `EngineClient`: nothing is asked."""
        return ServerInfo("infir2")

    async def check_progress(self) -> None:
        """Return once the engine has ended a step: its own thread answers, between two of them.

        The server's /health says only that the engine was ready once. Raises as `HttpClient.get`.
        """
        await self._http.get("/metrics")


def serve_host(
    name: str,
    model: Path,
    options: EngineOptions,
    directory: Path,
    serve_options: Sequence[str] = (),
    variables: dict[str, str] | None = None,
    open_client: Callable[[str, str], EngineClient] = ServeClient,
    shows_log: bool = False,
    port: int = 0,
) -> ServerProcess:
    """An `infir2 serve` of `model` in a process of its own; arguments as `ServerProcess`."""

    def command(place: Place) -> ServerCommand:
        key_file = place.directory / "key"
        write_private(key_file, place.api_key)
        words = [sys.executable, "-m", "infir2", "serve", str(model.resolve())]
        words += ["--port", str(place.port), "--api-key-file", str(key_file)]
        words += [*options.arguments(), *serve_options]
        return ServerCommand(words, variables or {}, keeps_packages=True)

    return ServerProcess(name, command, open_client, lambda *_: None, directory, 3, shows_log, port)
