"""Several GPUs of one host: is the arithmetic the same, how fast is it, what does it cost; one command, one table.

    python bench/scale.py --out docs/results/scale-h200-x2.json            on all GPUs; docs/results/scale.md says what is measured
    python bench/scale.py --gpus 4 --dry-run                               what would run, memory and minutes, without a GPU
    python bench/scale.py --tiny --device cpu --gpus 2 --out /some/x.json  every line of it, on a CPU
    python bench/scale.py --tiny --share-gpu --gpus 2 --out /some/x.json   the same on one GPU, NCCL's part through the host

Each job is a torchrun of bench/scale_rank.py, most important first, bounded in time; results are written after each, so that
a run that is cut off still brings what it has. A job that fails is one line, and the next one runs.
"""

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

import torch
from scale_rank import GRADIENT, SHAPES, case_of
from step import Case

from infir2.config.schema import ShapeSection
from infir2.model import ModelConfig
from infir2.parallel.mesh import Sizes, tp_problem
from infir2.preflight.gpu_memory import gpu_ledger

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("equality", "throughput", "gather", "overlap", "save", "ray")
# NVLink multicast is not available to guests of a shared host, and using it can take its GPUs out of service.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
# RECIPE.md section 4: BF16 and FP8 as (total ms, peak GB, TFLOP/s per GPU)
REFERENCE = {
    ("1.5B", 32768): ("TP2", (3170, 57.8, 345), (2950, 51.7, 360)),
    ("1.5B", 8192): ("TP1", (2030, 68.1, 340), (1590, 58.3, 376)),
    ("7B", 32768): ("TP4", (9590, 78.1, 409), (8360, 67.4, 461)),
    ("7B", 8192): ("TP2", (7080, 53.2, 453), (5530, 50.8, 537)),
}


@dataclass(frozen=True)
class Job:
    """One torchrun. Example: `Job("throughput", "7B 8192 dp2", 2, 2.0, {"work": "throughput", "sizes": (1, 2, 1, 1), ...})`."""

    section: str
    name: str
    ranks: int
    minutes: float  # expected; three times as long ends it
    settings: dict[str, Any]


def layouts(ranks: int) -> dict[str, tuple[int, int, int, int]]:
    """Every kind of layout that so many ranks allow, name -> (dp_replicate, dp, cp, tp)."""
    found = {
        f"dp{ranks}": (1, ranks, 1, 1),
        f"tp{ranks}": (1, 1, 1, ranks),
        f"cp{ranks}": (1, 1, ranks, 1),
    }
    if ranks % 4 == 0:
        half = ranks // 2
        found |= {
            f"hsdp2x{half}": (2, half, 1, 1),
            f"dp{half}-tp2": (1, half, 1, 2),
            f"cp2-tp{half}": (1, 1, 2, half),
        }
        found[f"dp{half}-cp2"] = (1, half, 2, 1)
    if ranks == 8:
        found["dp2-cp2-tp2"] = (1, 2, 2, 2)
    return found


