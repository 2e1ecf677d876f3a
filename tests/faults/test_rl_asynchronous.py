"""Asynchronous RL that is killed, stopped or loses its journal: each step is done exactly once."""

import itertools
import shutil
from pathlib import Path

import pytest
from stages import (
    assert_each_step_once,
    assert_same_state,
    curve,
    guessing,
    make_guessing_start,
    of_today,
    options,
    run,
)
from test_rank_faults import ranks

from infir2.checkpoint import open_checkpoint

STEPS = 5
VALUES = {
    "schedule__total_steps": STEPS,
    "rl__max_off_policy_steps": 1,
    "rl__mini_batches": 1,
    "rl__evaluate_every": 0,
}
VALUES |= {
    "rl__overlong_buffer_tokens": 24,
    "rl__max_response_tokens": 24,
    "checkpoint__background": "false",
}


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_guessing_start(world, tmp_path_factory.mktemp("start"))


def words(world: Path, start: Path, run_dir: Path, **values: object) -> list[str]:
    return options(
        world,
        run_dir,
        "rl1",
        **(VALUES | guessing(start) | values),
    )


@pytest.fixture(scope="module")
def undisturbed(world: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run(words(world, start, directory, checkpoint__save_every=2))
    assert_each_step_once(directory, STEPS)
    return directory


KILLS = (
    "rollout.group:2",
    "rollout.group:6",
    "rollout.group:11",
    "save.before_rename:2",
    "save.after_rename:1",
)


@pytest.mark.parametrize(("faults", "save_every"), of_today(itertools.product(KILLS, (1, 2)), 2))
def test_killed_anywhere(
    world: Path, start: Path, tmp_path: Path, faults: str, save_every: int
) -> None:
    arguments = words(world, start, tmp_path / "run", checkpoint__save_every=save_every)
    assert ranks(tmp_path, 1, arguments, struck=0, faults=faults)[0] == [-1]
    run(arguments)
    assert_each_step_once(tmp_path / "run", STEPS)


@pytest.mark.costly
def test_killed_in_an_update_it_goes_on_bit_for_bit(
    world: Path, start: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The journal holds all responses of the next step, sampled with weights that are gone."""
    arguments = words(world, start, tmp_path / "run", checkpoint__save_every=2)
    assert ranks(tmp_path, 1, arguments, struck=0, faults="train.step:3")[0] == [-1]
    assert open_checkpoint(tmp_path / "run").step == 2
    run(arguments)
    names = (
        "loss",
        "reward",
        "gradient_norm",
        "response_tokens",
        "groups_sampled",
        "staleness",
        "mismatch_max",
    )
    assert curve(tmp_path / "run", *names) == curve(undisturbed, *names)
    assert_same_state(tmp_path / "run", undisturbed)


@pytest.mark.costly
def test_without_its_journal_the_step_is_sampled_from_newer_weights(
    world: Path, start: Path, tmp_path: Path
) -> None:
    arguments = words(world, start, tmp_path / "run", checkpoint__save_every=2)
    assert ranks(tmp_path, 1, arguments, struck=0, faults="train.step:4")[0] == [-1]
    shutil.rmtree(tmp_path / "run" / "rollouts")
    run(arguments)
    assert_each_step_once(tmp_path / "run", STEPS)
    assert [staleness for _, staleness in curve(tmp_path / "run", "staleness")] == [0, 1, 0, 1, 1]


@pytest.mark.costly
def test_a_signal_while_the_next_step_is_sampled(world: Path, start: Path, tmp_path: Path) -> None:
    arguments = words(world, start, tmp_path / "run", checkpoint__save_every=100)
    codes, said = ranks(tmp_path, 1, arguments, struck=0, faults="rollout.group:6:term")
    assert codes == [75], said
    assert 1 <= open_checkpoint(tmp_path / "run").step <= 3
    run(arguments)
    assert_each_step_once(tmp_path / "run", STEPS)


@pytest.mark.costly
def test_ranks_that_share_their_processors_with_engines_are_refused(
    world: Path, start: Path, tmp_path: Path
) -> None:
    codes, said = ranks(tmp_path, 2, words(world, start, tmp_path / "run"))
    assert codes in ([2, 2], [2, -1], [-1, 2]), said
    assert "rl.max_off_policy_steps above 0 needs engines apart" in said
