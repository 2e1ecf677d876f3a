"""The demo's plan and the README's commands are the same commands, and each of them parses."""

import importlib.util
import json
import os
import re
import shlex
import signal
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import infir2.demo.stages
from infir2.cli import main
from infir2.cli.demo import SEED
from infir2.config.load import load
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe
from infir2.demo import commands
from infir2.demo.stages import SIDE_NICENESS, STAGES, SideStages, Stage, plan
from infir2.errors import UserError
from infir2.evaluate.statistics import Evaluation
from infir2.report import StageRow
from infir2.report.stages import Change

ROOT = Path(__file__).parents[2]
CLASSES = {"cpt": TrainRecipe, "sft": TrainRecipe, "rl": RlRecipe, "eval": EvalRecipe}


def readme_commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    return [shlex.split(line)[1:] for line in re.findall(r"^infir2 .*$", text, re.MULTILINE)]


def commands_with_a_recipe() -> list[list[str]]:
    """Without the recipes that `infir2 init` writes, which tests/unit/test_starter.py runs."""
    written = [words[1] for words in readme_commands() if words[0] == "init"]
    return [
        words
        for words in readme_commands()
        if words[0] in CLASSES and str(Path(words[1]).parent) not in written
    ]


def recipe_of(words: list[str]) -> object:
    paths = [word for word in words[1:] if word.endswith(".toml")]
    return load(
        CLASSES[words[0]], paths, [word for word in words[1:] if word.startswith("--")], {}
    ).recipe