def plan(words: argparse.Namespace) -> list[Job]:
    """The jobs, most important first."""
    n, tiny = words.gpus, words.tiny
    small: dict[str, object] = {
        "model": "tiny" if tiny else "small",
        "layers": 2 if tiny else 4,
        "sequences": 1,
        "length": 256 if tiny else 4096,
    }
    possible = {
        name: sizes
        for name, sizes in layouts(n).items()
        if not tp_problem(config_of(case_of(small, True)), sizes[3], True)
    }
    same = {
        "steps": 2 if tiny else 10,
        "micro_batches": n,
        "layouts": possible,
        "text": str(words.text or ""),
    }
    jobs = [Job("equality", "equality", n, 1.5, {"work": "equality", **small, **same})]

    def speed(
        model: str, length: int, ranks: int, sizes: tuple[int, int, int, int], minutes: float
    ) -> Job:
        recompute = "full" if length == 32768 else "none"
        sequences = 2 if (model, length) == ("1.5B", 8192) else 1
        settings: dict[str, object] = {
            "model": model,
            "length": length,
            "sequences": sequences,
            "recompute": recompute,
            "layers": 28,
        }
        if tiny:
            settings = small
        settings["small"] = (model, length) == ("7B", 8192)
        name = next(
            name
            for name, numbers in ({"one GPU": (1, 1, 1, 1)} | layouts(ranks)).items()
            if numbers == sizes
        )
        settings = {**settings, "work": "throughput", "sizes": sizes, "steps": 1 if tiny else 5}
        return Job("throughput", f"{model} {length} {name}", ranks, minutes, settings)

    dp, tp, cp = (1, n, 1, 1), (1, n // 2, 1, 2), (1, n // 2, 2, 1)
    wanted = [
        ("7B", 8192, n, dp, 1.0),
        ("1.5B", 8192, n, dp, 0.6),
        ("1.5B", 8192, 1, (1, 1, 1, 1), 0.6),
    ]
    wanted += [
        ("7B", 32768, n, dp, 1.3),
        ("1.5B", 32768, n, dp, 0.7),
        ("7B", 8192, n, tp, 1.0),
        ("7B", 32768, n, cp, 1.2),
    ]
    jobs += [speed(*numbers) for numbers in (wanted[:1] if tiny else wanted)]
    block = (
        {**small, "steps": 2}
        if tiny
        else {"model": "7B", "layers": 4, "sequences": 1, "length": 1024, "steps": 20}
    )
    jobs.insert(2, Job("gather", "one block of 7B", n, 0.5, {"work": "gather", **block}))
    step = small if tiny else {"model": "7B", "layers": 8, "sequences": 1, "length": 8192}
    jobs.insert(
        3, Job("overlap", "8 blocks of 7B", n, 0.6, {"work": "overlap", **step, "sizes": dp})
    )
    jobs.insert(4, Job("save", "save and resume", n, 1.0, {}))
    jobs.insert(5, Job("ray", "a Ray launch", n, 0.8, {}))
    return [job for job in jobs if job.section in words.sections.split(",")]


def config_of(case: Case) -> ModelConfig:
    shape = ShapeSection(**{**SHAPES[case.model], "num_layers": case.layers})
    return ModelConfig.from_shape(shape, shape.vocab_size)


def memory_gib(job: Job, fp8: bool) -> float:
    """The ledger of bench/step.py's case, its weights shared by the ranks: an estimate of the peak of one GPU."""
    case = case_of(job.settings, fp8)
    sizes = Sizes(*job.settings.get("sizes", (1, job.ranks, 1, 1)))
    return sum(gpu_ledger(config_of(case), case.recipe(), sizes).values()) / 2**30


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


def execute(line: list[str], seconds: float, **variables: str) -> str:
    """Run one command and all that it starts, for so long at most; the reason if it fails, else nothing."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = (
        os.environ | ENVIRONMENT | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables
    )
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            line, env=environment, cwd=ROOT, stdout=said, stderr=said, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            reason = f"ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            reason = f"ended after {seconds:.0f} s"
            process.terminate()  # torchrun ends its ranks, whose memory the next job needs
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        if reason:
            telling = [
                text.strip()
                for text in said.read().splitlines()
                if "Error" in text and "ChildFailed" not in text
            ]
            own = [
                text for text in telling if "Connection closed" not in text and "NCCL" not in text
            ]  # not what followed from it
            reason += f": {(own or telling)[-1][:300]}" if telling else ""
        return reason


def ranks_job(
    job: Job, words: argparse.Namespace, seconds: float, directory: Path
) -> dict[str, Any]:
    spec, out = directory / "job.json", directory / "out.json"
    out.unlink(missing_ok=True)
    settings = job.settings | {"device": words.device, "share_gpu": words.share_gpu}
    spec.write_text(json.dumps(settings), encoding="utf-8")
    reason = execute(
        command(job, str(ROOT / "bench" / "scale_rank.py"), str(spec), str(out)), seconds
    )
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return found | ({"failed": reason} if reason else {})


def training(words: argparse.Namespace, directory: Path, run: str, steps: int) -> list[str]:
    """Words of a short pre-training run on the demo's world, in FP8, saved at its end."""
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
        f"--run.device={words.device}",
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
        f"--data.batch_sequences={words.gpus}",
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
    found = [
        json.loads(text)
        for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return {line["step"]: line["loss"] for line in found if line["kind"] == "train"}


def save(job: Job, words: argparse.Namespace, seconds: float, directory: Path) -> dict[str, Any]:
    """4 steps on all GPUs, then 4 on half of them, against 8 undisturbed ones."""
    if words.share_gpu:
        return {"skipped": "infir2 takes a GPU for every rank"}
    half = Job("save", "half", max(1, job.ranks // 2), job.minutes, {})
    for ranks, run, steps in ((job, "whole", 8), (job, "moved", 4), (half, "moved", 8)):
        reason = execute(
            command(ranks, "-m infir2", *training(words, directory, run, steps)), seconds / 3
        )
        if reason:
            return {"failed": f"{run}, {ranks.ranks} ranks, to step {steps}: {reason}"}
    whole, moved = curve(directory / "whole"), curve(directory / "moved")
    return {
        "whole": whole,
        "moved": moved,
        "largest difference": max(abs(whole[step] - moved[step]) for step in whole),
    }


def ray(job: Job, words: argparse.Namespace, seconds: float, directory: Path) -> dict[str, Any]:
    """The same run launched on a Ray cluster of this host."""
    program = shutil.which("ray")
    if words.share_gpu:
        return {"skipped": "infir2 takes a GPU for every rank"}
    if find_spec("ray") is None or program is None:
        return {"skipped": "Ray is not installed here"}
    cluster = [
        "--head",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
        f"--num-cpus={job.ranks}",
    ]
    cluster += [f"--num-gpus={job.ranks if words.device == 'cuda' else 0}"]
    try:
        reason = execute([program, "start", *cluster], 60)
        launch = [
            "-m",
            "infir2",
            "launch",
            "ray",
            *(["--cpu"] if words.device == "cpu" else []),
            "--gpus-per-node",
            str(job.ranks),
        ]
        began = time.monotonic()
        line = [sys.executable, *launch, "--", *training(words, directory, "ray", 4)]
        reason = reason or execute(line, seconds, RAY_ADDRESS="127.0.0.1:6379")
        return (
            {"failed": reason}
            if reason
            else {"seconds": time.monotonic() - began, "losses": curve(directory / "ray")}
        )
    finally:
        execute([program, "stop"], 60)


def rows_of(job: Job, found: dict[str, Any]) -> list[str]:
    """What is printed of a job's results."""
    rows = [f"{job.name}: {word}: {found[word]}" for word in ("failed", "skipped") if word in found]
    if job.section == "equality":
        rows += [
            f"{name:24s} largest difference of the loss {row['largest difference']:.2e}, first gradient {row[GRADIENT]:.0f} dB"
            + (
                f", bytes equal: {row['bytes equal on all ranks']}"
                if "bytes equal on all ranks" in row
                else ""
            )
            for name, row in found.items()
            if isinstance(row, dict)
        ]
    if job.section == "throughput":
        rows += throughput_rows(job, found)
    elif job.section != "equality" and not rows:
        rows += [f"{job.name}, {key}: {value}" for key, value in found.items()]
    return rows


def throughput_rows(job: Job, found: dict[str, Any]) -> list[str]:
    rows, bf16 = [], found.get("BF16")
    for name, row in found.items():
        if not isinstance(row, dict):
            continue
        numbers = ("total", "forward", "backward", "peak_gib", "tflops", "tokens_per_second")
        text = f"{job.name:22s} {name:20s} " + ", ".join(
            f"{key} {row[key]:,.1f}" for key in numbers
        )
        if bf16 and row is not bf16:
            memory = (
                f", memory {row['peak_gib'] / bf16['peak_gib']:.2f}x" if bf16["peak_gib"] else ""
            )
            text += f": {bf16['total'] / row['total']:.2f}x as fast as BF16{memory}"
        rows.append(text)
    if reference := REFERENCE.get((job.settings["model"], job.settings["length"])):
        layout, (slow, much, _), (fast, less, flops) = reference
        rows.append(
            f"{'the reference, ' + layout:43s} FP8 {slow / fast:.2f}x as fast, memory {less / much:.2f}x, {flops} TFLOP/s"
        )
    return rows


def dry_run(jobs: list[Job], words: argparse.Namespace) -> None:
    """Every command with what it is expected to take."""
    print(" ".join(f"{name}={value}" for name, value in ENVIRONMENT.items()))
    for job in jobs:
        memory = ""
        if "model" in job.settings:
            memory = ", GiB a GPU: " + ", ".join(
                f"{name} {memory_gib(job, fp8):.0f}"
                for name, fp8 in (("FP8", True), ("BF16", False))
            )
        print(
            f"{job.section}: {job.name}: {job.minutes:g} minutes{memory}\n    {job.settings or 'infir2 cpt on the demo'}"
        )
        print(f"    torchrun --standalone --nproc_per_node={job.ranks}")
    print(f"{sum(job.minutes for job in jobs):.1f} minutes in all; {words.minutes:g} allowed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers")
    parser.add_argument(
        "--gpus", type=int, default=torch.cuda.device_count(), help="ranks (default: all GPUs here)"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated")
    parser.add_argument(
        "--minutes", type=float, default=9.3, help="no job is begun that would end later"
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="train the equality section on this file's bytes instead of random tokens",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--share-gpu", action="store_true", help="all ranks on one GPU, for trying the command out"
    )
    words = parser.parse_args()
    if words.gpus < 2:
        parser.error(
            f"this measures several GPUs and {words.gpus} is to be used: name a number with --gpus (with --dry-run, any)"
        )
    jobs = plan(words)
    if words.dry_run:
        dry_run(jobs, words)
        return
    if words.out is None:
        parser.error("--out FILE.json is where the results go")
    began, report = (
        time.monotonic(),
        {"command": sys.argv, "torch": torch.__version__, "gpus": words.gpus},
    )
    if words.device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
    own = {"save": save, "ray": ray}
    with tempfile.TemporaryDirectory(prefix="infir2-scale-") as directory:
        for job in jobs:
            left = 60 * words.minutes - (time.monotonic() - began)
            found: dict[str, Any] = {
                "skipped": f"{left:.0f} s are left and it takes about {60 * job.minutes:.0f}"
            }
            if left >= 60 * job.minutes:
                try:
                    found = own.get(job.section, ranks_job)(
                        job, words, min(left, 180 * job.minutes), Path(directory)
                    )
                except Exception as error:  # the next job may still bring something
                    found = {"failed": f"{type(error).__name__}: {error}"}
            report[f"{job.section}: {job.name}"] = found
            print(*rows_of(job, found), sep="\n", flush=True)
            words.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
