"""RL through a real SGLang on GPUs: speed of our client, rewards, and a server that is killed.

    python bench/sglang_rl.py --python sglang-env/bin/python --work DIR --out sglang.json \\
        [--engines 1] [--steps 20] [--phases train,throughput,rl,native] [-- SERVER_OPTION ...]

train: a model of 36 M parameters whose sizes SGLang takes, by the demo's recipe (CPT, SFT, export).
throughput: tokens/s of 256 requests of 128 + 256 tokens, by one request to SGLang with all prompts
(its own throughput) and through our pool, alternately, in one server; FP8, then BF16 if asked.
rl: RL through SGLang with publishing every step; in the middle of step 3 the server is killed.
native: the same RL with the engine in process, for its log-probability differences.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infir2.config.schema import RlRecipe
from infir2.engines.generate import generate_all
from infir2.engines.http_client import HttpClient
from infir2.engines.pool import EnginePool
from infir2.engines.process_guard import descendants
from infir2.engines.servers import open_pool
from infir2.engines.types import Request, SamplingParams
from infir2.model.safetensors_io import HfWeights
from infir2.parallel.ranks import Ranks

RECIPES = Path(__file__).parents[1] / "recipes" / "demo"
SHAPE = {"hidden_size": 512, "num_layers": 12, "num_heads": 8, "num_kv_heads": 2, "ffn_size": 1536}
PROMPTS, PROMPT, RESPONSE, ROUNDS = 256, 128, 256, 3
WATCHED = (
    *("reward", "accuracy", "mismatch_kl", "mismatch_mean", "publish_seconds", "publish_bytes"),
    *("publish_write_seconds", "engine_restarts", "engines_serving", "tokens_per_second"),
    *("seconds", "rollout_seconds"),
)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "infir2", *map(str, words)]


def run(*words: object) -> None:
    print("+ infir2", *words, flush=True)
    subprocess.run(command(*words), check=True)


def train(work: Path) -> None:
    """World, CPT, SFT and the FP8 export in `work`."""
    world = work / "world"
    if (work / "sft2-fp8").exists():
        return
    run("data", "demo", "--to", world)
    shape = [f"--model.shape.{name}={value}" for name, value in SHAPE.items()]
    common = [f"--data.tokenizer={world / 'tokenizer'}"]
    previous: list[str] = [*shape, f"--data.validation_sources.0.path={world}/cpt_validation.jsonl"]
    rates = {"cpt": "1e-3", "sft1": "4e-4", "sft2": "3e-4"}
    for name, rate in rates.items():
        options = [f"--run.dir={work / name}", f"--data.sources.0.path={world / name}.jsonl"]
        rate_option = f"--schedule.learning_rate={rate}"
        verb = name.rstrip("12")
        run(verb, RECIPES / f"{name}.toml", *options, *common, *previous, rate_option)
        previous = [f"--model.path={work / name}"]
    run("export", "hf", work / "sft2", "--to", work / "sft2-hf")
    run("export", "fp8", work / "sft2-hf", "--to", work / "sft2-fp8")


def recipe(options: argparse.Namespace, work: Path) -> RlRecipe:
    rollout = {
        **{"model": str(work / "sft2-fp8"), "engine": "sglang", "python": options.python},
        **{"max_running_requests": PROMPTS, "memory_fraction": options.memory_fraction},
        **{"server_options": tuple(options.server_options), "engines": options.engines},
    }
    return RlRecipe.model_validate(
        {"run": {"dir": str(work / "throughput")}, "rollout": rollout}
        | {"schedule": {"learning_rate": 1e-4}, "rl": {"max_response_tokens": RESPONSE}}
    )


def random_prompts(seed: int, vocabulary: int) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, vocabulary) for _ in range(PROMPT)] for _ in range(PROMPTS)]


async def of_sglang(url: str, key: str, prompts: list[list[int]], logprobs: bool) -> float:
    """Tokens/s of one request with all prompts."""
    http = HttpClient(url, key)
    params = {"temperature": 1.0, "max_new_tokens": RESPONSE, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": params, "return_logprob": logprobs}
    begun = time.monotonic()
    answers = await http.post("/generate", body)
    seconds = time.monotonic() - begun
    await http.close()
    return sum(len(answer["output_ids"]) for answer in answers) / seconds


def of_pool(pool: EnginePool, prompts: list[list[int]], round_number: int) -> float:
    """Tokens/s of the same prompts through the pool."""
    params = SamplingParams(temperature=1.0, max_tokens=RESPONSE, stop_ids=())
    requests = [Request(f"{round_number}/{i}", p, params, key=i) for i, p in enumerate(prompts)]
    begun = time.monotonic()
    completions = generate_all(pool, requests)
    seconds = time.monotonic() - begun
    return sum(len(each.token_ids) for each in completions) / seconds


def throughput(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    wanted = recipe(options, work)
    pool = open_pool(wanted, Ranks(), Path(wanted.run.dir))
    try:
        weights = HfWeights(wanted.rollout.model)
        begun = time.monotonic()
        pool.update_weights(iter(weights), 0)
        ready = time.monotonic() - begun
        directory = Path(wanted.run.dir) / "engines"
        words = json.loads((directory / "engine-1.json").read_text())["command"]
        url = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
        key = json.loads((directory / "engine-1.key/options.yaml").read_text())["api-key"]
        vocabulary = weights.shape("model.embed_tokens.weight")[0]
        result: dict[str, list[float]] = {"sglang": [], "sglang_with_logprobs": [], "pool": []}
        for number in range(ROUNDS + 1):
            prompts = [random_prompts(3 * number + i, vocabulary) for i in range(3)]
            plain = asyncio.run(of_sglang(url, key, prompts[0], logprobs=False))
            scored = asyncio.run(of_sglang(url, key, prompts[1], logprobs=True))
            ours = of_pool(pool, prompts[2], number)
            if number:  # the first round compiles
                for name, value in zip(result, (plain, scored, ours), strict=True):
                    result[name].append(round(value))
        published = []
        for version in range(1, 4):
            pool.update_weights(iter(weights), version)
            published.append(pool.metrics())
        best = {name: max(values) for name, values in result.items()}
        ratio = best["pool"] / best["sglang"]
        return result | {"pool_over_sglang": ratio, "ready_seconds": ready, "publish": published}
    finally:
        pool.close()


def kill_a_server_in_step(run_dir: Path, step: int, killed: list[int]) -> None:
    """Wait until step `step` samples, then kill the first SGLang with SIGKILL."""
    metrics = run_dir / "metrics.jsonl"
    while not killed:
        time.sleep(0.05)
        text = metrics.read_text() if metrics.exists() else ""
        if text.count('"kind": "train"') < step - 1:
            continue
        for pid in descendants(os.getpid()):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"sglang.launch_server" in words and b"-S" not in words:
                time.sleep(0.5)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return


def rl(options: argparse.Namespace, work: Path, engine: str, name: str) -> dict[str, Any]:
    world, run_dir, killed = work / "world", work / name, list[int]()
    words: list[object] = [
        *("rl", RECIPES / "rl1.toml", f"--run.dir={run_dir}", "--rollout.max_running_requests=256"),
        *(f"--data.tokenizer={world / 'tokenizer'}", f"--data.sources.0.path={world}/rl1.jsonl"),
        *(f"--model.path={work / 'sft2'}", f"--rollout.model={work / 'sft2-fp8'}"),
        *(f"--schedule.total_steps={options.steps}", "--checkpoint.save_every=100"),
        *("--schedule.learning_rate=5e-5", *shlex.split(options.rl_options)),
    ]
    if engine == "sglang":
        words += [
            *("--rollout.engine=sglang", f"--rollout.python={options.python}"),
            *(f"--rollout.engines={options.engines}",),
            *(f"--rollout.memory_fraction={options.memory_fraction}",),
            *(f"--rollout.server_options={json.dumps(options.server_options)}",),
        ]
        watcher = threading.Thread(
            target=kill_a_server_in_step, args=(run_dir, 3, killed), daemon=True
        )
        watcher.start()
    begun = time.monotonic()
    run(*words)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("kind") == "train"]
    table = [{key: line[key] for key in ("step", *WATCHED) if key in line} for line in steps]
    return {"seconds": time.monotonic() - begun, "killed": killed, "steps": table}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--memory-fraction", type=float, default=0.3)
    parser.add_argument("--phases", default="train,throughput,rl,native")
    parser.add_argument("--rl-options", default="", help="as --rl-options='--rl.group_size=16'")
    parser.add_argument("server_options", nargs="*")
    options = parser.parse_args(arguments)
    work, result = options.work.resolve(), dict[str, Any]()
    for phase in options.phases.split(","):
        if phase == "train":
            train(work)
        elif phase == "throughput":
            result[phase] = throughput(options, work)
        else:
            engine = {"rl": "sglang", "native": "native"}[phase]
            result[phase] = rl(options, work, engine, phase)
        options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
