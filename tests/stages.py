"""Small runs of every stage for tests, through the command line.

The model has 20 k parameters and the data is a small version of the demo's.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch

from infir2.checkpoint import open_checkpoint
from infir2.cli import main
from infir2.config.schema import ShapeSection
from infir2.data import load_tokenizer
from infir2.demo.world import DemoWorld, make_demo_world
from infir2.model import Decoder, exported_weights, write_hf

RECIPES = Path(__file__).parents[1] / "recipes" / "demo"
SHAPE = {
    "hidden_size": 40,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn_size": 136,
}
T = TypeVar("T")
STARTED: "list[subprocess.Popen[str]]" = []
WORLD = DemoWorld(
    cpt_tokens=12_000, validation_documents=8, sft_rows=64, rl_rows=(24, 24), held_out_rows=12
)


def of_today(cases: Iterable[T], count: int) -> list[T]:
    """Some of many costly cases of one kind, on another day others.

    INFIR2_ALL_CASES=1 (`make test-faults`) gives all of them.
    """
    everything = list(cases)
    if os.environ.get("INFIR2_ALL_CASES"):
        return everything
    return random.Random(date.today().toordinal()).sample(everything, count)


def make_world(directory: Path) -> Path:
    make_demo_world(directory, 7, WORLD)
    return directory


def options(world: Path, run: Path, stage: str, **values: Any) -> list[str]:
    """Arguments of `infir2` for the demo's recipe of a stage with small settings.

    Keyword names are keys with a double underscore for the dot.
    """
    verb = stage.rstrip("12")
    arguments = [
        verb,
        str(RECIPES / f"{stage}.toml"),
        f"--run.dir={run}",
        f"--data.tokenizer={world / 'tokenizer'}",
        "--run.threads=1",
    ]
    arguments.append(f"--data.sources.0.path={world / stage}.jsonl")
    if verb == "cpt":
        arguments.append(f"--data.validation_sources.0.path={world / 'cpt_validation.jsonl'}")
        arguments += [f"--model.shape.{name}={value}" for name, value in SHAPE.items()]
        arguments += [
            "--data.batch_sequences=2",
            "--schedule.warmup_steps=2",
            "--schedule.decay_steps=2",
        ]
    if verb == "sft":
        arguments.append("--data.batch_samples=4")
    if verb == "rl":
        arguments += [
            "--rl.prompts_per_step=3",
            "--rl.over_sample_prompts=4",
            "--rl.group_size=4",
            "--rl.max_response_tokens=8",
        ]
    return arguments + [f"--{name.replace('__', '.')}={value}" for name, value in values.items()]


def run(arguments: list[str]) -> None:
    """Run one command in this process; it must succeed."""
    code = main(arguments)
    assert code == 0, f"infir2 {' '.join(arguments)} returned {code}"


def begin(command: list[str], **variables: str) -> "subprocess.Popen[str]":
    """Start a process in its own session; it is killed when its test ends, passed or failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    STARTED.append(process)
    return process


def end_leftovers() -> None:
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    STARTED.clear()


def torchrun(
    num_processes: int, *arguments: str, timeout: float = 240, **variables: str
) -> tuple[int, str]:
    """Run torchrun; returns its exit code and stderr."""
    process = begin(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={num_processes}",
            *arguments,
        ],
        **variables,
    )
    _, stderr = process.communicate(timeout=timeout)
    return process.returncode, stderr


def gone(pids: list[int], within_seconds: float = 10.0) -> bool:
    """Whether all processes end, or become zombies, in time."""
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
    all_lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in all_lines if line["kind"] == kind]


def curve(run_dir: Path, *names: str) -> list[tuple[Any, ...]]:
    """(step, value of each name) of every training step."""
    return [(line["step"], *(line[name] for name in names)) for line in lines(run_dir, "train")]


def assert_same_state(a: Path, b: Path) -> None:
    """The newest checkpoints of two runs have the same bits and the same data position."""
    first, second = open_checkpoint(a), open_checkpoint(b)
    assert first.step == second.step
    assert first.state.get("loader") == second.state.get("loader")
    assert first.state.get("cursor") == second.state.get("cursor")
    left, right = first.tensors(), second.tensors()
    assert set(left) == set(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_each_step_once(run_dir: Path, steps: int) -> None:
    """An RL run with one update per step lost no step, repeated none, drew each prompt once."""
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


def make_model(world: Path, directory: Path) -> Path:
    """A Hugging Face directory with random weights and the demo's tokenizer and template."""
    tokenizer = world / "tokenizer"
    decoder = Decoder.from_shape(
        ShapeSection(**SHAPE), load_tokenizer(tokenizer).vocab_size, seed=1
    )
    write_hf(directory, exported_weights(decoder), decoder.config.to_hf(), tokenizer)
    return directory


def make_rl_start(world: Path, directory: Path, **values: Any) -> Path:
    """Train a model for a few steps (`cpt`) and export it (`hf`, `fp8`) in `directory`."""
    run(options(world, directory / "cpt", "cpt", **({"schedule__total_steps": 4} | values)))
    run(["export", "hf", str(directory / "cpt"), "--to", str(directory / "hf")])
    run(["export", "fp8", str(directory / "hf"), "--to", str(directory / "fp8")])
    return directory


def make_guessing_start(world: Path, directory: Path) -> Path:
    """A model that answers 0 or 1 by chance after a thought of random length, for tests of RL.

    Writes the model (`sft`), its export (`hf`, `fp8`) and `problems.jsonl`, whose answers are 0
    or 1: most groups have right and wrong responses, and responses differ in length.
    """
    run(options(world, directory / "cpt", "cpt", schedule__total_steps=4))
    answers = [f"<think>{';' * (n // 2 % 8)}</think>\\boxed{{{n % 2}}}" for n in range(64)]
    guesses = [
        {"messages": [_message("user", f"{n}+{n}=?"), _message("assistant", answer)]}
        for n, answer in enumerate(answers)
    ]
    problems = [{"prompt": f"{n}+{n}=?", "label": str(n // 3 % 2)} for n in range(24)]
    for name, rows in (("guesses", guesses), ("problems", problems)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text)
    values: dict[str, Any] = {
        "schedule__learning_rate": 1e-2,
        "schedule__final_learning_rate": 1e-2,
    }
    values |= {"schedule__total_steps": 24, "train__validate_every": 0}
    values |= {"data__sources__0__path": directory / "guesses.jsonl"}
    values |= {"model__path": directory / "cpt"}
    run(options(world, directory / "sft", "sft1", **values))
    run(["export", "hf", str(directory / "sft"), "--to", str(directory / "hf")])
    run(["export", "fp8", str(directory / "hf"), "--to", str(directory / "fp8")])
    return directory


def guessing(start: Path) -> dict[str, Any]:
    """Keys of an RL run on what `make_guessing_start` wrote."""
    return {
        "model__path": start / "sft",
        "rollout__model": start / "fp8",
        "data__sources__0__path": start / "problems.jsonl",
    }


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
