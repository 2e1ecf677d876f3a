"""Runs that start from another run's checkpoint (checkpoint.branch_from)."""

from pathlib import Path
from typing import Any

import pytest
from stages import curve, lines, make_rl_start, options, run

from infir2.checkpoint import open_checkpoint
from infir2.cli import main


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CPT run of four steps and its export."""
    return make_rl_start(world, tmp_path_factory.mktemp("start"))


def words(world: Path, start: Path, directory: Path, stage: str, **values: Any) -> list[str]:
    given = {"checkpoint__branch_from": start / "cpt", "train__validate_every": 0}
    if stage != "cpt":
        given["model__path"] = start / "cpt"
    return options(world, directory, stage, **(given | values))


def test_a_branch_with_other_data_begins_it(world: Path, start: Path, tmp_path: Path) -> None:
    """The usual decay: better data, the optimizer's state, no flag; a resume has the exact data."""
    other = {"data__sources__0__path": world / "cpt_validation.jsonl"}
    other |= {"schedule__total_steps": 8, "checkpoint__save_every": 1}
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    run(words(world, start, undisturbed, "cpt", **other))
    run([*words(world, start, stopped, "cpt", **other), "--train.stop_after_step=6"])
    run(words(world, start, stopped, "cpt", **other))
    assert [step for step, _ in curve(undisturbed, "loss")] == [5, 6, 7, 8]
    assert curve(stopped, "loss", "gradient_norm") == curve(undisturbed, "loss", "gradient_norm")
    events = [(line["step"], line["event"]) for line in lines(stopped, "event")]
    assert events == [(4, "data_from_its_start")]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"schedule__total_steps": 4}, "schedule.total_steps (4) must be greater than the step"),
        ({"schedule__total_steps": 5}, "the decay starts at step 3, before checkpoint.branch_from"),
        (
            {"schedule__total_steps": 9, "train__stop_after_step": 4},
            "train.stop_after_step (4) must be greater than the step of checkpoint.branch_from (4)",
        ),
        ({"checkpoint__branch_from": "/nowhere"}, "/nowhere: is neither a checkpoint"),
    ],
)
def test_a_branch_that_cannot_train_is_refused_by_the_run_and_by_check(
    world: Path,
    start: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, Any],
    sentence: str,
) -> None:
    arguments = words(world, start, tmp_path / "run", "cpt", **values)
    assert main(arguments) in (2, 3)
    assert sentence in capsys.readouterr().err
    assert main(["check", *arguments]) == 1
    assert f"FAIL  run dir    {sentence}" in capsys.readouterr().out


def test_epochs_that_end_before_the_branch_are_refused(
    world: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(world, start, tmp_path / "run", "sft1", train__epochs=0.1)) == 2
    assert "schedule.total_steps (2) must be greater than the step" in capsys.readouterr().err


def test_rl_may_branch_from_a_run_without_prompts(world: Path, start: Path, tmp_path: Path) -> None:
    values = {"rollout__model": start / "fp8", "schedule__total_steps": 5}
    run(words(world, start, tmp_path / "run", "rl1", **values))
    checkpoint = open_checkpoint(tmp_path / "run")
    assert (checkpoint.step, checkpoint.state["cursor"]) == (5, 4)
