"""Engines on several nodes: the addresses they tell, what comes back, and the end."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from gateways import ask, open_gateway
from scripted_server import Script, serving

from infir2.errors import ConfigError
from infir2.evaluate import nodes
from infir2.evaluate.nodes import NodeEngine, Nodes, end_nodes, forget_nodes, own_address


class Engine:
    """In the place of a StartedEngine: a scripted server that can end."""

    def __init__(self, stack: ExitStack, script: Script) -> None:
        self.stack, self.script, self.starts, self.has_ended = stack, script, 0, True

    async def start(self) -> tuple[str, str]:
        self.starts += 1
        self.has_ended = False
        self.server = ExitStack()
        self.stack.enter_context(self.server)
        url = self.server.enter_context(serving(self.script)).url
        return url, f"key {self.starts}"

    async def watch(self) -> None:
        """It never hangs."""

    def end(self) -> None:
        self.server.close()
        self.has_ended = True

    def kill(self) -> None:
        self.end()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "POLL_SECONDS", 0.02)


@contextmanager
def serving_node(engine: Any, run_dir: Path) -> Iterator[threading.Thread]:
    """Rank 1 of 2, in a thread."""
    node = Nodes(1, 2, "127.0.0.1")
    thread = threading.Thread(target=nodes.serve_node, args=([engine], node, run_dir))
    thread.start()
    try:
        yield thread
    finally:
        end_nodes(run_dir / "engines")
        thread.join(20)
        assert not thread.is_alive()


def test_rank_0_asks_another_nodes_engine_through_its_address(tmp_path: Path) -> None:
    script, directory = Script(), tmp_path / "engines"
    directory.mkdir()
    with ExitStack() as stack:
        engine = Engine(stack, script)
        stack.enter_context(serving_node(engine, tmp_path))
        (tmp_path / "settings.json").touch()
        gateway = stack.enter_context(open_gateway(tmp_path, []))
        gateway.open_engines([], [NodeEngine(directory, 1, 0)])
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(lambda _: ask(gateway)[0], range(4))) == [200] * 4
        url = gateway.upstream.engines[0].url
        assert (directory / "node-1.json").stat().st_mode & 0o077 == 0
        engine.end()
        assert ask(gateway, "another")[0] == 200
        assert engine.starts == 2
        assert gateway.upstream.engines[0].url != url
        assert gateway.upstream.faults["restart"] == 1
    assert script.keys == {"Bearer key 1", "Bearer key 2"}


def test_files_of_an_earlier_job_say_nothing(tmp_path: Path) -> None:
    """Neither where its engines were, nor that it has ended."""
    directory = tmp_path / "engines"
    directory.mkdir()
    old = {"id": "old", "engines": [["http://127.0.0.1:1/v1", "old"]]}
    (directory / "node-1.json").write_text(json.dumps(old))
    end_nodes(directory)
    (tmp_path / "settings.json").touch()
    with ExitStack() as stack:
        engine = Engine(stack, Script())
        stack.enter_context(serving_node(engine, tmp_path))
        forget_nodes(directory)
        url, key = asyncio.run(asyncio.wait_for(NodeEngine(directory, 1, 0).start(), 10))
        assert (key, url.rpartition(":")[0]) == ("key 1", "http://127.0.0.1")
        forget_nodes(directory)  # rank 0 is started again, and this node is not
        again = asyncio.run(asyncio.wait_for(NodeEngine(directory, 1, 0).start(), 10))
        assert again == (url, key)


def test_a_node_that_rank_0_refused_starts_no_engine(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    engine = Engine(ExitStack(), Script())
    server = nodes._Server([engine], Nodes(1, 2, "127.0.0.1"), tmp_path / "engines")  # type: ignore
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(server.run(), 0.3))
    assert engine.starts == 0


def test_the_address_is_the_one_that_rank_0_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"

    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConfigError, match="the first node, n1, cannot be reached"):
        own_address("n1")
