"""Tokens/s of RL rollouts from an SGLang server, beside the server's own, on one GPU.

    python bench/servers.py --out servers.json --python sglang-env/bin/python [--shape 1.5B]
        [--option=--attention-backend=triton ...]

The model has random weights. "client": --requests requests of --prompt random and --response
sampled tokens through `EnginePool`, as RL sends them. "server": the same in one batch to
/generate, with log-probabilities too, which leaves nothing to the client. Both take turns; the
best round of each counts. Variants: FP8, FP8 with an FP8 KV cache, BF16.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from engine import VOCABULARY, build, requests

from infir2.config.schema import RolloutSection
from infir2.engines.generate import generate_all
from infir2.engines.http_client import HttpClient
from infir2.engines.pool import EnginePool
from infir2.engines.pool_member import PoolLimits
from infir2.engines.server_process import Place, ServerCommand, ServerProcess
from infir2.engines.sglang import SglangClient, sglang_command
from infir2.engines.weight_directory import WeightDirectory
from infir2.model.hf_names import exported_fp8_weights, quantization_config
from infir2.model.safetensors_io import HfWeights, write_hf
from infir2.parallel.ranks import Ranks

VARIANTS: dict[str, tuple[bool, Literal["auto", "fp8_e4m3"]]] = {
    "fp8": (True, "auto"),
    "fp8-kv8": (True, "fp8_e4m3"),
    "bf16": (False, "auto"),
}  # FP8 weights, dtype of the KV cache
MEMORY_FRACTION, TIMEOUT_SECONDS = 0.5, 300.0


def export(directory: Path, shape: str, fp8: bool) -> int:
    """Write a Hugging Face directory of random weights. Returns the bytes of its tensors."""
    model = build(shape, fp8)
    config = model.config.to_hf() | {"eos_token_id": None}  # no token ends a response
    if fp8:
        config["quantization_config"] = quantization_config(model)
    tensors = list(exported_fp8_weights(model))
    write_hf(directory, tensors, config)
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)


def measure(arguments: argparse.Namespace, name: str, work: Path) -> dict[str, Any]:
    """One variant: start a server, publish, take turns."""
    fp8, kv_cache_dtype = VARIANTS[name]
    model = work / ("fp8" if fp8 else "bf16")
    num_bytes = 0 if model.exists() else export(model, arguments.shape, fp8)
    torch.cuda.empty_cache()
    rollout = RolloutSection(
        engine="sglang",
        python=arguments.python,
        model=str(model),
        max_running_requests=arguments.requests,
        memory_fraction=MEMORY_FRACTION,
        kv_cache_dtype=kv_cache_dtype,
        server_options=tuple(arguments.option),
    )
    places: list[Place] = []

    def command(place: Place) -> ServerCommand:
        places.append(place)
        return sglang_command(rollout, place)

    host = ServerProcess(name, command, SglangClient, lambda *_: None, work / "engines", 0)
    limits = PoolLimits(2 * arguments.requests, TIMEOUT_SECONDS / 2, TIMEOUT_SECONDS)
    begun = time.perf_counter()
    pool = EnginePool([host], limits, WeightDirectory(model, work / "weights"), Ranks())
    try:
        publish(pool, model, 1)
        found = {"start_s": time.perf_counter() - begun, "export_bytes": num_bytes}
        return found | rounds(arguments, pool, model, places[0])
    finally:
        pool.close()


def rounds(
    arguments: argparse.Namespace, pool: EnginePool, model: Path, place: Place
) -> dict[str, Any]:
    client, server, published = [], [], []
    tokens = arguments.requests * arguments.response
    for version in range(2, 2 + arguments.rounds):
        published.append(publish(pool, model, version))
        asked = requests(arguments)
        start = time.perf_counter()
        completions = generate_all(pool, asked)
        client.append(tokens / (time.perf_counter() - start))
        assert sum(len(each.token_ids) for each in completions) == tokens
        server.append(tokens / asyncio.run(batch_seconds(arguments, place)))
    return {
        "client_tokens_per_s": client,
        "server_tokens_per_s": server,
        "ratio": max(client) / max(server),
        "publish": published,
    }


def publish(pool: EnginePool, model: Path, version: int) -> dict[str, float]:
    """Publish the weights of `model` as a version; returns seconds and bytes."""

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        files = HfWeights(model)
        for name in files.names():
            yield name, files.read(name).cuda()  # where a trainer has them

    pool.update_weights(weights(), version)
    return {name: value for name, value in pool.metrics().items() if name.startswith("publish")}


async def batch_seconds(arguments: argparse.Namespace, place: Place) -> float:
    """The time of all requests as one batch, with an empty prefix cache."""
    client = HttpClient(f"http://127.0.0.1:{place.port}", place.api_key)
    await client.post("/flush_cache", {})
    body = {
        "input_ids": [list(request.token_ids) for request in requests(arguments)],
        "sampling_params": {"temperature": 1.0, "max_new_tokens": arguments.response},
        "return_logprob": True,
    }
    start = time.perf_counter()
    answers = await client.post("/generate", body)
    seconds = time.perf_counter() - start
    await client.close()
    assert len(answers) == arguments.requests
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", required=True, help="of the environment that has SGLang")
    parser.add_argument("--shape", default="1.5B")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--option", action="append", default=[], help="of SGLang's command line")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    results: dict[str, Any] = {"vocabulary": VOCABULARY, "shape": arguments.shape}
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.variants:
            results[name] = measure(arguments, name, Path(work))
            print(name, json.dumps(results[name]), flush=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
