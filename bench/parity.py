"""FP8 against BF16 on models from scratch: the studies of recipes/parity, with seeds.

    python bench/parity_data.py --corpus DIR --to data/parity
    python bench/parity.py run seeds [--to runs/parity] [--jobs 5] [--steps N] [OPTIONS]
    python bench/parity.py collect runs/parity --to parity.json
    python bench/parity.py report parity.json --to docs/results/parity

`run` trains a study of recipes/parity/studies.toml, several runs at once on one GPU (small models
leave it idle between launches). The same command again continues each run from its checkpoint;
after --seconds it stops them all and exits with 75. OPTIONS, such as --run.device=cpu, are added to
each `infir2 cpt`. With --jobs 1 each run has the GPU alone, and its power and memory are recorded
for the table of costs (the studies `cost` and `cost-large`). `collect` gathers curves and operands
of all studies in a compact file, `report` makes tables and plots (which need matplotlib:
pip install 'infir2[plots]').
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity_report import collect, write_report
from processes import Process, run_processes, start_logged, tell

from infir2.errors import Preempted

RECIPES = Path(__file__).parents[1] / "recipes" / "parity"
OUTSIDE = Path(__file__).with_name("parity_outside.py")
LIMIT_GRACE_SECONDS = 60.0  # for the runs to save after the limit


@dataclass
class Run:
    """One training of a study."""

    arm: str
    seed: int
    dir: Path
    command: list[str]
    after: Path | None  # the run that must be finished before
    watcher: Process | None = None  # of the GPU, while the run has it alone

    @property
    def finished(self) -> bool:
        return (self.dir / "finished.json").exists()


def length_options(steps: int) -> list[str]:
    """The options that make a run of `steps` steps, in proportion to those of base.toml."""
    part = max(1, steps // 5)
    return [
        f"--schedule.total_steps={steps}",
        f"--schedule.warmup_steps={min(60, max(1, steps // 10))}",
        f"--schedule.decay_steps={part}",
        f"--train.validate_every={part}",
        f"--checkpoint.save_every={part}",
    ]


def plan(
    study: dict[str, Any], root: Path, steps: int, seeds: Sequence[int], options: Sequence[str]
) -> list[Run]:
    """The runs of a study, all arms of the first seed first, so that pairs end together."""
    stable, short = steps - max(1, steps // 5), steps - steps // 10
    words = {"stable": stable, "short": short, "short_decay": short - stable}
    runs = []
    for seed in seeds:
        for arm, parts in study["arms"].items():
            first = study.get("after", {}).get(arm)
            after = root / f"{first}-{seed}" if first else None
            given = [part.format(**words, after=after) for part in parts if part.startswith("--")]
            files = [str(RECIPES / part) for part in parts if not part.startswith("--")]
            if arm in study.get("observe", ()) and seed == seeds[0]:
                given.append(f"--train.observe_every={max(1, steps // 10)}")
            own = [f"--run.dir={root / f'{arm}-{seed}'}", f"--run.seed={seed}"]
            kind = study.get("outside", {}).get(arm)
            trainer = ["-u", str(OUTSIDE), kind] if kind else ["-m", "infir2", "cpt"]
            command = [sys.executable, *trainer, *files, *length_options(steps)]
            command += [*given, *own, *options]
            runs.append(Run(arm, seed, root / f"{arm}-{seed}", command, after))
    return runs


def run_all(runs: Sequence[Run], jobs: int, seconds: float) -> int:
    """Train, at most `jobs` at once, for `seconds` (0: to the end). Returns the exit code."""
    waiting, codes = [run for run in runs if not run.finished], list[int]()
    run_processes(
        waiting,
        _next_ready,
        lambda run: _start(run, jobs),
        lambda run, code: codes.append(_finish(run, code)),
        jobs=jobs,
        seconds=seconds or float("inf"),
        grace_seconds=LIMIT_GRACE_SECONDS,
    )
    if set(codes) - {0, Preempted.exit_code}:
        return 1
    return Preempted.exit_code if waiting or any(codes) else 0


def _next_ready(waiting: Sequence[Run]) -> Run | None:
    ready = (run for run in waiting if run.after is None or (run.after / "finished.json").exists())
    return next(ready, None)


def _start(run: Run, jobs: int) -> Process:
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    run.watcher = watch_gpu(run.dir.with_suffix(".gpu.csv")) if jobs == 1 else None
    return start_logged(run.command, run.dir, OMP_NUM_THREADS=threads)


def _finish(run: Run, code: int) -> int:
    """Mark a finished run, tell of a failed one; returns its exit code."""
    _end_watch(run.watcher)
    if code == 0:
        (run.dir / "finished.json").write_text("{}\n")
    tell(run.dir, code)
    return code


def watch_gpu(path: Path) -> Process | None:
    """Write the GPU's power, use and memory to `path` twice a second, where nvidia-smi exists."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "power.draw,utilization.gpu,memory.used"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-lms=500"]
    with path.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)


def _end_watch(watcher: Process | None) -> None:
    if watcher is not None:
        watcher.terminate()
        watcher.wait()


def run_study(options: argparse.Namespace) -> int:
    studies = tomllib.loads((RECIPES / "studies.toml").read_text())
    if options.study not in studies:
        raise SystemExit(f"{options.study}: no such study; there are {', '.join(studies)}")
    study = studies[options.study]
    root: Path = options.to / options.study
    root.mkdir(parents=True, exist_ok=True)
    steps, seeds = options.steps or study["steps"], options.seeds or study["seeds"]
    about = {"baseline": study["baseline"], "steps": steps, "arms": list(study["arms"])}
    (root / "study.json").write_text(json.dumps(about) + "\n")
    watcher = watch_gpu(root / "gpu.csv")
    start = time.monotonic()
    try:
        runs = plan(study, root, steps, seeds, options.options)
        return run_all(runs, options.jobs, options.seconds)
    finally:
        _end_watch(watcher)
        with (root / "wall.jsonl").open("a") as file:
            wall = {"jobs": options.jobs, "seconds": round(time.monotonic() - start, 1)}
            file.write(json.dumps(wall) + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("study")
    run.add_argument("--to", type=Path, default=Path("runs/parity"))
    run.add_argument("--jobs", type=int, default=5, help="runs at once")
    run.add_argument("--steps", type=int, default=0, help="optimizer steps of each run")
    run.add_argument("--seeds", type=int, nargs="+", help="other seeds than the study's")
    run.add_argument("--seconds", type=float, default=0, help="stop after this time (0: never)")
    gather = verbs.add_parser("collect")
    gather.add_argument("runs", type=Path)
    gather.add_argument("--to", type=Path, required=True)
    report = verbs.add_parser("report")
    report.add_argument("results", type=Path)
    report.add_argument("--to", type=Path, required=True)
    report.add_argument("--price", type=float, default=3.0, help="dollars for an hour of the GPU")
    options, rest = parser.parse_known_args(arguments)
    if rest and (options.verb != "run" or not all(word.startswith("--") for word in rest)):
        parser.error(f"unknown: {' '.join(rest)}")
    options.options = rest
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Preempted.exit_code))
    if options.verb == "run":
        return run_study(options)
    if options.verb == "collect":
        options.to.write_text(json.dumps(collect(options.runs), separators=(",", ":")) + "\n")
    else:
        write_report(json.loads(options.results.read_text()), options.to, options.price)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
