"""Servers that we start: ready when they generate, and gone with the trainer, however it ends."""

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_servers import FakeServer, Status
from stages import gone

from infir2.engines import server_process
from infir2.engines.infir2_server import Infir2Client
from infir2.engines.process_guard import descendants
from infir2.engines.remote import EngineClient, ServerInfo
from infir2.engines.server_process import (
    OpenClient,
    Place,
    RunningServer,
    ServerCommand,
    ServerProcess,
)
from infir2.engines.sglang import SglangClient
from infir2.engines.vllm import VllmClient
from infir2.errors import ConfigError

FAKE = Path(__file__).parents[1] / "engine_servers.py"


def fake_command(place: Place) -> ServerCommand:
    key = place.directory / "key"
    key.write_text(place.api_key)
    arguments = [sys.executable, str(FAKE), str(place.port), str(key)]
    return ServerCommand(arguments, {"A_FLAG": "1"}, {"A_SECRET": "s3cret"})


def accept(_name: str, _info: ServerInfo) -> None:
    pass


def make_host(directory: Path, command=fake_command) -> ServerProcess:  # type: ignore[no-untyped-def]
    return ServerProcess("engine 1", command, Infir2Client, accept, directory, max_restarts=3)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ServerProcess]:
    host = make_host(tmp_path / "engines")
    yield host
    host.kill()


def start(host: ServerProcess | RunningServer) -> EngineClient:
    async def run() -> EngineClient:
        client = await asyncio.wait_for(host.start(), 30)
        await client.close()
        return client

    return asyncio.run(run())


def test_it_starts_and_stops_with_all_that_it_started(
    host: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("INFIR2_ENGINE_KEY", "mine")
    before = set(descendants(os.getpid()))
    client = start(host)
    pids = sorted(set(descendants(os.getpid())) - before)
    assert len(pids) == 3, "guard, server and its child"
    assert client.url.startswith("http://127.0.0.1:")
    key = (tmp_path / "engines/engine-1.key/key").read_text()
    for pid in pids:
        assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"A_FLAG=1" in variables
        assert not [each for each in variables if each.startswith((b"RANK=", b"INFIR2_"))]
    host.kill()
    assert gone(pids)


def test_what_it_ran_is_recorded_without_secrets(host: ServerProcess, tmp_path: Path) -> None:
    start(host)
    directory = tmp_path / "engines"
    row = json.loads((directory / "engine-1.json").read_text())
    assert row["command"][1] == str(FAKE)
    assert row["variables"] == {"A_FLAG": "1"}
    assert row["server"]["release"] == "infir2"
    key = (directory / "engine-1.key/key").read_text()
    for name in ("engine-1.json", "engine-1.log"):
        assert key not in (directory / name).read_text()
        assert "s3cret" not in (directory / name).read_text()
    assert stat.S_IMODE((directory / "engine-1.key").stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "engine-1.log").stat().st_mode) == 0o600


def test_its_port_leaves_room_for_those_that_sglang_derives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang ends when its port + 10,000 is none; a port that is taken is not chosen."""
    taken, ports = socket.socket(), []

    def choose(candidates: range) -> int:
        assert max(candidates) + 10_000 < 65_536
        return ports.pop()

    with taken:
        taken.bind(("127.0.0.1", 0))
        ports = [23_456, taken.getsockname()[1]]
        monkeypatch.setattr("infir2.engines.server_process.secrets.choice", choose)
        assert server_process.free_port() == 23_456


def test_one_that_ends_while_it_starts_says_why(tmp_path: Path) -> None:
    def command(_place: Place) -> ServerCommand:
        return ServerCommand([sys.executable, "-c", "raise SystemExit('CUDA: no device')"])

    host = make_host(tmp_path, command)
    with pytest.raises(ConfigError, match=r"engine 1 ended while it started \(code 1\)") as caught:
        start(host)
    assert str(caught.value).endswith("CUDA: no device")


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    host = make_host(tmp_path, lambda _: ServerCommand(["/no/such/python"]))
    with pytest.raises(ConfigError, match="/no/such/python: No such file") as caught:
        start(host)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_trainer_ends(tmp_path: Path, number: int) -> None:
    script = (
        "import sys, time; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\n"
        "from test_engines_server_process import make_host, start\n"
        "host = make_host(Path(sys.argv[3])); start(host); print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(tmp_path)]
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, *folders], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    pids = descendants(trainer.pid)
    assert len(pids) == 3
    stopped = int(re.findall(r"child (\d+)", (tmp_path / "engine-1.log").read_text())[0])
    os.kill(stopped, signal.SIGSTOP)
    trainer.send_signal(number)
    trainer.wait()
    assert gone(pids)


def test_a_server_that_is_killed_ends_its_guard_and_children(host: ServerProcess) -> None:
    before = set(descendants(os.getpid()))
    start(host)
    pids = sorted(set(descendants(os.getpid())) - before)
    os.kill(pids[1], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while len(set(descendants(os.getpid())) - before) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)  # the guard itself is a zombie until `kill` reaps it
    host.kill()
    assert gone(pids)


def test_a_running_server_is_used_as_it_is() -> None:
    with FakeServer(api_key="k") as server:
        host = RunningServer(server.url, "k", Infir2Client, accept, 1)
        assert start(host).url == server.url
        host.kill()
        assert start(host).url == server.url
        with pytest.raises(ConfigError, match="refuses the key"):
            start(RunningServer(server.url, "other", Infir2Client, accept, 1))
    with pytest.raises(ConfigError, match="no server answers at"):
        start(RunningServer(server.url, "k", Infir2Client, accept, 1))


class Incomplete(FakeServer):
    """A server that has none of some routes."""

    missing: tuple[str, ...] = ("/",)

    def call(self, route: str, body: Any) -> Any:
        if route.startswith(self.missing):
            raise Status(404)
        return super().call(route, body)


@pytest.mark.parametrize(
    ("client", "missing", "said"),
    [
        (SglangClient, ("/",), "no route /health_generate: it is no SGLang, or one older than 0.5"),
        (VllmClient, ("/",), "no route /inference/v1/generate: it is no vLLM, or one older than 0"),
        (Infir2Client, ("/",), "is no infir2 serve"),
        (Infir2Client, ("/infir2/info",), "start it with --weight-updates"),
    ],
)
def test_a_server_that_lacks_a_route_is_refused_at_once(
    client: OpenClient, missing: tuple[str, ...], said: str
) -> None:
    """Waiting would not give it one."""
    with Incomplete(api_key="k") as server:
        server.missing = missing
        with pytest.raises(ConfigError, match=said):
            start(RunningServer(server.url, "k", client, accept, 1))
