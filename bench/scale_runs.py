"""The jobs of bench/scale.py that are runs of infir2: save and resume, and a launch by Ray."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


# NVLink multicast is not available to guests of a shared host, and using it can take its GPUs out
# of service.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


@dataclass(frozen=True)
class Job:
    """One torchrun. Example: `Job("gather", "one block", 2, 0.5, {"work": "gather", ...})`."""

    section: str
    name: str
    ranks: int
    minutes: float  # expected; the job is killed after three times as long
    settings: dict[str, Any]  # read by bench/scale_rank.py


def command(job: Job, script: str, *rest: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={job.ranks}",
        *script.split(),
        *rest,
    ]


def execute(command_line: list[str], seconds: float, **variables: str) -> str:
    """Run a command in its own session, killed after `seconds`.

    Returns the reason of a failure, or "".
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = (
        os.environ | ENVIRONMENT | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables
    )
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command_line,
            env=environment,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            reason = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            reason = f"killed after {seconds:.0f} s"
            process.terminate()  # torchrun ends its ranks, whose memory the next job needs
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        if reason:
            errors = [
                text.strip()
                for text in output.read().splitlines()
                if "Error" in text and "ChildFailed" not in text
            ]
            # The ranks that lose their peer report NCCL errors; prefer the error that came first.
            causes = [
                text for text in errors if "Connection closed" not in text and "NCCL" not in text
            ]
            reason += f": {(causes or errors)[-1][:300]}" if errors else ""
        return reason


def training(options: argparse.Namespace, directory: Path, run: str, steps: int) -> list[str]:
    """Arguments of a short FP8 pre-training run on the demo's data, saved at its end."""
    from infir2.demo.world import DemoWorld, make_demo_world

    world = directory / "world"
    if not world.exists():
        make_demo_world(
            world,
            7,
            DemoWorld(
                cpt_tokens=40_000,
                validation_documents=8,
                sft_rows=64,
                rl_rows=(24, 24),
                held_out_rows=12,
            ),
        )
    paths = [
        f"--run.dir={directory / run}",
        f"--data.tokenizer={world / 'tokenizer'}",
        f"--data.sources.0.path={world / 'cpt.jsonl'}",
    ]
    paths += [
        f"--data.validation_sources.0.path={world / 'cpt_validation.jsonl'}",
        f"--run.device={options.device}",
    ]
    shape = {
        "hidden_size": 256,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 2,
        "ffn_size": 512,
    }
    paths += [f"--model.shape.{name}={value}" for name, value in shape.items()]
    paths += [
        f"--data.batch_sequences={options.gpus}",
        "--data.sequence_tokens=256",
        "--data.micro_batch_tokens=256",
    ]
    short = [
        f"--train.stop_after_step={steps}",
        "--schedule.total_steps=100",
        "--schedule.decay_steps=10",
        "--train.validate_every=0",
    ]
    return [
        "cpt",
        str(ROOT / "recipes" / "demo" / "cpt.toml"),
        *paths,
        *short,
        "--checkpoint.save_every=1000",
    ]


def curve(run: Path) -> dict[int, float]:
    """Training loss by step, from metrics.jsonl."""
    lines = [
        json.loads(text)
        for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def save(job: Job, options: argparse.Namespace, seconds: float, directory: Path) -> dict[str, Any]:
    """Compare 4 steps on all GPUs plus 4 on half of them with 8 undisturbed steps."""
    if options.share_gpu:
        return {"skipped": "infir2 needs one GPU per rank"}
    half = Job("save", "half", max(1, job.ranks // 2), job.minutes, {})
    for ranks, run, steps in ((job, "undisturbed", 8), (job, "moved", 4), (half, "moved", 8)):
        reason = execute(
            command(ranks, "-m infir2", *training(options, directory, run, steps)), seconds / 3
        )
        if reason:
            return {"failed": f"{run}, {ranks.ranks} ranks, to step {steps}: {reason}"}
    undisturbed, moved = curve(directory / "undisturbed"), curve(directory / "moved")
    return {
        "undisturbed": undisturbed,
        "moved": moved,
        "largest difference": max(abs(undisturbed[step] - moved[step]) for step in undisturbed),
    }


def ray(job: Job, options: argparse.Namespace, seconds: float, directory: Path) -> dict[str, Any]:
    """Launch the same run on a Ray cluster of this host."""
    program = shutil.which("ray")
    if options.share_gpu:
        return {"skipped": "infir2 needs one GPU per rank"}
    if find_spec("ray") is None or program is None:
        return {"skipped": "Ray is not installed"}
    cluster = [
        "--head",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
        f"--num-cpus={job.ranks}",
    ]
    cluster += [f"--num-gpus={job.ranks if options.device == 'cuda' else 0}"]
    try:
        reason = execute([program, "start", *cluster], 60)
        launch = [
            "-m",
            "infir2",
            "launch",
            "ray",
            *(["--cpu"] if options.device == "cpu" else []),
            "--gpus-per-node",
            str(job.ranks),
        ]
        began = time.monotonic()
        line = [sys.executable, *launch, "--", *training(options, directory, "ray", 4)]
        reason = reason or execute(line, seconds, RAY_ADDRESS="127.0.0.1:6379")
        return (
            {"failed": reason}
            if reason
            else {"seconds": time.monotonic() - began, "losses": curve(directory / "ray")}
        )
    finally:
        execute([program, "stop"], 60)
