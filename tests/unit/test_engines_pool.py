"""The pool: what one engine fails at, the others do; no wrong answer comes back."""

import asyncio
import queue
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_servers import FakeServer, scripted_response

import infir2.engines.pool_member
from infir2.engines.generate import generate, generate_all
from infir2.engines.infir2_server import Infir2Client
from infir2.engines.pool import EnginePool, Finished, _Dispatcher
from infir2.engines.pool_member import PoolLimits
from infir2.engines.remote import EngineGoneError
from infir2.engines.types import Completion, Request, SamplingParams
from infir2.engines.weight_directory import WeightDirectory
from infir2.errors import CheckFailedError, RankError
from infir2.model.hf_names import weights_digest
from infir2.model.safetensors_io import write_hf
from infir2.parallel.ranks import Ranks

WEIGHTS = [("model.w", torch.ones(4, 4, dtype=torch.bfloat16))]
LIMITS = PoolLimits(max_queued=4, silence_seconds=1.0, start_seconds=5.0)


class FakeHost:
    """Starts a `FakeServer`; the faults of the first start, then of the second, and so on."""

    def __init__(self, *faults: Sequence[str], max_restarts: int = 2) -> None:
        self.name, self.max_restarts = "engine", max_restarts
        self.servers: list[FakeServer] = []
        self.digest = weights_digest(WEIGHTS)
        self._faults = list(faults)
        self.may_start = True

    async def start(self) -> Infir2Client:
        if not self.may_start:
            raise EngineGoneError("scripted: it does not start")
        self.servers.append(FakeServer(self._faults.pop(0) if self._faults else ()))
        self.servers[-1].digest = self.digest
        return Infir2Client(self.servers[-1].url, "")

    def kill(self) -> None:
        if self.servers:
            self.servers[-1].stop()

    @property
    def generated(self) -> list[str]:
        """Ids of the generate requests that have arrived, at all starts."""
        calls = [call for server in self.servers for call in server.calls]
        return [body["id"] for route, body in calls if route == "/infir2/generate"]


class Pools:
    def __init__(self, directory: Path) -> None:
        self.directory, self.opened = directory, list[EnginePool]()
        self.shared = directory / "shm"
        self.shared.mkdir()
        write_hf(directory / "model", WEIGHTS, {"model_type": "qwen2"})

    def open(self, *hosts: FakeHost, limits: PoolLimits = LIMITS, version: int = 1) -> EnginePool:
        weights = WeightDirectory(self.directory / "model", self.directory, self.shared)
        self.opened.append(EnginePool(hosts, limits, weights, Ranks()))
        self.opened[-1].update_weights(WEIGHTS, version)
        return self.opened[-1]


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pools]:
    monkeypatch.setattr(infir2.engines.pool_member, "RESTART_SECONDS", 0.05)
    pools = Pools(tmp_path)
    yield pools
    for pool in pools.opened:
        pool.close()
    assert not list(pools.shared.iterdir()), "published weights are left"


def requests(count: int) -> list[Request]:
    params = SamplingParams(temperature=1.0, max_tokens=6, stop_ids=(96, 40))
    return [Request(f"0/p{n}/0", [n, 2 * n + 1], params, key=n) for n in range(count)]


def expect_all(pool: EnginePool, count: int) -> None:
    """Every request gets its own response, from the pool's version."""
    asked = requests(count)
    for request, completion in zip(asked, generate_all(pool, asked), strict=True):
        tokens, logprobs = scripted_response(list(request.token_ids), 6, (96, 40))
        assert completion.id == request.id
        assert completion.token_ids == tokens
        assert completion.rollout_logprobs.tolist() == logprobs
        assert completion.policy_version == pool.policy_version


def test_the_engines_share_the_work(pools: Pools) -> None:
    hosts = [FakeHost(), FakeHost(), FakeHost()]
    pool = pools.open(*hosts)
    expect_all(pool, 60)
    assert all(len(host.generated) >= 10 for host in hosts)
    generated = [request_id for host in hosts for request_id in host.generated]
    assert sorted(generated) == sorted(request.id for request in requests(60))
    assert pool.metrics()["engines_serving"] == 3
    pool.update_weights(WEIGHTS, 2)
    expect_all(pool, 10)
    assert pool.metrics()["publish_bytes"] == 32


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "status"),
        ("cut", "cut"),
        ("fewer_logprobs", "logprobs"),
        ("not_finite", "not_finite"),
    ],
)
def test_a_bad_answer_is_generated_again_elsewhere(pools: Pools, fault: str, reason: str) -> None:
    bad, good = FakeHost([fault]), FakeHost()
    pool = pools.open(bad, good)
    expect_all(pool, 12)
    metrics = pool.metrics()
    assert metrics[f"engine_retries_{reason}"] == 1
    assert metrics["engine_restarts"] == 0
    failed = bad.generated[0]
    assert failed in good.generated, "it keeps its id at the other engine"


