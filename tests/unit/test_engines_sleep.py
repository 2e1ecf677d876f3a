"""Servers that give up their GPU memory while the trainer trains, and wake up for new weights."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import engine_servers
import pytest
import torch
from engine_servers import FakeServer
from test_engines_sglang import FakeSglang
from test_engines_vllm import FakeVllm

import infir2.engines.pool
import infir2.engines.pool_member
from infir2.config.schema import RolloutSection
from infir2.engines.generate import generate_all
from infir2.engines.pool import EnginePool
from infir2.engines.pool_member import PoolLimits
from infir2.engines.remote import EngineError, PublishedWeights
from infir2.engines.server_process import Place
from infir2.engines.sglang import SglangClient, sglang_command
from infir2.engines.types import CanSleep, Request, SamplingParams
from infir2.engines.vllm import VllmClient
from infir2.engines.vllm_command import vllm_command
from infir2.engines.weight_directory import WeightDirectory
from infir2.model.safetensors_io import write_hf
from infir2.parallel.ranks import Ranks

WEIGHTS = [("model.w", torch.ones(4, 4, dtype=torch.bfloat16))]
LIMITS = PoolLimits(max_queued=4, silence_seconds=0.4, start_seconds=5.0)
PUBLISHED = PublishedWeights(Path("/nowhere"), 3, 0)
FREE = {"awake": 10e9, "asleep": 60e9}


class SleepySglang(FakeSglang):
    """Ends itself, as SGLang does, when memory comes back that was never given up."""

    def __init__(self, faults: Sequence[str] = ()) -> None:
        super().__init__(faults)
        self.is_paused, self.freed = False, set[str]()

    def call(self, route: str, body: Any) -> Any:
        if route in ("/pause_generation", "/continue_generation"):
            self.is_paused = route == "/pause_generation"
        elif route == "/release_memory_occupation":
            assert self.is_paused, "SGLang asserts that it is idle"
            self.freed |= set(body["tags"])
        elif route == "/resume_memory_occupation":
            assert set(body["tags"]) <= self.freed
            self.freed -= set(body["tags"])
        elif route == "/update_weights_from_disk":
            assert "weights" not in self.freed
            return super().call(route, body)
        elif route == "/health_generate" and self.is_paused:
            self._stopped.wait()  # lets requests wait
        elif not route.startswith("/flush_cache"):
            return super().call(route, body)
        return None

    def answer_request(self, body: Any, fault: str) -> Any:
        assert not self.freed, "no request while it sleeps"
        return super().answer_request(body, fault)


class UnprovenClient(SglangClient):
    async def prove_weights(self, weights: PublishedWeights) -> None:
        """This test is not about that."""


class Host:
    name, max_restarts = "engine 1", 2

    def __init__(self) -> None:
        self.servers: list[SleepySglang] = []

    async def start(self) -> SglangClient:
        self.servers.append(SleepySglang())
        return UnprovenClient(self.servers[-1].url, "")

    def kill(self) -> None:
        if self.servers:
            self.servers[-1].stop()


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[EnginePool, Host]]:
    monkeypatch.setattr(infir2.engines.pool_member, "RESTART_SECONDS", 0.05)
    write_hf(tmp_path / "model", WEIGHTS, {"model_type": "qwen2"})
    (tmp_path / "shm").mkdir()
    directory = WeightDirectory(tmp_path / "model", tmp_path, tmp_path / "shm")
    host = Host()
    pool = EnginePool([host], LIMITS, directory, Ranks(), may_sleep=True)
    yield pool, host
    pool.close()


def expect_a_response(pool: EnginePool) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=6, stop_ids=(96,))
    (completion,) = generate_all(pool, [Request("r", [3, 4], params, key=1)])
    assert completion.policy_version == pool.policy_version


def test_engines_sleep_while_the_trainer_works(
    pool: tuple[EnginePool, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, host = pool

    def free_bytes() -> float:
        return FREE["asleep" if host.servers[-1].freed else "awake"]

    engines.update_weights(WEIGHTS, 1)
    expect_a_response(engines)
    monkeypatch.setattr(infir2.engines.pool, "_free_bytes", free_bytes)
    assert isinstance(engines, CanSleep)
    engines.sleep()
    server = host.servers[0]
    assert server.freed == {"weights", "kv_cache"}
    time.sleep(1.0)  # longer than silence_seconds: nothing asks it
    metrics = engines.metrics()
    assert (metrics["engines_serving"], metrics["engine_restarts"]) == (1, 0)
    assert metrics["sleep_freed_bytes"] == 50e9
    engines.update_weights(WEIGHTS, 2)
    expect_a_response(engines)
    routes = [route for route in server.routes_called() if "memory" in route or "disk" in route]
    assert routes[1:] == [
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/update_weights_from_disk",
        "/resume_memory_occupation",
    ]
    tags = [body["tags"] for route, body in server.calls if route.startswith("/resume")]
    assert tags == [["weights"], ["kv_cache"]]


def test_an_engine_that_dies_asleep_is_started_again(pool: tuple[EnginePool, Host]) -> None:
    engines, host = pool
    engines.update_weights(WEIGHTS, 1)
    engines.sleep()
    host.servers[0].stop()
    engines.update_weights(WEIGHTS, 2)
    expect_a_response(engines)
    assert len(host.servers) == 2
    assert engines.metrics()["engine_restarts"] == 1


def test_without_the_key_nothing_sleeps(tmp_path: Path) -> None:
    pool = EnginePool([], LIMITS, None, Ranks())
    pool.sleep()
    assert "sleep_freed_bytes" not in pool.metrics()
    pool.close()


def test_vllm_wakes_its_weights_before_and_its_cache_after_a_reload() -> None:
    async def run(client: VllmClient) -> None:
        await client.update_weights(PUBLISHED)
        await client.sleep()
        await client.update_weights(PUBLISHED)
        await client.update_weights(PUBLISHED)

    with FakeVllm() as server:
        engine_servers.ask(VllmClient, server, run)
    asleep = ["/wake_up?tags=weights", "/collective_rpc", "/reset_prefix_cache"]
    assert routes_of(server) == [
        *("/collective_rpc", "/reset_prefix_cache", "/sleep?level=2"),
        *(*asleep, "/wake_up?tags=kv_cache"),
        *("/collective_rpc", "/reset_prefix_cache"),
    ]


def test_a_server_that_cannot_sleep_says_so() -> None:
    """SGLang without torch_memory_saver ends itself; what answers is an error all the same."""

    class Refuses(SleepySglang):
        def call(self, route: str, body: Any) -> Any:
            if route == "/release_memory_occupation":
                raise engine_servers.Status(400)
            return super().call(route, body)

    with Refuses() as server, pytest.raises(EngineError, match="status 400"):
        engine_servers.ask(SglangClient, server, lambda client: client.sleep())


def test_the_servers_are_started_so_that_they_can_sleep(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 4096}')
    place = Place(31000, "k", tmp_path)
    awake = RolloutSection(model=str(tmp_path), engine="sglang", python="p")
    sleepy = awake.model_copy(update={"sleep": True})
    more = {"--enable-memory-saver", "--enable-weights-cpu-backup"}
    assert not more & set(sglang_command(awake, place).arguments)
    assert more < set(sglang_command(sleepy, place).arguments)
    assert "--enable-sleep-mode" in vllm_command(sleepy, place).arguments


def routes_of(server: FakeServer) -> list[str]:
    names = ("/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache")
    return [route for route in server.routes_called() if route.startswith(names)]
