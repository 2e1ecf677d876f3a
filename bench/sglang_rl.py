"""RL through a real SGLang on GPUs: rewards, proofs, and a server that is killed.

    python bench/sglang_rl.py --python sglang-env/bin/python --work DIR --out sglang.json \\
        [--engines 1] [--steps 20] [--phases train,rl,native] [-- SERVER_OPTION ...]

train: a model of 36 M parameters whose sizes SGLang takes, by the demo's recipe (CPT, SFT, export).
rl: RL through SGLang with publishing every step; in the middle of step 3 the server is killed.
native: the same RL with the engine in process, for its log-probability differences.
directory, nccl: RL through an SGLang on a GPU of its own (two GPUs), published either way.
nccl-kill: as nccl, and the server is killed in step 3.
sleep: RL on one GPU with the trainer, to which the server gives its memory while it trains.
shape: bench/publish.py, the seconds of a publish at the 1.5B shape (two GPUs).
One command for two GPUs: --phases train,directory,nccl,nccl-kill,sleep,shape --steps 8.
bench/servers.py has the speed of the client.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infir2.engines.process_guard import descendants

RECIPES = Path(__file__).parents[1] / "recipes" / "demo"
PARTS = ("write", "transfer", "load", "proof")
SHAPE = {"hidden_size": 512, "num_layers": 12, "num_heads": 8, "num_kv_heads": 2, "ffn_size": 1536}
WATCHED = (
    *("reward", "accuracy", "mismatch_kl", "mismatch_mean", "publish_seconds", "publish_bytes"),
    *("publish_write_seconds", "publish_transfer_seconds", "publish_load_seconds"),
    *("publish_proof_seconds", "engine_restarts", "engines_serving", "tokens_per_second"),
    *("seconds", "generate_seconds", "verify_seconds", "logprobs_seconds", "update_seconds"),
    *("wait_seconds", "sleep_freed_bytes"),
)
# The recipe's keys of each way of running, and whether a server is killed in step 3.
PHASES: dict[str, tuple[list[str], bool]] = {
    "rl": (["--rollout.engine=sglang"], True),
    "native": ([], False),
    "directory": (["--rollout.engine=sglang"], False),
    "nccl": (["--rollout.engine=sglang", "--rollout.weight_transfer=nccl"], False),
    "sleep": (["--rollout.engine=sglang", "--rollout.sleep=true"], False),
    "nccl-kill": (["--rollout.engine=sglang", "--rollout.weight_transfer=nccl"], True),
}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "infir2", *map(str, words)]


def run(*words: object, **environment: str) -> None:
    print("+ infir2", *words, flush=True)
    subprocess.run(command(*words), check=True, env=os.environ | environment)


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


def rl(options: argparse.Namespace, work: Path, name: str) -> dict[str, Any]:
    world, run_dir, killed = work / "world", work / name, list[int]()
    (keys, kills) = PHASES[name]
    words: list[object] = [
        *("rl", RECIPES / "rl1.toml", f"--run.dir={run_dir}", "--rollout.max_running_requests=256"),
        *(f"--data.tokenizer={world / 'tokenizer'}", f"--data.sources.0.path={world}/rl1.jsonl"),
        *(f"--model.path={work / 'sft2'}", f"--rollout.model={work / 'sft2-fp8'}"),
        *(f"--schedule.total_steps={options.steps}", "--checkpoint.save_every=100"),
        *("--schedule.learning_rate=5e-5", *keys, *shlex.split(options.rl_options)),
    ]
    if keys:
        words += [
            *(f"--rollout.python={options.python}", f"--rollout.engines={options.engines}"),
            f"--rollout.memory_fraction={options.memory_fraction}",
            f"--rollout.server_options={json.dumps(options.server_options)}",
        ]
    if kills:
        watcher = threading.Thread(
            target=kill_a_server_in_step, args=(run_dir, 3, killed), daemon=True
        )
        watcher.start()
    begun = time.monotonic()
    run(*words, **({"CUDA_VISIBLE_DEVICES": "0"} if name == "sleep" else {}))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("kind") == "train"]
    table = [{key: line[key] for key in ("step", *WATCHED) if key in line} for line in steps]
    print_publishes(name, table)
    return {"seconds": time.monotonic() - begun, "killed": killed, "steps": table}


def print_publishes(name: str, steps: Sequence[dict[str, Any]]) -> None:
    print(f"{name:>10} {'MB':>8} {'publish':>8}" + "".join(f"{part:>10}" for part in PARTS))
    for step in steps:
        seconds = "".join(f"{step.get(f'publish_{part}_seconds', 0.0):10.3f}" for part in PARTS)
        megabytes = step.get("publish_bytes", 0.0) / 1e6
        print(f"{step['step']:>10} {megabytes:8.1f} {step['publish_seconds']:8.3f}{seconds}")
    sys.stdout.flush()


def shape(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    out = work / "publish.json"
    script = str(Path(__file__).with_name("publish.py"))
    words = [sys.executable, script, f"--python={options.python}"]
    words += [f"--out={out}", *(f"--option={option}" for option in options.server_options)]
    subprocess.run(words, check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--memory-fraction", type=float, default=0.3)
    parser.add_argument("--phases", default="train,rl,native")
    parser.add_argument("--rl-options", default="", help="as --rl-options='--rl.group_size=16'")
    parser.add_argument("server_options", nargs="*")
    options = parser.parse_args(arguments)
    work, result = options.work.resolve(), dict[str, Any]()
    for phase in options.phases.split(","):
        if phase == "train":
            train(work)
        else:
            result[phase] = shape(options, work) if phase == "shape" else rl(options, work, phase)
        options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
