"""Tokens/s of `infir2 serve` with 64 clients beside its engine in process; clients that leave.

    python bench/server.py MODEL --out server.json [--clients 64] [--requests 4] [--tokens 64]
    python bench/server.py MODEL --out server.json --leave 100

Each client sends its requests one after the other, plain ones of 24 random tokens, whose responses
have --tokens tokens. The engine in process gets the same requests at once and runs as many at a
time, both with one thread. On a busy machine the ratio of the CPU seconds says more than that of
the tokens/s: the clients need a processor of their own. With --leave N, half of 2 N clients go away
at a random moment, half of these streaming; the rest must receive what they receive alone.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import torch

from infir2.engines.generate import generate
from infir2.engines.native import NativeEngine
from infir2.engines.types import Request, SamplingParams
from infir2.model import Decoder

PROMPT_TOKENS, ROUNDS = 24, 5


def bodies(count: int, tokens: int, vocabulary: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests of /v1/completions by token ids; those of another seed share no prefix with them."""
    rng = random.Random(seed)
    return [
        {
            "prompt": [rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)],
            "max_tokens": tokens,
            "ignore_eos": True,
            "seed": number,
        }
        for number in range(count)
    ]


def in_process(engine: NativeEngine, requests: list[dict[str, Any]]) -> float:
    """Tokens/s of the same requests."""
    params = SamplingParams(1.0, requests[0]["max_tokens"], stop_ids=())
    batch = [Request(str(i), each["prompt"], params, key=i) for i, each in enumerate(requests)]
    start = time.perf_counter()
    tokens = sum(len(completion.token_ids) for completion in generate(engine, batch))
    return tokens / (time.perf_counter() - start)


@contextlib.contextmanager
def served(model: Path, clients: int) -> Iterator[tuple[str, int]]:
    """URL and process id of a server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--max-running-requests", str(clients)]
    process = subprocess.Popen(
        [sys.executable, "-m", "infir2", "serve", str(model), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health")
                break
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def over_http(url: str, requests: list[dict[str, Any]], clients: int) -> float:
    """Tokens/s."""

    async def client(http: httpx2.AsyncClient, own: list[dict[str, Any]]) -> int:
        tokens = 0
        for body in own:
            answer = await http.post(f"{url}/v1/completions", json=body)
            tokens += answer.json()["usage"]["completion_tokens"]
        return tokens

    async def all_clients() -> float:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=None, trust_env=False, limits=limits) as http:
            start = time.perf_counter()
            each = (client(http, requests[i::clients]) for i in range(clients))
            tokens = sum(await asyncio.gather(*each))
            return tokens / (time.perf_counter() - start)

    return asyncio.run(all_clients())


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def compare(
    engine: NativeEngine, url: str, pid: int, requests: list[dict[str, Any]], clients: int
) -> dict[str, float]:
    """One round: tokens/s and CPU seconds of the engine in this process and of the server."""
    start = time.process_time()
    rate = in_process(engine, requests)
    own = time.process_time() - start
    before = cpu_seconds(pid)
    served_rate = over_http(url, requests, clients)
    return {
        "in_process_tokens_per_second": round(rate),
        "served_tokens_per_second": round(served_rate),
        "in_process_cpu_seconds": round(own, 2),
        "served_cpu_seconds": round(cpu_seconds(pid) - before, 2),
    }


def leaving(url: str, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Every second client goes away; seconds until the server has no request, and what is right."""
    alone = [text_of(url, body) for body in requests[::20]]

    async def stay(http: httpx2.AsyncClient, body: dict[str, Any]) -> str:
        answer = await http.post(f"{url}/v1/completions", json=body)
        return str(answer.json()["choices"][0]["text"])

    async def leave(http: httpx2.AsyncClient, number: int, body: dict[str, Any]) -> None:
        whole = body | {"stream": bool(number % 4 == 1), "max_tokens": 900 - PROMPT_TOKENS}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(random.Random(number).uniform(0.05, 3.0)):
                async with http.stream("POST", f"{url}/v1/completions", json=whole) as answer:
                    async for _ in answer.aiter_bytes():
                        pass

    async def all_clients() -> tuple[list[Any], float]:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=None, trust_env=False, limits=limits) as http:
            stays = [asyncio.ensure_future(stay(http, body)) for body in requests[::2]]
            leaves = [leave(http, 2 * i + 1, body) for i, body in enumerate(requests[1::2])]
            await asyncio.gather(*leaves)
            texts = await asyncio.gather(*stays)
        return texts, time.perf_counter()

    texts, start = asyncio.run(all_clients())
    while unfinished(url):
        time.sleep(0.01)
    idle = time.perf_counter() - start
    right = sum(a == b for a, b in zip(texts[::10], alone, strict=True))
    return {
        "clients": len(requests),
        "left": len(requests[1::2]),
        "answered": len(texts),
        "compared_with_alone": [right, len(alone)],
        "seconds_until_idle": round(idle, 3),
    }


def text_of(url: str, body: dict[str, Any]) -> str:
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=None, trust_env=False)
    return str(answer.json()["choices"][0]["text"])


def unfinished(url: str) -> float:
    """Requests that run or wait."""
    lines = httpx2.get(f"{url}/metrics", trust_env=False).text.splitlines()
    names = ("infir2_requests_running ", "infir2_requests_waiting ")
    return sum(float(line.split()[1]) for line in lines if line.startswith(names))


def median_ratio(rounds: list[dict[str, float]], what: str) -> float:
    """Of served to in process, over the rounds."""
    return round(
        statistics.median(r[f"served_{what}"] / r[f"in_process_{what}"] for r in rounds), 3
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--leave", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Decoder.from_hf(options.model)
    vocabulary = model.config.vocab_size
    with served(options.model, options.clients) as (url, pid):
        if options.leave:
            requests = bodies(2 * options.leave, options.tokens, vocabulary)
            result: dict[str, Any] = leaving(url, requests)
        else:
            count = options.clients * options.requests
            engine = NativeEngine(model, options.clients, cache_gib=0.5)
            rounds = []
            for seed in range(ROUNDS):
                requests = bodies(count, options.tokens, vocabulary, seed)
                rounds.append(compare(engine, url, pid, requests, options.clients))
            result = {
                "rounds": rounds,
                "ratio_of_tokens_per_second": median_ratio(rounds, "tokens_per_second"),
                "ratio_of_cpu_seconds": median_ratio(rounds, "cpu_seconds"),
            }
    result["parameters"] = model.config.num_parameters
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
