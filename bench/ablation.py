"""The precisions of RL: scales x trainer x engine, what each costs in log-probabilities and reward.

    infir2 data demo --to world                     # or prompts of your own
    python bench/ablation.py run --model sft2-hf --to runs/ablation --out ablation.json \\
        [--engines native sglang] [--python sglang-env/bin/python] [--servers 2] [--seconds 500] \\
        [--server-option=--attention-backend=triton ...] -- --data.sources.0.path=world/rl1.jsonl \\
        --data.tokenizer=world/tokenizer [further options of each infir2 rl]
    python bench/ablation.py table ablation.json [another.json ...]     # of docs/results/rl.md
    python bench/ablation_plot.py ablation.json k3.png      # needs matplotlib

Arms: scales pow2 or fp32, trainer and engine each in FP8 or BF16; where both are BF16 there are no
scales, so seven arms. Each is an `infir2 rl` with recipes/demo/rl1.toml, --jobs of them at once on
one GPU. Servers are started once per format of weights and serve one run after another. Gates on
the mismatch are off. The same command again skips what is finished; after --seconds all runs are
stopped, and what they have measured counts. A failed run prints its last lines, the others go on.
"""

import argparse
import asyncio
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from processes import Process, run_processes, start_logged, tell

from infir2.config.schema import RolloutSection
from infir2.engines.http_client import KEY_VARIABLE
from infir2.engines.server_process import ServerProcess
from infir2.engines.servers import KINDS
from infir2.evaluate.statistics import student_half_width
from infir2.files import read_json_lines

RECIPE = Path(__file__).parents[1] / "recipes" / "demo" / "rl1.toml"
FORMATS = ("pow2", "fp32", "bf16")  # of an engine's weights
MEASURES = ("kl", "k1", "max", "p999", "prob_error", "equal", "mean")
GRACE_SECONDS = 12.0


class Arm(NamedTuple):
    """Precisions of one way of training; `scales` is "" where nothing is FP8."""

    scales: str
    trainer: str
    engine: str

    @property
    def name(self) -> str:
        return "-".join(filter(None, self))

    @property
    def format(self) -> str:
        """Of the engine's weights."""
        return self.scales if self.engine == "fp8" else "bf16"


ARMS = [
    *(Arm(s, t, e) for t, e in (("fp8", "fp8"), ("bf16", "fp8"), ("fp8", "bf16"))
      for s in ("pow2", "fp32")),
    Arm("", "bf16", "bf16"),
]  # fmt: skip


@dataclass
class Run:
    """One `infir2 rl`, whose files are `dir` and `dir`.log."""

    arm: Arm
    engine: str
    seed: int
    dir: Path
    command: list[str]
    server: ServerProcess | None = None

    @property
    def finished(self) -> bool:
        return self.dir.with_suffix(".finished").exists()


