"""Tokens/s that clients of `infir2 serve` receive from an engine as fast as a GPU's, on a CPU.

    python bench/streams.py MODEL --out streams.json [--clients 64] [--tokens 256] [--step-ms 6.4]

Scheduler, engine process and server are the real ones; a stand-in for a GPU's runner gives each
running sequence a random token every --step-ms, and costs its host as many calls of torch. MODEL
gives tokenizer and shape. The same requests run in process before. One process with plain sockets
plays the clients; all of them stream, with --plain only half of them.
"""

import argparse
import json
import os
import selectors
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from server import PROMPT_TOKENS, ROUNDS, in_process

from infir2.cli import main as infir2
from infir2.engines import native
from infir2.engines.kv_cache import KvCache, NewTokens
from infir2.engines.native import NativeEngine
from infir2.engines.runner import Decode, Sampled, SamplingRows
from infir2.engines.server import engine_process, engine_worker
from infir2.engines.types import TopLogprobs
from infir2.model import Decoder

DECODE_CALLS, PREFILL_CALLS = 12, 300  # of torch in a pass; each frees Python's lock
STEP_VARIABLE = "BENCH_STEP_SECONDS"


class StandInRunner:
    """A `Runner` whose passes take a fixed time on a device that does not exist."""

    page_size, passes_ahead, prefill_tokens = 128, 1, 8192

    def __init__(self, model: Decoder, num_slots: int) -> None:
        self._vocabulary, self._seconds = model.config.vocab_size, float(os.environ[STEP_VARIABLE])
        self._rng, self._end, self._tensor = np.random.default_rng(0), 0.0, torch.zeros(8)

    def prefill(
        self, cache: KvCache, new: Sequence[NewTokens], sampled: Sequence[int], how: SamplingRows
    ) -> Sampled:
        return self._pass(len(sampled), PREFILL_CALLS)

    def decode(self, cache: KvCache, new: Sequence[Decode], how: SamplingRows) -> Sampled:
        return self._pass(len(new), DECODE_CALLS)

    def reset(self) -> None:
        pass

    def _pass(self, count: int, calls: int) -> Sampled:
        for _ in range(calls):
            self._tensor.add_(1)
        self._end = max(self._end, time.perf_counter()) + self._seconds
        return _Pending(self._end, self._rng.integers(5, self._vocabulary, count).tolist())


class _Pending:
    def __init__(self, end: float, token_ids: list[int]) -> None:
        self._end, self._token_ids = end, token_ids

    def wait(self) -> tuple[list[int], list[float], list[TopLogprobs]]:
        time.sleep(max(0.0, self._end - time.perf_counter()))
        count = len(self._token_ids)
        return self._token_ids, [-1.0] * count, [[] for _ in range(count)]


def bodies(arguments: argparse.Namespace, vocabulary: int, seed: int) -> list[dict[str, Any]]:
    """Requests of /v1/completions."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": rng.integers(5, vocabulary, PROMPT_TOKENS).tolist(),
            "max_tokens": arguments.tokens,
            "ignore_eos": True,
        }
        | ({} if arguments.plain and number % 2 else {"stream": True})
        for number in range(arguments.clients)
    ]


def connect(port: int, body: dict[str, Any]) -> socket.socket:
    """Send a request."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + data)
    return connection


def over_http(port: int, requests: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens/s, and the events of all streams."""
    start, selector = time.perf_counter(), selectors.DefaultSelector()
    for body in requests:
        selector.register(connect(port, body), selectors.EVENT_READ, bytearray())
    answers = list[bytearray]()
    while len(answers) < len(requests):
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            if part := key.fileobj.recv(1 << 18):
                key.data.extend(part)
                continue
            selector.unregister(key.fileobj)
            key.fileobj.close()
            answers.append(key.data)
    seconds = time.perf_counter() - start
    assert all(b'"finish_reason":"length"' in each for each in answers)
    tokens = sum(body["max_tokens"] for body in requests)
    events = sum(each.count(b"data: {") for each in answers)
    return {"tokens_per_second": round(tokens / seconds), "events": events}


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def measure(arguments: argparse.Namespace, port: int, pid: int) -> list[dict[str, float]]:
    """The rounds, in process and served in turn."""
    model = Decoder.from_hf(arguments.model)
    engine = NativeEngine(model, arguments.clients, cache_gib=0.5, keep_cache=True)
    rounds = list[dict[str, float]]()
    for seed in range(ROUNDS):
        requests = bodies(arguments, model.config.vocab_size, seed)
        rate, before = in_process(engine, requests), cpu_seconds(pid)
        found: dict[str, float] = dict(over_http(port, requests))
        found["server_cpu_seconds"] = round(cpu_seconds(pid) - before, 2)
        found["in_process_tokens_per_second"] = round(rate)
        found["ratio"] = round(found["tokens_per_second"] / rate, 3)
        print(found, flush=True)
        rounds.append(found)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=6.4)
    parser.add_argument("--plain", action="store_true", help="half of the clients do not stream")
    arguments = parser.parse_args()
    os.environ[STEP_VARIABLE] = str(arguments.step_ms / 1000)
    torch.set_num_threads(1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", str(arguments.model), "--port", str(port), "--cache-gib", "0.5"]
    words += ["--max-running-requests", str(arguments.clients)]
    process = subprocess.Popen([sys.executable, __file__, *words])
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.2)
        rounds = measure(arguments, port, process.pid)
    finally:
        process.terminate()
        process.wait()
    result = {"step_ms": arguments.step_ms, "clients": arguments.clients, "rounds": rounds}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    native.open_runner = StandInRunner
    if sys.argv[1] == "worker":
        engine_worker.run_engine(Connection(int(sys.argv[2])), on_end=lambda: os._exit(0))
    elif sys.argv[1] == "serve":
        engine_process.COMMAND[:] = [sys.executable, __file__, "worker"]
        sys.exit(infir2())
    else:
        main()
