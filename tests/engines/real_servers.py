"""How tests start a real server and talk to it."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infir2.engines.remote import EngineClient
from infir2.engines.server_process import Place, ServerCommand, ServerProcess


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
