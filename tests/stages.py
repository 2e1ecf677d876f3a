"""Small runs of every stage for tests: a model of 20 k parameters on a slice of the demo's world, through the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint import open_checkpoint
from infir2.cli import main
from infir2.demo.world import DemoWorld, make_demo_world

RECIPES = Path(__file__).parents[1] / "recipes" / "demo"
SHAPE = {
    "hidden_size": 40,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn_size": 136,
}
BEGUN: "list[subprocess.Popen[str]]" = []
WORLD = DemoWorld(
    cpt_tokens=12_000, validation_documents=8, sft_rows=64, rl_rows=(24, 24), held_out_rows=12
)


def make_world(directory: Path) -> Path:
    make_demo_world(directory, 7, WORLD)
    return directory


def options(world: Path, run: Path, stage: str, **values: Any) -> list[str]:
    """Words after `infir2`: the demo's recipe of a stage, made small. A double underscore in a name stands for a dot."""
    verb = stage.rstrip("12")
    words = [
        verb,
        str(RECIPES / f"{stage}.toml"),
        f"--run.dir={run}",
        f"--data.tokenizer={world / 'tokenizer'}",
        "--run.threads=1",
    ]
    words.append(f"--data.sources.0.path={world / stage}.jsonl")
    if verb == "cpt":
        words.append(f"--data.validation_sources.0.path={world / 'cpt_validation.jsonl'}")
        words += [f"--model.shape.{name}={value}" for name, value in SHAPE.items()]
        words += [
            "--data.batch_sequences=2",
            "--schedule.warmup_steps=2",
            "--schedule.decay_steps=2",
        ]
    if verb == "sft":
        words.append("--data.batch_samples=4")
    if verb == "rl":
        words += [
            "--rl.prompts_per_step=3",
            "--rl.over_sample_prompts=4",
            "--rl.group_size=4",
            "--rl.max_response_tokens=8",
        ]
    return words + [f"--{name.replace('__', '.')}={value}" for name, value in values.items()]


def run(words: list[str]) -> None:
    """Run one command in this process; it must succeed."""
    code = main(words)
    assert code == 0, f"infir2 {' '.join(words)} ended with {code}"


def begin(command: list[str], **variables: str) -> "subprocess.Popen[str]":
    """A process with its own session, which ends with the test that began it, whatever becomes of that."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    BEGUN.append(process)
    return process


def end_leftovers() -> None:
    for process in BEGUN:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    BEGUN.clear()


def torchrun(
    num_processes: int, *words: str, timeout: float = 240, **variables: str
) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    process = begin(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={num_processes}",
            *words,
        ],
        **variables,
    )
    _, said = process.communicate(timeout=timeout)
    return process.returncode, said


def gone(pids: list[int], within_seconds: float = 10.0) -> bool:
    """Whether they have all ended by then, or are zombies."""
    deadline = time.monotonic() + within_seconds
    while any(_running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def curve(run_dir: Path, *names: str) -> list[tuple[Any, ...]]:
    """(step, value of each name) of every training step."""
    return [(line["step"], *(line[name] for name in names)) for line in lines(run_dir, "train")]


def assert_same_state(a: Path, b: Path) -> None:
    """The newest checkpoints of two runs hold the same bits and the same data position."""
    first, second = open_checkpoint(a), open_checkpoint(b)
    assert first.step == second.step
    assert first.state.get("loader") == second.state.get("loader")
    assert first.state.get("cursor") == second.state.get("cursor")
    left, right = first.tensors(), second.tensors()
    assert set(left) == set(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_each_step_once(run_dir: Path, steps: int) -> None:
    """An RL run, one optimizer update a step, lost no step, did none twice and drew each prompt once."""
    trained, checkpoint = lines(run_dir, "train"), open_checkpoint(run_dir)
    assert [line["step"] for line in trained] == list(range(1, steps + 1))
    assert all(line["staleness"] in (0, 1) for line in trained)
    tensors = checkpoint.tensors()
    updates = {
        int(tensors[name])
        for name in tensors
        if name.startswith("optimizer/") and name.endswith("/step")
    }
    assert checkpoint.step == steps
    assert updates == {sum(not line["skipped"] for line in trained)}
    assert checkpoint.state["cursor"] == sum(line["groups_sampled"] for line in trained)


def make_rl_start(world: Path, directory: Path, **values: Any) -> Path:
    """A little-trained model (`cpt`) and its exports (`hf`, `fp8`) in `directory`."""
    run(options(world, directory / "cpt", "cpt", **({"schedule__total_steps": 4} | values)))
    run(["export", "hf", str(directory / "cpt"), "--to", str(directory / "hf")])
    run(["export", "fp8", str(directory / "hf"), "--to", str(directory / "fp8")])
    return directory
