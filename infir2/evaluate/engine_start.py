"""Engines that `infir2 eval MODEL` starts: servers of ours, SGLang's or vLLM's, on loopback."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from infir2.config.schema import RolloutSection
from infir2.engines.infir2_server import infir2_command
from infir2.engines.remote import EngineClient
from infir2.engines.server_process import Place, ServerCommand, ServerProcess
from infir2.engines.servers import KINDS, gpus_of
from infir2.engines.sglang import sglang_command
from infir2.engines.vllm_command import vllm_command
from infir2.errors import ConfigError

SERVED_NAME = "model"
MAX_RESTARTS = 3


@dataclass(frozen=True)
class EngineOptions:
    """How the engines of a model are started.

    Attributes:
        kind: "native" (infir2 serve), "sglang" or "vllm".
        number: of engines.
        tensor_parallel: GPUs of each.
        python: the interpreter of SGLang's or vLLM's environment.
        memory_fraction: of a GPU that each may take; 0: its own default.
        parallel: requests at one time of all of them.
    """

    kind: str = "native"
    number: int = 1
    tensor_parallel: int = 1
    python: str = ""
    memory_fraction: float = 0.0
    parallel: int = 64

    def check(self) -> None:
        """Raise ConfigError for an engine without its environment."""
        if self.kind != "native" and not Path(self.python).is_file():
            raise ConfigError(
                f"--engine {self.kind} needs --python, the interpreter of an environment with "
                f"{self.kind}, such as {self.kind}-env/bin/python"
                + (f"; {self.python} does not exist." if self.python else ".")
            )


class StartedEngine:
    """One engine; its log and its command are in `run.dir`/engines."""

    def __init__(self, model: Path, options: EngineOptions, index: int, directory: Path) -> None:
        self._address = ("", "")
        self._open: Callable[[str, str], EngineClient] = KINDS[_kind(options)].open_client
        self._host = ServerProcess(
            f"engine {index + 1}",
            lambda place: _command(model, options, index, place),
            self._open_client,
            lambda _name, _info: None,
            directory,
            MAX_RESTARTS,
        )

    async def start(self) -> tuple[str, str]:
        """Start it, or start it again; (base URL, key) once it has generated a token.

        Raises ConfigError if it ends while it starts the first time, EngineError later.
        """
        client = await self._host.start()
        await client.close()
        url, key = self._address
        return f"{url}/v1", key

    @property
    def has_ended(self) -> bool:
        return self._host.has_ended

    def kill(self) -> None:
        self._host.kill()

    def _open_client(self, url: str, key: str) -> EngineClient:
        self._address = (url, key)
        return self._open(url, key)


def _kind(options: EngineOptions) -> str:
    return "infir2" if options.kind == "native" else options.kind


def _command(model: Path, options: EngineOptions, index: int, place: Place) -> ServerCommand:
    rollout = RolloutSection(
        model=str(model.resolve()),
        python=options.python,
        tensor_parallel=options.tensor_parallel,
        memory_fraction=options.memory_fraction,
        max_running_requests=max(1, -(-options.parallel // options.number)),
    )
    if options.kind == "native":
        made = infir2_command(rollout, place)
    elif options.kind == "sglang":
        made = sglang_command(rollout, place)
        # For RL it gets tokens and needs no chat template; here it does.
        kept = [word for word in made.arguments if word != "--skip-tokenizer-init"]
        made = replace(made, arguments=kept)
    else:
        made = vllm_command(rollout, place)
    name_option = "--served-name" if options.kind == "native" else "--served-model-name"
    made = replace(made, arguments=[*made.arguments, name_option, SERVED_NAME])
    gpus = gpus_of(index, options.number, options.tensor_parallel)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return replace(made, variables={**made.variables, **visible})
