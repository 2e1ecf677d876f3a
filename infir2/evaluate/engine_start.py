"""Engines that `infir2 eval MODEL` starts: `infir2 serve`, whatever generates behind it."""

from pathlib import Path

from infir2.engines.engine_options import EngineOptions, ServeClient, serve_host
from infir2.engines.servers import gpus_of

SERVED_NAME = "model"


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
    ) -> None:
        """Engine `index` of `number`, which have `parallel` requests at one time together."""
        self._address = ("", "")
        gpus = gpus_of(index, number, options.tensor_parallel)
        self._host = serve_host(
            f"engine {index + 1}",
            model,
            options,
            directory,
            (
                *("--served-name", SERVED_NAME),
                *("--max-running-requests", str(-(-parallel // number))),
                *("--engine-dir", str(directory / f"engine-{index + 1}")),
            ),
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {},
            self._open_client,
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

    def _open_client(self, url: str, key: str) -> ServeClient:
        self._address = (url, key)
        return ServeClient(url, key)
