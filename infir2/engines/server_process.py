"""Servers that we start, and servers that run already, as hosts of a pool.

A server of ours gets a free loopback port and a key in a file that only this user can read; its
command, its log and its release are in `run.dir`/engines. `process_guard.py` ends it, whatever
happens to this process.
"""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from infir2.engines.remote import (
    BadAnswerError,
    EngineClient,
    EngineError,
    EngineGoneError,
    ServerInfo,
)
from infir2.errors import ConfigError
from infir2.files import disk_errors

GUARD = Path(__file__).with_name("process_guard.py")
POLL_SECONDS, HEALTH_SECONDS, END_SECONDS = 0.5, 30.0, 30.0
LOG_LINES = 12
# SGLang adds 10,000 for a port of its own; Linux gives ports above 32,767 to any connection.
PORTS = range(20000, 32768)
# A server is no rank of this run, and the trainer's packages are not its own.
_OWN_PREFIXES = ("INFIR2_", "TORCHELASTIC_", "RAY_", "GROUP_", "ROLE_", "LOCAL_")
_OWN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONHOME")

OpenClient = Callable[[str, str], EngineClient]  # from URL and key
CheckInfo = Callable[[str, ServerInfo], None]  # name and info; raises ConfigError


@dataclass(frozen=True)
class Place:
    """Where a server listens and what it requires of its clients.

    Attributes:
        port: of `host`.
        api_key: the key.
        directory: only this user can read it; for files with the key.
        host: address on which it listens; another than loopback only behind the key.
    """

    port: int
    api_key: str
    directory: Path
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True)
class ServerCommand:
    """How to start a server.

    Attributes:
        arguments: its command line; without the key, which everybody on the machine could read.
        variables: what its environment has beside ours.
        secrets: the same for values that are not recorded.
        keeps_packages: whether it runs in our environment, with our PYTHONPATH.
    """

    arguments: list[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    keeps_packages: bool = False


class ServerProcess:
    """An `EngineHost`: a server that we start."""

    def __init__(
        self,
        name: str,
        command: Callable[[Place], ServerCommand],
        open_client: OpenClient,
        check_info: CheckInfo,
        directory: Path,
        max_restarts: int,
        shows_log: bool = False,
        port: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        """`directory`, of a run `run.dir`/engines, has its files; `name` without spaces names them.

        With `shows_log` its messages go to this process' stderr instead of its log. `port` is of
        `host`; 0: a free one.
        """
        self.name, self.max_restarts = name, max_restarts
        self._command, self._open_client, self._check_info = command, open_client, check_info
        self._directory, self._port, self._host = directory, port, host
        self.place: Place | None = None  # after `start`
        self._stem, self._shows_log = name.replace(" ", "-"), shows_log
        self._process: subprocess.Popen[bytes] | None = None
        self._was_ready = False

    async def start(self) -> EngineClient:
        """As `EngineHost`. Raises ConfigError if the server ends while it starts the first time."""
        self.kill()
        with disk_errors(f"{self._directory}: cannot hold the files of {self.name}"):
            self.place = place = self._make_place()
            command = self._command(place)
            self._record(command)
            self._process = self._spawn(command)
        client = self._open_client(place.url, place.api_key)
        try:
            await self._until_ready(client)
            info = await client.info()
            self._check_info(self.name, info)
        except BaseException:
            await client.close()
            raise
        self._record(command, info)
        self._was_ready = True
        return client

    @property
    def has_ended(self) -> bool:
        """Whether it is not running: it ended, was killed, or was never started."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """As `EngineHost`."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # the guard kills everything
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()

    async def _until_ready(self, client: EngineClient) -> None:
        while True:
            self._require_running()
            try:
                async with asyncio.timeout(HEALTH_SECONDS):
                    return await client.check_health()
            except (EngineGoneError, BadAnswerError, TimeoutError):
                await asyncio.sleep(POLL_SECONDS)

    def how_it_ended(self) -> str:
        """The sentence about a server that has ended; "" while it runs."""
        code = None if self._process is None else self._process.poll()
        if code is None:
            return ""
        if self._shows_log:
            return f"{self.name} did not start; its message is above."
        when = "" if self._was_ready else " while it started"
        lines = "\n".join(_last_lines(self._log))
        return f"{self.name} ended{when} (code {code}); its log {self._log} ends with:\n{lines}"

    def _require_running(self) -> None:
        if not (message := self.how_it_ended()):
            return
        if self._was_ready:
            raise EngineError("start", message)
        error = ConfigError(message)
        if self._shows_log and self._process is not None:  # a command of ours
            error.exit_code = self._process.returncode
        raise error

    def _make_place(self) -> Place:
        self._directory.mkdir(parents=True, exist_ok=True)
        keys = self._directory / f"{self._stem}.key"
        keys.mkdir(mode=0o700, exist_ok=True)
        keys.chmod(0o700)
        port = self._port or free_port(self._host)
        # Hexadecimal: SGLang takes a key that begins with "-" for an option.
        return Place(port, secrets.token_hex(32), keys, self._host)

    def _spawn(self, command: ServerCommand) -> "subprocess.Popen[bytes]":
        guarded = [sys.executable, "-I", "-S", str(GUARD), *command.arguments]
        environment = _environment(command.keeps_packages)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        # SGLang's log has all its options, with the key: nobody else may read it.
        log = os.dup(2) if self._shows_log else os.open(self._log, flags, 0o600)
        try:
            return subprocess.Popen(
                guarded,
                env=environment | dict(command.variables) | dict(command.secrets),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)

    def _record(self, command: ServerCommand, info: ServerInfo | None = None) -> None:
        row = {"command": command.arguments, "variables": dict(command.variables)}
        row |= {"server": asdict(info)} if info else {}
        text = json.dumps(row, indent=2) + "\n"
        (self._directory / f"{self._stem}.json").write_text(text, encoding="utf-8")

    @property
    def _log(self) -> Path:
        return self._directory / f"{self._stem}.log"


class RunningServer:
    """An `EngineHost`: a server that the user started."""

    def __init__(
        self,
        url: str,
        api_key: str,
        open_client: OpenClient,
        check_info: CheckInfo,
        max_restarts: int,
    ) -> None:
        self.name, self.max_restarts = f"the engine at {url}", max_restarts
        self._url, self._api_key = url, api_key
        self._open_client, self._check_info = open_client, check_info
        self._was_ready = False

    async def start(self) -> EngineClient:
        """As `EngineHost`: return when it generates. Raises ConfigError if nothing answers."""
        client = self._open_client(self._url, self._api_key)
        try:
            while not await self._is_ready(client):
                await asyncio.sleep(POLL_SECONDS)
            self._check_info(self.name, await client.info())
        except BaseException:
            await client.close()
            raise
        self._was_ready = True
        return client

    def kill(self) -> None:
        """As `EngineHost`: it is not ours to end."""

    def how_it_ended(self) -> str:
        """As `ServerProcess`: it may come back."""
        return ""

    async def _is_ready(self, client: EngineClient) -> bool:
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await client.check_health()
        except EngineGoneError as error:
            if not self._was_ready:
                raise ConfigError(
                    f"rollout.urls: no server answers at {self._url}; start it, or correct the URL."
                ) from error
            return False
        except (BadAnswerError, TimeoutError):
            return False
        return True


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _environment(keeps_packages: bool) -> dict[str, str]:
    kept = ("PYTHONPATH", "PYTHONHOME") if keeps_packages else ()
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or not (name.startswith(_OWN_PREFIXES) or name in _OWN_VARIABLES)
    }


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host`, one of PORTS, that nobody uses now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        port = secrets.choice(PORTS)
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line[:300] for line in text.splitlines() if line.strip()][-LOG_LINES:]