def test_an_engine_that_answers_badly_again_and_again_is_started_again(pools: Pools) -> None:
    bad, good = FakeHost(["500"] * 20), FakeHost()
    pool = pools.open(bad, good)
    expect_all(pool, 40)
    assert len(bad.servers) == 2
    assert pool.metrics()["engine_restarts"] == 1


@pytest.mark.parametrize("fault", ["die", "hang", "old_version"])
def test_an_engine_that_dies_or_hangs_or_has_old_weights(pools: Pools, fault: str) -> None:
    bad, good = FakeHost(["", fault, "slow"]), FakeHost()
    limits = PoolLimits(max_queued=4, silence_seconds=0.4, start_seconds=5.0)
    pool = pools.open(bad, good, limits=limits)
    if fault == "hang":  # its health checks hang as well
        bad.servers[0].hold.clear()
    expect_all(pool, 40)
    assert set(bad.generated) & set(good.generated)
    wait_for(lambda: len(bad.servers) == 2 and pool.metrics()["engines_serving"] == 2)
    assert bad.servers[1].routes_called()[:2] == [
        "/infir2/update_weights",
        "/infir2/weights_digest",
    ]
    expect_all(pool, 20)


def test_a_restarted_engine_gets_no_request_before_its_weights(pools: Pools) -> None:
    bad, good = FakeHost(["die"]), FakeHost()
    pool = pools.open(bad, good)
    bad.may_start = False
    expect_all(pool, 8)
    bad.may_start = True
    wait_for(lambda: len(bad.servers) == 2)
    expect_all(pool, 40)
    routes = bad.servers[1].routes_called()
    assert routes[0] == "/infir2/update_weights"
    assert bad.servers[1].policy_version == 1


def test_alone_it_waits_for_its_own_restart(pools: Pools) -> None:
    pool = pools.open(FakeHost(["", "die"]))
    expect_all(pool, 10)


def test_too_many_failures_end_the_run(pools: Pools) -> None:
    pool = pools.open(FakeHost(["die"], ["die"], ["die"]))
    with pytest.raises(RankError, match="every rollout engine has failed"):
        expect_all(pool, 4)


def test_a_request_that_nobody_answers_ends_the_run(pools: Pools) -> None:
    hosts = [FakeHost(*[["fewer_logprobs"] * 9] * 9, max_restarts=9) for _ in range(2)]
    pool = pools.open(*hosts)
    with pytest.raises(RankError, match="6 attempts to generate request 0/p0/0 failed"):
        expect_all(pool, 1)


def test_a_canceled_request_ends_at_the_server(pools: Pools) -> None:
    host = FakeHost(["hang"])
    pool = pools.open(host)
    iterator = generate(pool, requests(3))
    next(iterator)
    iterator.close()
    assert pool.num_unfinished == 0
    canceled = [body["ids"] for route, body in host.servers[0].calls if route == "/infir2/cancel"]
    assert requests(1)[0].id in [request_id for ids in canceled for request_id in ids]
    expect_all(pool, 5)


def test_weights_that_differ_are_sent_once_more(pools: Pools) -> None:
    host = FakeHost()
    pool = pools.open(host)
    host.servers[0].digest = {"model.w": "0" * 64}
    with pytest.raises(CheckFailedError, match="does not hold the published weights"):
        pool.update_weights(WEIGHTS, 2)
    assert host.servers[0].routes_called().count("/infir2/update_weights") == 3


def test_weights_that_arrive_at_the_second_time(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = FakeHost()
    pool = pools.open(host)
    server, right = host.servers[0], host.servers[0].digest
    real = server.call

    def wrong_once(route: str, body: object) -> object:
        answer = real(route, body)
        updates = server.routes_called().count("/infir2/update_weights")
        server.digest = right if updates != 2 else {"model.w": "0" * 64}
        return answer

    monkeypatch.setattr(server, "call", wrong_once)
    pool.update_weights(WEIGHTS, 2)
    assert pool.metrics()["engine_weights_sent_again"] == 1
    expect_all(pool, 4)


def test_other_tensors_than_those_of_rollout_model_are_refused(pools: Pools) -> None:
    pool = pools.open(FakeHost())
    with pytest.raises(CheckFailedError, match="missing on one side"):
        pool.update_weights([("model.other", WEIGHTS[0][1])], 2)


def wait_for(condition, seconds: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_what_arrives_together_wakes_the_trainer_once() -> None:
    """Each time costs both threads a change of Python's lock."""
    completions = [Completion(str(i), [1], np.zeros(1, np.float32), "stop", 0) for i in range(100)]
    finished: Finished = queue.SimpleQueue()

    async def run() -> None:
        dispatcher = _Dispatcher([], PoolLimits(8, 1.0, 1.0), finished)
        for number, completion in enumerate(completions):
            dispatcher.finish(completion)
            if number == 59:
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        await dispatcher.close()

    asyncio.run(run())
    assert [finished.get_nowait() for _ in range(finished.qsize())] == [
        completions[:60],
        completions[60:],
    ]
