"""The client of SGLang against SGLang's own HTTP server, tokenizer manager and checksums."""

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_servers import scripted_response
from real_servers import ask, running
from safetensors.torch import load_file, save_file

import infir2.engines.weight_buckets
from infir2.config.schema import RolloutSection
from infir2.engines.http_client import HttpClient
from infir2.engines.remote import (
    EngineError,
    PublishedWeights,
    WeightProbe,
    WeightsDifferError,
)
from infir2.engines.sglang import SglangClient, sglang_command
from infir2.engines.types import Request, SamplingParams
from infir2.engines.weight_memory import WeightMemory
from infir2.errors import ConfigError
from infir2.model.safetensors_io import HfWeights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
REQUEST = Request("0/p/1", [3, 5, 8], SamplingParams(1.0, 6, (96,)), key=7)


@pytest.fixture(scope="module")
def server(
    sglang_python: str, start: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    rollout = RolloutSection(
        engine="sglang", python=sglang_python, model=str(start / "hf"), max_running_requests=16
    )
    directory = tmp_path_factory.mktemp("engines")
    with running(lambda place: sglang_command(rollout, place), SglangClient, directory) as place:
        yield place


@pytest.fixture
def client(server: tuple[str, str]) -> SglangClient:
    return SglangClient(*server)


@pytest.fixture(scope="module")
def other(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose last norm differs from "hf" in one value."""
    path = tmp_path_factory.mktemp("versions") / "other"
    shutil.copytree(start / "hf", path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


async def publish(client: SglangClient, weights: PublishedWeights) -> None:
    await client.update_weights(weights)
    await client.prove_weights(weights)


def test_it_says_what_it_is(client: SglangClient, start: Path) -> None:
    info = ask(client, lambda client: client.info())
    assert info.release == "sglang 0.5.12.post1"
    assert (info.model, info.max_running_requests) == (str(start / "hf"), 7)
    assert info.max_positions >= 1024


def test_a_request_and_its_completion(client: SglangClient, start: Path) -> None:
    async def run(client: SglangClient) -> Any:
        await publish(client, PublishedWeights(start / "hf", 1, 0))
        requests = [replace(REQUEST, id=f"0/p/{i}") for i in range(3)]
        return await asyncio.gather(*(client.generate(each, 1) for each in requests))

    tokens, logprobs = scripted_response([3, 5, 8], 6, [96])
    for i, completion in enumerate(ask(client, run)):
        assert (completion.id, completion.token_ids) == (f"0/p/{i}", tokens)
        assert completion.rollout_logprobs.tolist() == logprobs
        assert completion.policy_version == 1


def test_a_stop_token_ends_a_response(client: SglangClient, start: Path) -> None:
    tokens, _ = scripted_response([3, 5, 8], 6, [])
    request = Request("s", [3, 5, 8], SamplingParams(1.0, 6, (tokens[2],)), key=7)

    async def run(client: SglangClient) -> Any:
        await publish(client, PublishedWeights(start / "hf", 1, 0))
        return await client.generate(request, 1)

    completion = ask(client, run)
    assert (completion.token_ids, completion.finish) == (tokens[:3], "stop")


def test_another_version_is_refused(client: SglangClient, start: Path) -> None:
    async def run(client: SglangClient) -> None:
        await publish(client, PublishedWeights(start / "hf", 2, 0))
        with pytest.raises(EngineError, match="answers with weights '2'") as caught:
            await client.generate(REQUEST, 3)
        assert caught.value.reason == "version"

    ask(client, run)


def test_every_publish_is_proved_by_sglangs_own_hashes(
    client: SglangClient, start: Path, other: Path
) -> None:
    async def run(client: SglangClient) -> None:
        await publish(client, PublishedWeights(other, 3, 0))
        await publish(client, PublishedWeights(start / "hf", 4, 0))
        with pytest.raises(WeightsDifferError, match=r"model.norm.weight and 0 more"):
            await client.prove_weights(PublishedWeights(other, 4, 0))

    ask(client, run)


def test_a_reload_that_did_nothing_is_found(client: SglangClient, start: Path, other: Path) -> None:
    stale = other.with_name("stale")
    shutil.copytree(other, stale)

    async def run(client: SglangClient) -> None:
        await publish(client, PublishedWeights(start / "hf", 5, 0))
        with pytest.raises(WeightsDifferError, match=r"model.norm.weight"):
            await publish(client, PublishedWeights(stale, 6, 0))

    ask(client, run)


def test_a_broadcast_is_loaded_and_proved(
    client: SglangClient, start: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group and what is received are SGLang's own code, over gloo."""
    monkeypatch.setattr(infir2.engines.weight_buckets, "BUCKET_BYTES", 100_000)
    memory = WeightMemory(start / "hf", torch.device("cpu"))
    versions = [
        memory.publish(HfWeights(path), 20 + i) for i, path in enumerate((other, start / "hf"))
    ]
    assert versions[0].buckets is not None
    assert len(versions[0].buckets.buckets) > 2

    async def run(client: SglangClient) -> Any:
        for weights in versions:
            await publish(client, weights)
        with pytest.raises(WeightsDifferError, match=r"model.norm.weight and 0 more"):
            await client.prove_weights(versions[0])
        return await client.generate(REQUEST, 21)

    assert ask(client, run).policy_version == 21
    assert set(versions[0].seconds) == {"transfer"}


def test_it_sleeps_and_wakes_up_with_new_weights(client: SglangClient, start: Path) -> None:
    """A request that comes while it sleeps waits, and gets the new weights."""

    async def run(client: SglangClient) -> Any:
        await publish(client, PublishedWeights(start / "hf", 30, 0))
        await client.sleep()
        waiting = asyncio.create_task(client.generate(REQUEST, 31))
        done, _ = await asyncio.wait({waiting}, timeout=1)
        assert not done
        await publish(client, PublishedWeights(start / "hf", 31, 0))
        return await waiting

    assert ask(client, run).policy_version == 31


def test_a_directory_that_is_not_there(client: SglangClient, tmp_path: Path) -> None:
    async def run(client: SglangClient) -> None:
        with pytest.raises(EngineError):
            await client.update_weights(PublishedWeights(tmp_path / "gone", 7, 0))

    ask(client, run)


def test_the_probe_finds_a_full_cache_and_other_values(client: SglangClient, start: Path) -> None:
    token_ids = list(range(40))
    logprobs = np.array([-0.25 - token / 128 for token in token_ids[1:]], dtype=np.float32)
    right = PublishedWeights(start / "hf", 8, 0, WeightProbe(token_ids, logprobs))
    wrong = PublishedWeights(start / "hf", 8, 0, WeightProbe(token_ids, logprobs - 1))

    async def run(client: SglangClient) -> None:
        await publish(client, right)
        with pytest.raises(WeightsDifferError, match="old tokens"):
            await client.prove_weights(right)
        with pytest.raises(WeightsDifferError, match="on average"):
            await publish(client, wrong)

    ask(client, run)


def test_a_canceled_request_ends_at_the_server(client: SglangClient, start: Path) -> None:
    long = Request("long", [3, 5, 8], SamplingParams(1.0, 900, ()), key=7)

    async def num_running() -> int:
        return int((await client._http.get("/server_info"))["internal_states"][0]["running"])

    async def run(client: SglangClient) -> None:
        await publish(client, PublishedWeights(start / "hf", 9, 0))
        work = asyncio.create_task(client.generate(long, 9))
        await asyncio.sleep(0.5)
        assert await num_running() == 1
        await client._http.post("/abort_request", {"rid": client._server_ids["long"]})
        with pytest.raises(EngineError) as caught:
            await asyncio.wait_for(work, 5)
        assert caught.value.reason == "aborted"
        left = asyncio.create_task(client.generate(long, 9))
        await asyncio.sleep(0.5)
        left.cancel()
        await client.cancel(["long"])
        await asyncio.sleep(0.5)
        assert await num_running() == 0

    ask(client, run)


def test_the_key_guards_all_but_health_and_metrics(server: tuple[str, str]) -> None:
    async def run(anonymous: HttpClient) -> None:
        for route in ("/server_info", "/flush_cache", "/model_info", "/v1/models"):
            with pytest.raises(ConfigError, match="refuses the key"):
                await anonymous.get(route)
        for route in ("/generate", "/update_weights_from_disk", "/weights_checker"):
            with pytest.raises(ConfigError, match="refuses the key"):
                await anonymous.post(route, {})
        await anonymous.get("/health")

    ask(HttpClient(server[0]), run)