@pytest.mark.parametrize("words", commands_with_a_recipe(), ids=" ".join)
def test_readme_commands_with_a_recipe_parse(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe_of(words)


def test_the_readme_shows_what_the_demo_runs() -> None:
    stages, _ = plan(Path("runs/demo"), 1236)
    told = {(words[0], words[1].removeprefix("recipes/demo/")) for words in readme_commands()}
    for stage in stages:
        if stage.arguments[0] in ("cpt", "sft", "rl"):
            assert (stage.arguments[0], Path(stage.arguments[1]).name) in told, stage.name


def test_the_readme_block_repeats_the_demo_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """So each command, pasted after the demo, finds its own output."""
    monkeypatch.chdir(ROOT)
    stages, side = plan(Path("runs/demo"), SEED)
    recipes = [recipe_of(list(s.arguments)) for s in [*stages, *side] if s.arguments[0] in CLASSES]
    others = [list(stage.arguments) for stage in stages if stage.arguments[0] not in CLASSES]
    text = (ROOT / "README.md").read_text().split("infir2 data demo")[1].split("```")[0]
    for line in f"infir2 data demo{text}".splitlines()[:-1]:
        words = shlex.split(line)[1:]
        if words[0] in CLASSES:
            assert recipe_of(words) in recipes, line
        else:
            assert words in [arguments[: len(words)] for arguments in others], line


def test_the_table_of_stages_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = Evaluation(0.5, 0.0, 1.0, 4, 0.75, 0.5, 1, 0.0, 0.0, 0.0, 9.0, 12.0, {})
    row = StageRow("sft1", tmp_path / "sft1", scores, Change(), "")
    echo = Stage("data", ("completion", "bash"), needs_torch=False)
    monkeypatch.setattr(infir2.demo.stages, "plan", lambda *_: ([echo], []))
    monkeypatch.setattr(infir2.demo.stages, "begin_imports", lambda: None)
    monkeypatch.setattr(infir2.demo.stages, "write_report", lambda _, page: page)
    monkeypatch.setattr(infir2.demo.stages, "stage_table", lambda _: [row])
    assert main(["demo", str(tmp_path), "--json"]) == 0
    output = capfd.readouterr()
    result = json.loads(output.out)
    assert result["report"] == str(tmp_path / "report.html")
    (stage,) = result["stages"]
    assert (stage["stage"], stage["avg_at_k"], stage["k"]) == ("sft1", 0.5, 4)
    assert (stage["low"], stage["high"]) == (0.0, 1.0)
    assert stage["change"] is stage["change_interval"] is None
    assert "complete -" in output.err


def test_each_stage_of_the_plan_parses_and_starts_from_the_one_before(tmp_path: Path) -> None:
    stages, side = plan(tmp_path, 5)
    recipes = {
        stage.name: recipe_of(list(stage.arguments))
        for stage in [*stages, *side]
        if stage.arguments[0] in CLASSES
    }
    assert {recipe.run.seed for recipe in recipes.values()} == {5}  # type: ignore[attr-defined]
    for before, name in pairwise(STAGES):
        assert recipes[name].model.path == str(tmp_path / before)  # type: ignore[attr-defined]
    assert recipes["rl2"].rollout.model == str(tmp_path / "rl1-fp8")  # type: ignore[attr-defined]
    assert not recipes["cpt-bf16"].fp8.enabled  # type: ignore[attr-defined]
    known = {stage.name for stage in stages}
    assert all(stage.after in known for stage in side)


def test_the_two_cpt_runs_differ_in_nothing_but_fp8(tmp_path: Path) -> None:
    stages, side = plan(tmp_path, 5)
    words = {stage.name: list(stage.arguments) for stage in [*stages, *side]}
    fp8, bf16 = recipe_of(words["cpt"]).model_dump(), recipe_of(words["cpt-bf16"]).model_dump()  # type: ignore[attr-defined]
    assert {key for key in fp8 if fp8[key] != bf16[key]} == {"run", "fp8"}
    assert {key for key in fp8["run"] if fp8["run"][key] != bf16["run"][key]} == {"dir"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[BaseProcess]:
    """The commands that a test starts, from a process that imports little."""
    monkeypatch.setattr(commands, "IMPORTED", ("infir2.cli",))
    commands.begin_imports()
    processes: list[BaseProcess] = []

    def start(*arguments: Any, **options: Any) -> BaseProcess:
        processes.append(start_command(*arguments, **options))
        return processes[-1]

    start_command = commands.start_command
    for module in (commands, infir2.demo.stages):
        monkeypatch.setattr(module, "start_command", start)
    return processes


def test_a_side_stage_leaves_the_cores_to_the_others(
    tmp_path: Path, started: list[BaseProcess]
) -> None:
    world = str(tmp_path / "world")
    side = SideStages([Stage("side", ("data", "demo", "--to", world), after="data")], tmp_path)
    side.start_after("data")
    expected, niceness = min(19, os.nice(0) + SIDE_NICENESS), None
    while started[0].is_alive() and niceness != expected:
        niceness = os.getpriority(os.PRIO_PROCESS, started[0].pid or 0)
    side.terminate()
    assert niceness == expected


def test_a_stage_that_fails_keeps_its_message_and_its_exit_code(
    tmp_path: Path, started: list[BaseProcess]
) -> None:
    side = SideStages([Stage("side", ("sft", "absent.toml"), after="data")], tmp_path)
    side.start_after("data")
    with pytest.raises(UserError, match=r"side ended with code 2, .*side\.log") as error:
        side.wait()
    assert error.value.exit_code == 2
    assert "absent.toml" in (tmp_path / "side.log").read_text()


def test_a_command_ends_with_the_demo(
    tmp_path: Path, started: list[BaseProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches both; here the command ignores it."""
    joins = iter([KeyboardInterrupt])

    def join(process: BaseProcess, timeout: float | None = None) -> None:
        for error in joins:
            raise error
        original(process, timeout)

    original = BaseProcess.join
    monkeypatch.setattr(BaseProcess, "join", join)
    monkeypatch.setattr(commands, "_SECONDS_TO_STOP", 0.1)
    with pytest.raises(KeyboardInterrupt):
        commands.run_command(("data", "demo", "--to", str(tmp_path / "world")), None)
    assert started[0].exitcode == -signal.SIGTERM


def test_what_is_imported_for_all_commands_is_there() -> None:
    assert all(importlib.util.find_spec(name) for name in commands.IMPORTED)


def test_only_the_data_is_written_without_torch(tmp_path: Path) -> None:
    stages, side = plan(tmp_path, 5)
    assert [s.name for s in [*stages, *side] if not s.needs_torch] == ["data"]
