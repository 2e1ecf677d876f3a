"""Engines of one evaluation on several nodes, whose processes a launcher started.

Rank 0 runs evalscope. Every other rank starts the engines of its node and passes connections on to
them, which listen on loopback only. It says where in `run.dir`/engines/node-R.json, which only this
user can read: the nodes share the run directory. When the evaluation ends, rank 0 writes
node-R.end; when it dies, the launcher ends the others.
"""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from infir2.engines.remote import EngineError
from infir2.engines.server_process import write_private
from infir2.errors import ConfigError
from infir2.evaluate.engine_start import MAX_RESTARTS, StartedEngine
from infir2.files import disk_errors, read_own
from infir2.terminal import log

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Nodes:
    """Which process of how many this is; one for each node.

    `head` is the address of rank 0.
    """

    rank: int = 0
    number: int = 1
    head: str = ""


def this_node() -> Nodes:
    """What `infir2 launch` says of this process; one node without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Nodes()
    rank, number = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Nodes(rank, number, os.environ.get("MASTER_ADDR", ""))


class NodeEngine:
    """An engine of another node, as rank 0 sees it. It comes back at another address."""

    def __init__(self, directory: Path, rank: int, index: int) -> None:
        self._path, self._index = _file(directory, rank), index
        self._known: tuple[str, str] | None = None

    async def start(self) -> tuple[str, str]:
        """(base URL, key) once the other node has started it, or has started it again."""
        while (found := self._read()) is None or found == self._known:
            await asyncio.sleep(POLL_SECONDS)
        self._known = found
        return found

    @property
    def has_ended(self) -> bool:
        """Whether it has another address now."""
        return self._read() not in (None, self._known)

    async def watch(self) -> None:
        """Its own node does."""

    def _read(self) -> tuple[str, str] | None:
        engines = _read_json(self._path).get("engines", [])
        return tuple(engines[self._index]) if len(engines) > self._index else None


def forget_nodes(directory: Path) -> None:
    """Remove what the processes of an earlier job wrote; those of this job write it again."""
    for path in directory.glob("node-*"):
        path.unlink(missing_ok=True)


def end_nodes(directory: Path) -> None:
    """Let the other nodes end their engines and themselves."""
    for path in directory.glob("node-*.json"):
        write_private(path.with_suffix(".end"), json.dumps({"id": _read_json(path).get("id")}))


def serve_node(engines: Sequence[StartedEngine], nodes: Nodes, run_dir: Path) -> None:
    """Serve rank 0 with this node's engines until it needs them no more.

    `run_dir`/settings.json exists once rank 0 has accepted the command. Raises ConfigError for an
    engine that ends while it starts.
    """
    try:
        asyncio.run(_Server(engines, nodes, run_dir / "engines").run())
    finally:
        for engine in engines:
            engine.kill()


class _Server:
    """The engines of a node other than rank 0's."""

    def __init__(self, engines: Sequence[StartedEngine], nodes: Nodes, directory: Path) -> None:
        self._engines, self._directory = engines, directory
        self._path = _file(directory, nodes.rank)
        self._id, self._host = secrets.token_hex(8), own_address(nodes.head)
        self._relays: dict[int, asyncio.Server] = {}  # by the index of their engines
        self._keys = [""] * len(engines)
        self._restarts = [MAX_RESTARTS] * len(engines)

    async def run(self) -> None:
        await self._until(lambda: self._directory.with_name("settings.json").exists())
        await asyncio.gather(*map(self._start, range(len(self._engines))))
        watches = [asyncio.create_task(engine.watch()) for engine in self._engines]
        log(f"{len(watches)} engines are ready at {self._host}", self._path.stem)
        while _read_json(self._path.with_suffix(".end")).get("id") != self._id:
            for index, engine in enumerate(self._engines):
                if engine.has_ended and self._restarts[index]:
                    await self._restart(index)
            self._write()
            await asyncio.sleep(POLL_SECONDS)
        for watch in watches:
            watch.cancel()

    async def _until(self, is_true: Any) -> None:
        while not is_true():
            await asyncio.sleep(POLL_SECONDS)

    async def _start(self, index: int) -> None:
        """Start an engine, and a relay whose address nobody knows with another engine's key."""
        url, self._keys[index] = await self._engines[index].start()
        pass_on = partial(_pass_on, urllib.parse.urlsplit(url).port or 0)
        self._relays[index] = await asyncio.start_server(pass_on, self._host, 0)

    async def _restart(self, index: int) -> None:
        self._restarts[index] -= 1
        self._relays[index].close()
        log(f"engine {index + 1} has ended and is started again", self._path.stem)
        with contextlib.suppress(EngineError):
            await self._start(index)

    def _write(self) -> None:
        """Say where the engines are, unless the file says so already."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        said: dict[str, Any] = {"id": self._id, "engines": []}
        for index, key in enumerate(self._keys):
            sockets = self._relays[index].sockets
            port = sockets[0].getsockname()[1] if sockets else 0
            said["engines"].append([f"http://{host}:{port}/v1", key])
        if _read_json(self._path) != said:
            temporary = self._path.with_suffix(".new")
            with disk_errors(f"{self._path}: cannot be written"):
                write_private(temporary, json.dumps(said))
                temporary.replace(self._path)


async def _pass_on(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of rank 0 to a port of loopback; the engine there asks for its key."""
    try:
        to, back = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        writer.close()
        return
    with contextlib.suppress(asyncio.CancelledError):  # the end of this process
        await asyncio.gather(_copy(reader, back), _copy(to, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()
        await writer.wait_closed()


def own_address(head: str) -> str:
    """This machine's address on the way to `head`. Raises ConfigError without one."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"the first node, {head}, cannot be reached from this one ({error.strerror}); set "
            "MASTER_ADDR to its address."
        ) from error


def _file(directory: Path, rank: int) -> Path:
    return directory / f"node-{rank}.json"


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty for one that is missing or just being written."""
    try:
        found = json.loads(read_own(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
