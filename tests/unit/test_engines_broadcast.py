"""Weights by broadcast: from the trainer's memory into a server that joins as SGLang does."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import engine_servers
import pytest
import torch
import torch.distributed as dist
from server_group import ServerGroup
from test_engines_sglang import FakeSglang, exported  # noqa: F401

import infir2.engines.weight_buckets
from infir2.engines.broadcast_group import BroadcastGroup, local_address
from infir2.engines.generate import generate_all
from infir2.engines.pool import EnginePool
from infir2.engines.pool_member import PoolLimits
from infir2.engines.remote import EngineError, PublishedWeights, WeightsDifferError
from infir2.engines.sglang import SglangClient
from infir2.engines.sglang_checksum import checksums
from infir2.engines.types import Request, SamplingParams
from infir2.engines.weight_buckets import WeightBuckets
from infir2.engines.weight_memory import WeightMemory
from infir2.errors import CheckFailedError, CheckpointError
from infir2.model.safetensors_io import HfWeights
from infir2.parallel.ranks import Ranks

CPU = torch.device("cpu")
ask = partial(engine_servers.ask, SglangClient)


class BroadcastSglang(FakeSglang):
    """Routes of SGLang that receive weights; the checksums are those of what has arrived."""

    model = Path()
    version = 0

    def __init__(self, model: Path, in_sessions: bool = False) -> None:
        super().__init__()
        self.model, self.group, self.is_paused = model, ServerGroup(), False
        self.group.session = False if in_sessions else None

    def call(self, route: str, body: Any) -> Any:
        if route == "/server_info":
            return super().call(route, body) | {"tp_size": 1}
        if route == "/update_weights_from_distributed":
            assert self.is_paused, "a request between two buckets would mix versions"
            self.policy_version = int(body.get("weight_version") or self.policy_version)
        if route in ("/pause_generation", "/continue_generation"):
            self.is_paused = route == "/pause_generation"
            return {}
        if route.startswith("/flush_cache"):
            return {}
        if route == "/weights_checker":
            held = WeightBuckets.of(self.group.held.items(), CPU)
            self.checksums = [
                dict(checksums(PublishedWeights(self.model, 0, 0, buckets=held), 0, 1))
            ]
        try:
            answer = self.group.call(route, body)
        except ConnectionError:
            self.stop()
            return {}
        return super().call(route, body) if answer is None else answer


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infir2.engines.weight_buckets, "BUCKET_BYTES", 100_000)


@pytest.fixture
def published(small_buckets: None, exported: PublishedWeights) -> PublishedWeights:  # noqa: F811
    weights = list(HfWeights(exported.directory))
    return WeightMemory(exported.directory, CPU).publish(weights, 4)


def publish(server: FakeSglang, weights: PublishedWeights) -> None:
    async def run(client: SglangClient) -> None:
        await client.update_weights(weights)
        await client.prove_weights(weights)

    ask(server, run)


def test_buckets_have_the_bytes_of_the_weights(published: PublishedWeights) -> None:
    assert published.buckets is not None
    files = HfWeights(published.directory)
    assert sorted(published.buckets.names()) == sorted(files.names())
    assert len(published.buckets.buckets) > 2
    for name in files.names():
        ours, theirs = published.buckets.read(name), files.read(name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    codes = sum(t.numel() for _, t in files if t.dtype == torch.float8_e4m3fn)
    assert published.num_bytes < 2.1 * codes  # FP8 codes travel as such


@pytest.mark.parametrize("in_sessions", [False, True], ids=["0.5.12", "0.5.23"])
def test_a_broadcast_is_proved_by_checksums(published: PublishedWeights, in_sessions: bool) -> None:
    with BroadcastSglang(published.directory, in_sessions) as server:
        publish(server, published)
        assert server.policy_version == 4
        assert not server.is_paused
        assert server.group.session in (None, False)
        routes = server.routes_called()
        assert routes.index("/pause_generation") < routes.index("/init_weights_update_group")
        bodies = [body for route, body in server.calls if route.endswith("_distributed")]
        assert [body["flush_cache"] for body in bodies[-2:]] == [False, True]
        assert routes[-1] == "/destroy_weights_update_group"
        server.group.held["model.norm.weight"][0] += 1
        with pytest.raises(WeightsDifferError, match="norm"):
            ask(server, lambda client: client.prove_weights(published))


def test_a_second_version_uses_the_same_group(published: PublishedWeights) -> None:
    async def run(client: SglangClient) -> None:
        for _ in range(2):
            await client.update_weights(published)
            await client.prove_weights(published)
        server.group.held["model.norm.weight"][0] += 1
        with pytest.raises(WeightsDifferError, match="norm"):
            await client.prove_weights(published)

    with BroadcastSglang(published.directory) as server:
        ask(server, run)
        assert server.routes_called().count("/init_weights_update_group") == 1


def test_a_server_that_dies_within_a_transfer_is_an_error(published: PublishedWeights) -> None:
    with BroadcastSglang(published.directory) as server:
        server.group.dies_at = 1
        begun = time.monotonic()
        with pytest.raises(EngineError):
            publish(server, published)
        assert time.monotonic() - begun < 10
        assert server.group.num_received == 1


def test_a_server_that_never_joins_does_not_hold_the_caller(published: PublishedWeights) -> None:
    async def run(client: SglangClient) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.update_weights(published), 0.5)

    with BroadcastSglang(published.directory) as server:
        server.hold.clear()
        ask(server, run)
        server.hold.set()


class Host:
    """Starts servers; the first dies in its second bucket."""

    name, max_restarts = "engine 1", 1

    def __init__(self, model: Path) -> None:
        self.model, self.servers = model, list[BroadcastSglang]()

    async def start(self) -> SglangClient:
        self.servers.append(BroadcastSglang(self.model))
        self.servers[-1].group.dies_at = 1 if len(self.servers) == 1 else -1
        return SglangClient(self.servers[-1].url, "")

    def kill(self) -> None:
        if self.servers:
            self.servers[-1].stop()


@pytest.fixture
def host(published: PublishedWeights) -> Iterator[Host]:
    host = Host(published.directory)
    yield host
    host.kill()


def test_a_server_that_is_started_again_joins_a_new_group(
    host: Host,
    published: PublishedWeights,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("infir2.engines.pool_member.RESTART_SECONDS", 0.05)
    monkeypatch.setattr("infir2.engines.sglang.MAX_PROBE_DIFFERENCE", float("inf"))
    limits = PoolLimits(max_queued=4, silence_seconds=5.0, start_seconds=20.0)
    pool = EnginePool([host], limits, WeightMemory(published.directory, CPU), Ranks())
    try:
        pool.update_weights(HfWeights(published.directory), 7)
        first, second = host.servers
        assert first.group.num_received == 1
        assert second.policy_version == 7
        metrics = pool.metrics()
        assert metrics["engine_restarts"] == 1
        said = capfd.readouterr().err
        assert "rl: engine 1 failed (" in said
        assert "the others do its work" not in said, "there are none"
        assert metrics["publish_bytes"] == published.num_bytes
    finally:
        pool.close()


def test_weights_that_are_not_those_of_the_model(published: PublishedWeights) -> None:
    memory = WeightMemory(published.directory, CPU)
    with pytest.raises(CheckFailedError, match=r"model\.norm\.weight is missing on one side"):
        memory.publish([p for p in HfWeights(published.directory) if "model.norm" not in p[0]], 1)
    with pytest.raises(CheckpointError, match="not finite"):
        memory.publish([("model.norm.weight", torch.tensor([float("nan")]))], 1)


def test_the_group_listens_where_the_server_is() -> None:
    group = BroadcastGroup(local_address("http://127.0.0.1:30000"), 2, CPU)
    assert group.address[0] == "127.0.0.1"
    assert not dist.is_initialized()


class TwoRanks(BroadcastSglang):
    """With `tensor_parallel` 2: both ranks receive every tensor and keep their part."""

    def call(self, route: str, body: Any) -> Any:
        if route == "/server_info":
            return super().call(route, body) | {"tp_size": 2}
        with ThreadPoolExecutor(1) as other_rank:
            other = None
            if route == "/init_weights_update_group":
                assert (body["world_size"], body["rank_offset"]) == (3, 1)
                other = other_rank.submit(self._join, body)
            elif route == "/update_weights_from_distributed":
                other = other_rank.submit(self._receive, body)
            answer = super().call(route, body)
            if other is not None:
                other.result()
        if route == "/weights_checker":
            held = WeightBuckets.of(self.group.held.items(), CPU)
            weights = PublishedWeights(self.model, 0, 0, buckets=held)
            self.checksums = [dict(checksums(weights, rank, 2)) for rank in range(2)]
            return FakeSglang.call(self, route, body)
        return answer

    def _join(self, body: Any) -> None:
        store: Any = dist.TCPStore(body["master_address"], int(body["master_port"]))
        for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        self.second = dist.ProcessGroupGloo(store, 2, 3, timedelta(seconds=20))
        self.num_bytes = 0

    def _receive(self, body: Any) -> None:
        sizes = zip(body["shapes"], body["dtypes"], strict=True)
        count = sum(torch.empty(s, dtype=getattr(torch, d), device="meta").nbytes for s, d in sizes)
        options = dist.BroadcastOptions()
        self.second.broadcast([torch.empty(count, dtype=torch.uint8)], options).wait()
        self.num_bytes += count


def test_every_rank_of_a_server_receives_and_is_proved(published: PublishedWeights) -> None:
    with TwoRanks(published.directory) as server:
        publish(server, published)
        assert server.num_bytes == published.num_bytes
        server.group.held["model.layers.0.mlp.down_proj.weight_scale_inv"] *= 2
        with pytest.raises(WeightsDifferError, match=r"rank 0 of 2"):
            ask(server, lambda client: client.prove_weights(published))


def test_two_servers_have_groups_of_their_own(
    published: PublishedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dies within its transfer; the other holds the weights and generates."""
    monkeypatch.setattr("infir2.engines.pool_member.RESTART_SECONDS", 0.05)
    monkeypatch.setattr("infir2.engines.sglang.MAX_PROBE_DIFFERENCE", float("inf"))
    hosts = [Host(published.directory), Host(published.directory)]
    hosts[1].name, hosts[1].servers = "engine 2", [BroadcastSglang(published.directory)]
    limits = PoolLimits(max_queued=4, silence_seconds=5.0, start_seconds=20.0)
    pool = EnginePool(hosts, limits, WeightMemory(published.directory, CPU), Ranks())
    try:
        for version in (7, 8):
            pool.update_weights(HfWeights(published.directory), version)
        servers = [host.servers[-1] for host in hosts]
        assert [server.policy_version for server in servers] == [8, 8]
        assert len({name for server in servers for name in server.group._groups}) == 2
        params = SamplingParams(1.0, 5, ())
        requests = [Request(str(i), [i + 1], params, i) for i in range(16)]
        assert all(each.policy_version == 8 for each in generate_all(pool, requests))
        assert all(server.routes_called().count("/generate") > 0 for server in servers)
    finally:
        pool.close()
        for host in hosts:
            host.kill()