@dataclass
class Servers:
    """Servers that have started, by the format of their weights; each serves one run at a time."""

    hosts: list[tuple[str, ServerProcess]] = field(default_factory=list)
    free: dict[str, list[ServerProcess]] = field(default_factory=dict)
    thread: threading.Thread | None = None

    def begin(self, options: argparse.Namespace, kind: str, formats: Iterable[str]) -> None:
        """Start `options.servers` of `kind` for each format; they become free one by one."""
        for name in formats:
            rollout = RolloutSection(
                engine=kind,  # type: ignore[arg-type]
                model=str(options.to / name),
                python=options.python,
                memory_fraction=options.memory_fraction if kind != "infir2" else 0,
                cache_gib=options.cache_gib,
                max_running_requests=options.requests,
                server_options=tuple(options.server_option),
            )

            def command(place: Any, rollout: RolloutSection = rollout) -> Any:
                return KINDS[kind].command(rollout, place)

            for index in range(options.servers):
                words = (f"{name}-{index}", command, KINDS[kind].open_client, lambda *_: None)
                self.hosts.append((name, ServerProcess(*words, options.to / "servers", 0)))

        async def start(name: str, host: ServerProcess) -> None:
            begun = time.monotonic()
            try:
                client = await host.start()
                await client.close()
            except Exception as error:  # whatever a server dies of, the other runs go on
                say(f"no server {host.name}: {error}")
                return
            say(f"server {host.name} after {time.monotonic() - begun:.0f} s")
            self.free.setdefault(name, []).append(host)

        async def start_all() -> None:
            await asyncio.gather(*(start(*each) for each in self.hosts))

        self.thread = threading.Thread(target=asyncio.run, args=(start_all(),), daemon=True)
        self.thread.start()

    @property
    def starting(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def next_run(self, waiting: Sequence[Run]) -> Run | None:
        """The first run that needs no server, or whose server is free."""
        ready = (run for run in waiting if run.engine == "native" or self.free.get(run.arm.format))
        return next(ready, None)

    def end(self) -> None:
        for _, host in self.hosts:
            host.kill()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def plan(options: argparse.Namespace) -> list[Run]:
    """All runs, one engine after another, all arms of the first seed first."""
    runs = []
    for engine in options.engines:
        for seed in options.seeds:
            for arm in (arm for arm in ARMS if not options.arms or arm.name in options.arms):
                name = f"{engine}-{arm.name}-{seed}"
                words = rl_options(options, arm, engine, seed, options.to / name)
                command = [sys.executable, "-m", "infir2", "rl", str(RECIPE), *words]
                runs.append(Run(arm, engine, seed, options.to / name, command))
    return runs


def rl_options(
    options: argparse.Namespace, arm: Arm, engine: str, seed: int, run_dir: Path
) -> list[str]:
    """Of one `infir2 rl`."""
    return [
        f"--run.dir={run_dir}",
        f"--run.seed={seed}",
        f"--model.path={options.model}",
        f"--schedule.total_steps={options.steps}",
        f"--fp8.enabled={str(arm.trainer == 'fp8').lower()}",
        f"--fp8.scale_format={arm.scales or 'pow2'}",
        f"--rollout.engine={engine}",
        f"--rollout.precision={arm.engine}",
        f"--rollout.model={options.to / arm.format}",
        f"--rollout.cache_gib={options.cache_gib}",
        f"--rollout.max_running_requests={options.requests}",
        "--rl.max_mismatch_kl=1e9",
        "--rl.max_mismatch_prob_error=1e9",
        "--checkpoint.save_every=100000",
        *options.rl_options,
    ]


def export(options: argparse.Namespace) -> None:
    """The model in each format, in `options.to`."""
    options.to.mkdir(parents=True, exist_ok=True)
    if not (options.to / "bf16").exists():
        (options.to / "bf16").symlink_to(options.model.resolve())
    started = []
    for name in FORMATS[:2]:
        if not (options.to / name).exists():
            words = ["export", "fp8", str(options.model), "--to", str(options.to / name)]
            words += ["--scale-format", name]
            started.append(subprocess.Popen([sys.executable, "-m", "infir2", *words]))
    if any([process.wait() for process in started]):
        sys.exit("the export failed")


def run_all(runs: Sequence[Run], servers: Servers, jobs: int, seconds: float) -> dict[str, int]:
    """Run, at most `jobs` at once, for `seconds`. Returns exit codes by name of the run."""
    codes = dict[str, int]()

    def finish(run: Run, code: int) -> None:
        codes[run.dir.name] = code
        if run.server is not None:
            servers.free[run.arm.format].append(run.server)
        if code == 0:
            run.dir.with_suffix(".finished").touch()
        tell(run.dir, code, f", {len(rows_of(run.dir, 'train'))} steps")

    run_processes(
        [run for run in runs if not run.finished],
        servers.next_run,
        lambda run: _start(run, servers),
        finish,
        jobs=jobs,
        seconds=seconds,
        grace_seconds=GRACE_SECONDS,
        may_wait=lambda: servers.starting,
    )
    return codes


def _start(run: Run, servers: Servers) -> Process:
    if run.engine == "native":
        return start_logged(run.command, run.dir)
    run.server = servers.free[run.arm.format].pop(0)
    assert run.server.place is not None
    command = [*run.command, f"--rollout.urls={json.dumps([run.server.place.url])}"]
    return start_logged(command, run.dir, **{KEY_VARIABLE: run.server.place.api_key})


def rows_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind in metrics.jsonl: "train" for each step's, "evaluation"."""
    return [row for row in read_json_lines(run_dir / "metrics.jsonl") if row["kind"] == kind]


def collect(run: Run, code: int | None) -> dict[str, Any] | None:
    """What a run has measured; None before its first step."""
    rows = rows_of(run.dir, "train")
    if not rows:
        return None

    def mismatch(row: dict[str, Any]) -> dict[str, float]:
        return {name: row[f"mismatch_{name}"] for name in MEASURES if f"mismatch_{name}" in row}

    by_step = {row["step"]: row for row in rows}
    trained = [row for row in rows if "mismatch_kl" in row]  # some steps have nothing to train
    return {
        "arm": run.arm.name, "engine": run.engine, "seed": run.seed, "exit_code": code,
        "finished": run.finished, "steps": len(rows),
        "at": {str(step): mismatch(by_step[step]) for step in (1, 2) if step in by_step}
        | {"last": mismatch(trained[-1]) if trained else {}},
        "evaluations": rows_of(run.dir, "evaluation"),
        "reward": [row["reward"] for row in rows],
        "k3": [row.get("mismatch_kl") for row in rows],
        "equal": [row.get("mismatch_equal") for row in rows],
        "seconds": [round(row["seconds"], 3) for row in rows],
    }  # fmt: skip


MISMATCH = ("engine", "arm", "k3, step 1", "k3, step 2", "median", "largest", "equal", "99.9 %")
REWARD = ("engine", "arm", "seeds", "first 3 steps", "last 5 steps", "rise", "held-out", "s/step")


def tables(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The two tables of docs/results/rl.md, which says what their columns are."""
    arms: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        arms.setdefault((run["engine"], run["arm"]), []).append(run)
    lines = _table(MISMATCH, [[*arm, *_mismatch_cells(own)] for arm, own in arms.items()])
    return [*lines, "", *_table(REWARD, [[*arm, *_reward_cells(own)] for arm, own in arms.items()])]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return [cells[0], "|" + "---|" * len(header), *cells[1:]]


def _mismatch_cells(runs: Sequence[dict[str, Any]]) -> list[str]:
    """k3 in units of 1e-5; what is of all steps is of the finished runs."""

    def at(step: str, name: str) -> list[float]:
        return [run["at"][step][name] for run in runs if name in run["at"].get(step, {})]

    def of_steps(name: str) -> list[list[float]]:
        steps = [[each for each in run[name] if each is not None] for run in runs]
        return [each for run, each in zip(runs, steps, strict=True) if run["finished"] and each]

    def small(values: Sequence[float]) -> str:
        return spread([value * 1e5 for value in values], lambda value: f"{float(f'{value:.2g}'):g}")

    k3, equal = of_steps("k3"), [share for steps in of_steps("equal") for share in steps]
    ends = dict.fromkeys(f"{end:.2g}" for end in (min(equal), max(equal))) if equal else ()
    return [
        *(small(at("1", "kl")), small(at("2", "kl"))),
        *(small(list(map(statistics.median, k3))), small([max(map(max, k3))] if k3 else [])),
        *(" to ".join(ends), spread(at("2", "p999"), "{:.3g}".format)),
    ]


def _reward_cells(runs: Sequence[dict[str, Any]]) -> list[str]:
    ends, form = [run for run in runs if run["finished"]], "{:.3f}".format
    seeds = f"{len(ends)} of {len(runs)}"
    if not ends:
        return [seeds, *[""] * (len(REWARD) - 3)]
    first = [statistics.fmean(run["reward"][:3]) for run in ends]
    last = [statistics.fmean(run["reward"][-5:]) for run in ends]
    rises = [b - a for a, b in zip(first, last, strict=True)]
    rise = f"{statistics.fmean(rises):+.3f} ± {student_half_width(rises):.3f}"
    held_out = [f"{row['avg_at_k']:.4g}" for run in ends for row in run["evaluations"][-1:]]
    pace = statistics.median(statistics.median(run["seconds"]) for run in ends)
    cells = [seeds, spread(first, form), spread(last, form), rise.removesuffix(" ± nan")]
    return [*cells, ", ".join(held_out), f"{pace:.3g}"]


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Mean and range. Example: "0.2 [0.1, 0.3]"."""
    if not values:
        return ""
    mean, low, high = map(form, (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} [{low}, {high}]"


def run_command(options: argparse.Namespace) -> None:
    begun = time.monotonic()
    export(options)
    runs, servers, codes = plan(options), Servers(), dict[str, int]()
    kinds = [kind for kind in options.engines if kind != "native"]
    if len(kinds) > 1:
        raise SystemExit("--engines: native and one kind of server")
    wanted = [run for run in runs if run.engine != "native" and not run.finished]
    try:
        if wanted:
            servers.begin(options, kinds[0], dict.fromkeys(run.arm.format for run in wanted))
        left = options.seconds - (time.monotonic() - begun)
        codes = run_all(runs, servers, options.jobs, left)
    finally:
        servers.end()
        found = [collect(run, codes.get(run.dir.name)) for run in runs]
        result = {"steps": options.steps, "options": options.rl_options}
        result |= {"seconds": time.monotonic() - begun, "runs": list(filter(None, found))}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(tables(result["runs"])))


def arguments_of(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--model", type=Path, required=True, help="BF16 Hugging Face directory")
    run.add_argument("--to", type=Path, required=True)
    run.add_argument("--out", type=Path, required=True)
    kinds = ["native", *KINDS]
    run.add_argument("--engines", nargs="+", default=["native"], choices=kinds, help="one server")
    run.add_argument("--arms", nargs="+", default=[], choices=[arm.name for arm in ARMS])
    run.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    run.add_argument("--steps", type=int, default=30)
    run.add_argument("--jobs", type=int, default=8, help="runs at once")
    run.add_argument("--seconds", type=float, default=math.inf)
    run.add_argument("--requests", type=int, default=384, help="an engine runs at once")
    run.add_argument("--cache-gib", type=float, default=1.0)
    run.add_argument("--python", default="", help="of the servers' environment")
    run.add_argument("--servers", type=int, default=1, help="of each format")
    run.add_argument("--memory-fraction", type=float, default=0.0)
    run.add_argument("--server-option", action="append", default=[])
    run.add_argument("rl_options", nargs="*")
    commands.add_parser("table").add_argument("files", nargs="+", type=Path)
    return parser.parse_args(words)


def main(words: Sequence[str]) -> None:
    options = arguments_of(words)
    if options.command == "run":
        run_command(options)
        return
    runs = [run for path in options.files for run in json.loads(path.read_text())["runs"]]
    print("\n".join(tables(runs)))


if __name__ == "__main__":
    main(sys.argv[1:])
