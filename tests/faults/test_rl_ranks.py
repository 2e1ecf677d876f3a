"""RL on several ranks equals RL in one process; faults; a resume with another number of ranks."""

import json
from pathlib import Path

import pytest
from stages import curve, guessing, lines, make_guessing_start, of_today, options, run
from test_rank_faults import ranks

from infir2.checkpoint import open_checkpoint

STEPS = 3
VALUES = {
    "schedule__total_steps": STEPS,
    "checkpoint__save_every": 2,
    "data__micro_batch_tokens": 128,
}
VALUES |= {"rl__overlong_buffer_tokens": 24, "rl__max_response_tokens": 24, "rl__mini_batches": 2}
SAMPLED = (
    "reward",
    "response_tokens",
    "truncated_fraction",
    "groups_sampled",
    "groups_without_signal",
    "trained_tokens",
)


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_guessing_start(world, tmp_path_factory.mktemp("start"))


def words(world: Path, start: Path, run_dir: Path, **values: object) -> list[str]:
    given = VALUES | {
        **guessing(start),
        "rl__evaluate_every": 1,
        **values,
    }
    given |= {
        "evaluate__problems__0__path": world / "heldout.jsonl",
        "evaluate__max_problems": 5,
        "evaluate__samples": 2,
    }
    return options(world, run_dir, "rl1", evaluate__max_response_tokens=8, **given)


def rollouts(run_dir: Path, step: int) -> dict[str, list[dict[str, object]]]:
    """The groups of a step by key, which is of the weights too, whichever rank wrote them down."""
    rows = [
        json.loads(line)
        for path in run_dir.glob(f"rollouts/step-{step}-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len({row["key"] for row in rows}) == len(rows), "a group was sampled twice"
    return {row["key"]: row["responses"] for row in rows}


@pytest.fixture(scope="module")
def single_process(world: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run in one process, with all its rollouts."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    run(words(world, start, directory, checkpoint__save_every=100))
    return directory


def close(found: Path, wanted: Path) -> None:
    """Equal rewards and tokens; losses within data parallelism's bound (docs/parallel.md)."""
    assert curve(found, *SAMPLED) == curve(wanted, *SAMPLED)
    assert curve(found, "loss", "gradient_norm") == [
        pytest.approx(line, rel=1e-6) for line in curve(wanted, "loss", "gradient_norm")
    ]
    names = ("step", "truncated_fraction", "avg_at_k")
    scores, expected = (
        [[line[name] for name in names] for line in lines(path, "evaluation")]
        for path in (found, wanted)
    )
    assert scores == expected


@pytest.mark.parametrize("layout", of_today([{}, {"parallel__cp": 2}], 1))
def test_rollouts_and_the_first_step_are_those_of_one_process(
    world: Path, start: Path, single_process: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    run_dir = tmp_path / "run"
    codes, said = ranks(
        tmp_path, 2, words(world, start, run_dir, checkpoint__save_every=100, **layout)
    )
    assert codes == [0, 0], said
    assert len(list(run_dir.glob("rollouts/step-1-*.jsonl"))) == 2, "both ranks sampled"
    assert rollouts(run_dir, 1) == rollouts(single_process, 1)
    assert [line["policy_version"] for line in lines(run_dir, "train")] == [1, 2, 3]
    if (
        layout
    ):  # other roundings flip single codes, and from the second step on other tokens are sampled
        found, wanted = (
            curve(path, "loss", "gradient_norm", "entropy", *SAMPLED)[0]
            for path in (run_dir, single_process)
        )
        assert found[3:] == pytest.approx(wanted[3:], abs=1e-3)
        assert found[1] == pytest.approx(wanted[1], abs=1e-3)
    else:
        close(run_dir, single_process)
    assert max(line["mismatch_max"] for line in lines(run_dir, "train")) < (0.2 if layout else 1e-4)


@pytest.mark.costly
def test_a_killed_rank_ends_the_other_and_one_process_goes_on(
    world: Path, start: Path, single_process: Path, tmp_path: Path
) -> None:
    """Killed after both ranks recorded the rollouts of step 3: one process samples none again."""
    run_dir = tmp_path / "run"
    arguments = words(world, start, run_dir, checkpoint__background="false")
    codes, said = ranks(tmp_path, 2, arguments, struck=1, faults="train.step:5")
    assert codes == [71, -1], said
    kept = rollouts(run_dir, 3)
    assert len(kept) == curve(single_process, "groups_sampled")[2][1]
    assert open_checkpoint(run_dir).step == 2
    run(arguments)
    assert rollouts(run_dir, 3) == kept
    close(run_dir, single_process)


@pytest.mark.costly
def test_a_nan_and_a_signal_on_one_rank_are_all_ranks(
    world: Path, start: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = words(world, start, run_dir, rl__mini_batches=1)
    codes, said = ranks(
        tmp_path, 2, arguments, struck=1, faults="train.loss:1:nan,rollout.group:2:term"
    )
    assert codes == [75, 75], said
    assert said.count("is saved in") == 1
    assert open_checkpoint(run_dir).step in (
        1,
        2,
    )  # the signal comes as the rank's last response of step 2 is being checked
    codes, said = ranks(tmp_path, 2, arguments)
    assert codes == [0, 0], said
    assert [line["skipped"] for line in lines(run_dir, "train")] == [True, False, False]


@pytest.mark.costly
def test_two_ranks_go_on_where_one_process_stopped(
    world: Path, start: Path, single_process: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = words(world, start, run_dir)
    codes, said = ranks(tmp_path, 1, arguments, struck=0, faults="rollout.group:5:term")
    assert codes == [75], said
    codes, said = ranks(tmp_path, 2, arguments)
    assert codes == [0, 0], said
    close(run_dir, single_process)
