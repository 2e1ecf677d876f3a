"""`infir2 demo`: the whole recipe on a tiny model, through the same commands a user types.

The stages that need one another run in order, and beside them, on a small machine's second core, the BF16 comparison and
the evaluations, which nothing waits for until the end. Every stage is resumed or skipped when it is already done, so the
command can be stopped and given again.
"""

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from infir2.errors import ConfigError, UserError
from infir2.report import render_stage_table, stage_table, write_report

RECIPES = Path(__file__).resolve().parent / "recipes"
STAGES = ("cpt", "sft1", "sft2", "rl1", "rl2")  # each starts from the one before
EVALUATED = STAGES[1:]


@dataclass(frozen=True)
class Stage:
    """One `infir2` command of the demo and the file that shows it is done (None: the command knows itself)."""

    name: str
    words: tuple[str, ...]
    done: Path | None = None
    needs: str = ""  # of a stage beside the main ones: the one that it waits for

    @property
    def is_done(self) -> bool:
        return self.done is not None and self.done.exists()

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "infir2", *self.words]

    def failure(self, code: int, where: str) -> UserError:
        error = UserError(
            f"the demo stopped: stage {self.name} ended with code {code}, {where}; the same command goes on from there"
        )
        error.exit_code = code if code > 0 else 70
        return error


def run_demo(directory: Path, seed: int) -> None:
    """Runs every stage under `directory`, prints what improved and where the report is."""
    if not RECIPES.is_dir():
        raise ConfigError(f"{RECIPES} is missing: the demo runs from a checkout of the repository")
    start = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    logs = directory / "logs"
    logs.mkdir(exist_ok=True)
    console = Console()
    main, side = plan(directory, seed)
    beside: list[tuple[Stage, subprocess.Popen[bytes]]] = []
    try:
        for stage in main:
            if stage.is_done:
                console.print(f"{stage.name}: done before, {stage.done}")
            else:
                console.rule(
                    f"{stage.name}   [dim]infir2 {' '.join(stage.words[:2])} ...[/dim]",
                    align="left",
                )
                if code := subprocess.run(stage.command, check=False).returncode:
                    raise stage.failure(code, "its message is above")
            for other in side:
                if other.needs == stage.name and not other.is_done:
                    with (logs / f"{other.name}.log").open("wb") as log:
                        beside.append(
                            (
                                other,
                                subprocess.Popen(
                                    other.command, stdout=log, stderr=subprocess.STDOUT
                                ),
                            )
                        )
        console.rule("waiting for the comparisons beside", align="left")
        for other, process in beside:
            if code := process.wait():
                raise other.failure(code, f"its message is in {logs / other.name}.log")
    finally:
        for _, process in beside:  # nothing goes on after the demo has ended
            process.terminate()
            process.wait()
    runs = [
        directory / name
        for name in (*STAGES[:1], "cpt-bf16", *STAGES[1:], *(f"eval-{name}" for name in EVALUATED))
    ]
    page = write_report(runs, directory / "report.html")
    console.print(render_stage_table(stage_table(runs)))
    console.print(
        f"{(time.monotonic() - start) / 60:.1f} minutes. Report: {page.resolve()}", soft_wrap=True
    )


def plan(directory: Path, seed: int) -> tuple[list[Stage], list[Stage]]:
    """The stages in order, and those that run beside them as soon as their model exists."""
    world = directory / "world"
    main = [Stage("data", ("data", "demo", "--to", str(world), "--seed", str(seed)), world)]
    main += [
        _train("cpt", "cpt", directory, seed),
        _train("sft", "sft1", directory, seed),
        _train("sft", "sft2", directory, seed),
    ]
    main += [*_export("sft2", directory), _train("rl", "rl1", directory, seed)]
    main += [
        *_export("rl1", directory),
        _train("rl", "rl2", directory, seed),
        *_export("rl2", directory),
    ]
    main.append(
        Stage("verify", ("verify-weights", str(directory / "rl2"), str(directory / "rl2-fp8")))
    )
    comparison = replace(_train("cpt", "cpt-bf16", directory, seed), needs="data")
    return main, [comparison, *(_evaluate(name, directory, seed) for name in EVALUATED)]


def _train(verb: str, name: str, directory: Path, seed: int) -> Stage:
    data = name.removesuffix("-bf16")
    options = [
        f"--run.dir={directory / name}",
        f"--run.seed={seed}",
        f"--data.tokenizer={directory / 'world' / 'tokenizer'}",
    ]
    options.append(f"--data.sources.0.path={directory / 'world' / data}.jsonl")
    if data == "cpt":
        options.append(
            f"--data.validation_sources.0.path={directory / 'world' / 'cpt_validation.jsonl'}"
        )
    else:
        options.append(f"--model.path={directory / STAGES[STAGES.index(name) - 1]}")
    if verb == "rl":
        options.append(f"--rollout.model={directory / STAGES[STAGES.index(name) - 1]}-fp8")
    return Stage(name, (verb, str(RECIPES / f"{name}.toml"), *options))


def _export(name: str, directory: Path) -> list[Stage]:
    hf, fp8 = directory / f"{name}-hf", directory / f"{name}-fp8"
    return [
        Stage(f"{name}-hf", ("export", "hf", str(directory / name), "--to", str(hf)), hf),
        Stage(f"{name}-fp8", ("export", "fp8", str(hf), "--to", str(fp8)), fp8),
    ]


def _evaluate(name: str, directory: Path, seed: int) -> Stage:
    out = directory / f"eval-{name}"
    problems = f"--evaluate.problems.0.path={directory / 'world' / 'heldout.jsonl'}"
    words = (
        "eval",
        str(RECIPES / "eval.toml"),
        f"--model.path={directory / name}",
        f"--run.dir={out}",
        f"--run.seed={seed}",
        problems,
    )
    return Stage(f"eval-{name}", words, out / "metrics.jsonl", needs=name)
