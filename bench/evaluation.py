"""Tokens/s of a whole evaluation by evalscope, beside SGLang alone with the same work.

    infir2 eval MODEL --benchmarks ... --run.dir RUN --engine sglang --python PYTHON ...
    python bench/evaluation.py --run RUN --model MODEL --python PYTHON --parallel N --out FILE
        [--option=--attention-backend=triton ...]

The evaluation's time is that of its benchmarks, from the start of each evalscope to its verdicts.
SGLang alone gets as many prompts and responses of the same lengths in one batch to /generate, with
the same samples for each prompt; no token ends a response there. With --make SHAPE it writes MODEL
in FP8 with random weights and the tokenizer of --tokenizer, and nothing else.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engine import SHAPES, build

from infir2.config.schema import RolloutSection
from infir2.data import load_tokenizer
from infir2.engines.http_client import HttpClient
from infir2.engines.server_process import Place, ServerCommand, ServerProcess
from infir2.engines.sglang import SglangClient, sglang_command
from infir2.model import write_hf
from infir2.model.hf_names import exported_fp8_weights, quantization_config


def make(arguments: argparse.Namespace) -> None:
    """An FP8 export whose responses reach their limit: a stop token is never among the likely."""
    tokenizer = load_tokenizer(arguments.tokenizer)
    changes = {"max_positions": 8192, "tie_embeddings": False}
    decoder = build(arguments.make, fp8=True, vocabulary=tokenizer.vocab_size, **changes)
    with torch.no_grad():
        decoder.head_weight.mul_(10.0)
        decoder.head_weight[list(tokenizer.eos_token_ids)] = 0.0
    config = decoder.config.to_hf() | {"quantization_config": quantization_config(decoder)}
    write_hf(arguments.model, exported_fp8_weights(decoder), config, arguments.tokenizer)


def work_of(run: Path) -> list[tuple[str, int, int]]:
    """(prompt, tokens of it, tokens of the response) of each answer."""
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    usages = [(row["prompt"], row["response"]["usage"]) for row in rows if "response" in row]
    return [(p, usage["prompt_tokens"], usage["completion_tokens"]) for p, usage in usages]


async def alone(
    host: ServerProcess, place: list[Place], batch: dict[str, Any], repeats: int
) -> list[float]:
    """Seconds of the batch, each time with an empty prefix cache."""
    client = await host.start()
    await client.close()
    http = HttpClient(f"http://127.0.0.1:{place[-1].port}", place[-1].api_key)
    seconds = []
    for _ in range(repeats):
        await http.post("/flush_cache", {})
        start = time.perf_counter()
        await http.post("/generate", batch)
        seconds.append(time.perf_counter() - start)
    await http.close()
    return seconds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    work = work_of(arguments.run)
    tokens = sum(response for _, _, response in work)
    result = json.loads((arguments.run / "result.json").read_text())
    whole = sum(each["seconds"] for each in result["benchmarks"].values())
    places: list[Place] = []
    rollout = RolloutSection(
        engine="sglang",
        python=arguments.python,
        model=str(arguments.model),
        max_running_requests=arguments.parallel,
        memory_fraction=arguments.memory_fraction,
        server_options=tuple(arguments.option),
    )

    def command(place: Place) -> ServerCommand:
        places.append(place)
        return sglang_command(rollout, place)

    batch = {
        "input_ids": [_random_ids(prompt, length) for prompt, length, _ in work],
        "sampling_params": [
            {"temperature": 0.65, "top_p": 0.95, "max_new_tokens": n, "ignore_eos": True}
            for _, _, n in work
        ],
    }
    with tempfile.TemporaryDirectory() as directory:
        host = ServerProcess(
            "alone", command, SglangClient, lambda *_: None, Path(directory), max_restarts=0
        )
        try:
            seconds = asyncio.run(alone(host, places, batch, arguments.repeats))
        finally:
            host.kill()
    return {
        "answers": len(work),
        "response_tokens": tokens,
        "evaluation_s": whole,
        "evaluation_tokens_per_s": tokens / whole,
        "alone_s": seconds,
        "alone_tokens_per_s": tokens / min(seconds),
        "ratio": min(seconds) / whole,
    }


def _random_ids(prompt: str, length: int) -> list[int]:
    draw = random.Random(prompt)  # the samples of a prompt share their beginning
    return [draw.randrange(3, 100) for _ in range(length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--make", choices=list(SHAPES))
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--python", default="")
    parser.add_argument("--parallel", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-fraction", type=float, default=0.5)
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.make:
        return make(arguments)
    found = json.dumps(measure(arguments), indent=1)
    arguments.out.write_text(found + "\n")
    print(found)


if __name__ == "__main__":
    main()
