"""Engines that `infir2 eval MODEL` starts: `infir2 serve`, whatever generates behind it."""

import asyncio
import errno
import socket
import time
from pathlib import Path

from infir2.engines.engine_options import EngineOptions, ServeClient, serve_host
from infir2.engines.remote import EngineError
from infir2.engines.servers import gpus_of
from infir2.errors import ConfigError

SERVED_NAME = "model"
MAX_RESTARTS = 3
PROBE_SECONDS, HANG_SECONDS = 15.0, 600.0


class StartedEngine:
    """One engine; its log and its command are in `run.dir`/engines."""

    def __init__(
        self,
        model: Path,
        options: EngineOptions,
        index: int,
        number: int,
        parallel: int,
        directory: Path,
        *,
        served_name: str = SERVED_NAME,
        port: int = 0,
        node: int = 0,
    ) -> None:
        """Engine `index` of `number` of this node, which have `parallel` requests together.

        `port` is of loopback, 0: a free one; `node` is the number of this node.
        """
        self._client: ServeClient | None = None  # of an engine that was ready
        self._address = ("", "")
        gpus = gpus_of(index, number, options.tensor_parallel)
        name = f"engine {node * number + index + 1}"
        self._host = serve_host(
            name,
            model,
            options,
            directory,
            (
                *("--served-name", served_name),
                *("--max-running-requests", str(-(-parallel // number))),
                *("--engine-dir", str(directory / name.replace(" ", "-"))),
            ),
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {},
            self._open_client,
            port=port,
        )

    async def start(self) -> tuple[str, str]:
        """Start it, or start it again; (base URL, key) once it has generated a token.

        Raises ConfigError if it ends while it starts the first time, EngineError later.
        """
        if self._client is not None:
            await self._client.close()
            self._client = None
        await self._host.start()
        self._client = self._opened
        url, key = self._address
        return f"{url}/v1", key

    @property
    def has_ended(self) -> bool:
        return self._host.has_ended

    async def watch(self) -> None:
        """Kill it when it ends no step for HANG_SECONDS; who asks it starts it again.

        An engine of SGLang or vLLM behind it has a watch of its own (`RemoteEngine`).
        """
        healthy, seconds = time.monotonic(), HANG_SECONDS
        while True:
            await asyncio.sleep(min(PROBE_SECONDS, seconds / 4))
            client, now = self._client, time.monotonic()
            if client is None or self.has_ended:
                healthy = now
                continue
            try:
                async with asyncio.timeout(max(0.0, healthy + seconds - now)):
                    await client.check_progress()
                healthy = time.monotonic()
            except (EngineError, TimeoutError):
                if time.monotonic() >= healthy + seconds:
                    await asyncio.to_thread(self.kill)

    def kill(self) -> None:
        self._host.kill()

    def _open_client(self, url: str, key: str) -> ServeClient:
        self._address, self._opened = (url, key), ServeClient(url, key)
        return self._opened


def check_port(port: int) -> None:
    """Raise ConfigError for a port of loopback that is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            is_used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is used on this machine" if is_used else "cannot be used"
            raise ConfigError(f"--port: {port} {reason}; name another one (API_PORT).") from error
