"""`infir2 demo`: the whole recipe on a tiny model, through the commands that a user types.

The stages from cpt to rl2 run in order, because each starts from the model of the one before. On a
second core run the stages that no other stage needs: the BF16 comparison and the evaluations, with
a lower priority. A stage that is done is skipped and one that was interrupted resumes, so the demo
can be stopped and run again.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from infir2.demo.commands import begin_imports, run_command, start_command
from infir2.errors import ConfigError, UserError, disk_reason
from infir2.report import render_stage_table, stage_table, write_report
from infir2.terminal import print_heading, print_json, print_renderable, print_result, pulse

RECIPES = Path(__file__).resolve().parent / "recipes"
STAGES = ("cpt", "sft1", "sft2", "rl1", "rl2")  # each starts from the one before
EVALUATED = STAGES[1:]
SIDE_NICENESS = 10  # of side stages, above that of the others
REPORTED = ("cpt", "cpt-bf16", *STAGES[1:], *(f"eval-{name}" for name in EVALUATED))


@dataclass(frozen=True)
class Stage:
    """One `infir2` command of the demo.

    `output` exists once the stage is done; None if the command itself finds out. `after` names the
    stage that a side stage waits for. A stage that does not need torch runs while it is imported.
    """

    name: str
    arguments: tuple[str, ...]
    output: Path | None = None
    after: str = ""
    needs_torch: bool = True

    @property
    def is_done(self) -> bool:
        return self.output is not None and self.output.exists()

    def failure(self, code: int, message_location: str) -> UserError:
        """The error that ends the demo: the stage's exit code, 70 if a signal killed it."""
        error = UserError(
            f"the demo stopped: stage {self.name} ended with code {code}, its message is "
            f"{message_location}; run the same command again to resume"
        )
        error.exit_code = code if code > 0 else 70
        return error


class SideStages:
    """Stages that run in the background, with their output in log files."""

    def __init__(self, stages: Sequence[Stage], log_dir: Path) -> None:
        self._stages, self._log_dir = stages, log_dir
        self._running: list[tuple[Stage, BaseProcess]] = []

    def start_after(self, name: str) -> None:
        """Start the stages that wait for the stage `name`."""
        for stage in self._stages:
            if stage.after == name and not stage.is_done:
                # Nothing but the end waits for a side stage: the others have the cores first.
                process = start_command(
                    stage.arguments, log_file=self._log(stage), niceness=SIDE_NICENESS
                )
                self._running.append((stage, process))

    def wait(self) -> None:
        """Wait for all of them. Raises UserError if one failed."""
        for stage, process in self._running:
            process.join()
            if code := process.exitcode:
                raise stage.failure(code, f"in {self._log(stage)}")

    def terminate(self) -> None:
        for _, process in self._running:
            process.terminate()
            process.join()

    def _log(self, stage: Stage) -> Path:
        return self._log_dir / f"{stage.name}.log"


def run_demo(directory: Path, seed: int, as_json: bool = False) -> None:
    """Run every stage under `directory`, write the report, print a table of the stages.

    With `as_json`, the table is JSON and the stages' own results go to stderr. Raises UserError
    with the exit code of a stage that failed.
    """
    start = time.monotonic()
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        _run_stages(directory, seed, stdout=2 if as_json else None)
    runs = [directory / name for name in REPORTED]
    page = write_report(runs, directory / "report.html")
    if as_json:
        print_json(
            {"report": str(page.resolve()), "stages": [row.as_json() for row in stage_table(runs)]}
        )
        return
    print_renderable(render_stage_table(stage_table(runs)))
    print_result(f"{(time.monotonic() - start) / 60:.1f} minutes. Report: {page.resolve()}")


def _run_stages(directory: Path, seed: int, stdout: int | None) -> None:
    main, side = plan(directory, seed)
    begin_imports()
    with _side_stages(side, directory / "logs") as side_stages:
        for stage in main:
            if stage.is_done:
                print_result(f"{stage.name}: already done, {stage.output}")
            else:
                print_heading(stage.name, f"infir2 {' '.join(stage.arguments[:2])} ...")
                if code := run_command(stage.arguments, stdout, stage.needs_torch):
                    raise stage.failure(code, "above")
            side_stages.start_after(stage.name)
        print_heading("waiting for the comparisons")
        with pulse("waiting for the comparisons"):
            side_stages.wait()


@contextmanager
def _side_stages(stages: Sequence[Stage], log_dir: Path) -> Iterator[SideStages]:
    """Background stages; none outlives the block."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{log_dir}: cannot be created ({disk_reason(error)}); infir2 demo DIR names a "
            "directory to write to"
        ) from error
    side_stages = SideStages(stages, log_dir)
    try:
        yield side_stages
    finally:
        side_stages.terminate()


def plan(directory: Path, seed: int) -> tuple[list[Stage], list[Stage]]:
    """(stages in order, side stages that start when their model exists)."""
    world = directory / "world"
    main = [
        Stage(
            "data",
            ("data", "demo", "--to", str(world), "--seed", str(seed)),
            world,
            needs_torch=False,
        ),
        _train("cpt", "cpt", directory, seed),
        _train("sft", "sft1", directory, seed),
        _train("sft", "sft2", directory, seed),
        *_export("sft2", directory),
        _train("rl", "rl1", directory, seed),
        *_export("rl1", directory),
        _train("rl", "rl2", directory, seed),
        *_export("rl2", directory),
        Stage("verify", ("verify-weights", str(directory / "rl2"), str(directory / "rl2-fp8"))),
    ]
    bf16 = replace(_train("cpt", "cpt-bf16", directory, seed), after="data")
    return main, [bf16, *(_evaluate(name, directory, seed) for name in EVALUATED)]


def _train(verb: str, name: str, directory: Path, seed: int) -> Stage:
    world = directory / "world"
    data = name.removesuffix("-bf16")
    options = [
        f"--run.dir={directory / name}",
        f"--run.seed={seed}",
        f"--data.tokenizer={world / 'tokenizer'}",
        f"--data.sources.0.path={world / data}.jsonl",
    ]
    if data == "cpt":
        options.append(f"--data.validation_sources.0.path={world / 'cpt_validation.jsonl'}")
    else:
        previous = directory / STAGES[STAGES.index(name) - 1]
        options.append(f"--model.path={previous}")
        if verb == "rl":
            options.append(f"--rollout.model={previous}-fp8")
    return Stage(name, (verb, str(RECIPES / f"{name}.toml"), *options))


def _export(name: str, directory: Path) -> list[Stage]:
    hf, fp8 = directory / f"{name}-hf", directory / f"{name}-fp8"
    return [
        Stage(f"{name}-hf", ("export", "hf", str(directory / name), "--to", str(hf)), hf),
        Stage(f"{name}-fp8", ("export", "fp8", str(hf), "--to", str(fp8)), fp8),
    ]


def _evaluate(name: str, directory: Path, seed: int) -> Stage:
    run_dir = directory / f"eval-{name}"
    arguments = (
        "eval",
        str(RECIPES / "eval.toml"),
        f"--model.path={directory / name}",
        f"--run.dir={run_dir}",
        f"--run.seed={seed}",
        f"--evaluate.problems.0.path={directory / 'world' / 'heldout.jsonl'}",
    )
    return Stage(f"eval-{name}", arguments, run_dir / "metrics.jsonl", after=name)
