"""`make test-engines` names the environments of vLLM and SGLang; without them these tests skip."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import stages

from infir2.engines.remote import EngineClient
from infir2.engines.server_process import Place, ServerCommand, ServerProcess

# What vLLM's attention takes on a CPU: a head of 32, and a width that is heads x head.
SHAPE = {
    "hidden_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "ffn_size": 384,
}


@pytest.fixture(scope="session")
def environments() -> Path:
    if not os.environ.get("INFIR2_ENGINES"):
        pytest.skip("needs the environments of vLLM and SGLang: make test-engines")
    return Path(os.environ["INFIR2_ENGINES"])


@pytest.fixture(scope="session")
def start(
    environments: Path, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """What `make_guessing_start` writes, of a shape that servers take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "SHAPE", SHAPE)
        yield stages.make_guessing_start(world, tmp_path_factory.mktemp("start"))


@contextmanager
def running(
    command: Callable[[Place], ServerCommand],
    open_client: Callable[[str, str], EngineClient],
    directory: Path,
) -> Iterator[tuple[str, str]]:
    """A server that we start as RL does; yields its URL and key."""
    places: list[Place] = []

    def remember(place: Place) -> ServerCommand:
        places.append(place)
        return command(place)

    host = ServerProcess("engine 1", remember, open_client, lambda *_: None, directory, 0)

    async def begin() -> None:
        await (await host.start()).close()

    try:
        asyncio.run(asyncio.wait_for(begin(), 500))
        yield f"http://127.0.0.1:{places[0].port}", places[0].api_key
    finally:
        host.kill()


def ask(client: Any, do: Callable[[Any], Coroutine[Any, Any, Any]], seconds: float = 60) -> Any:
    """The result of `do(client)`; the client is closed."""

    async def run() -> Any:
        try:
            return await asyncio.wait_for(do(client), seconds)
        finally:
            await client.close()

    return asyncio.run(run())
