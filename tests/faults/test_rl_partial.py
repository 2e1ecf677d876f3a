"""RL whose responses are generated in chunks and continued by newer weights, killed anywhere: the
curve goes on bit for bit."""

import itertools
import json
from pathlib import Path

import pytest
from stages import (
    assert_same_state,
    curve,
    guessing,
    lines,
    make_guessing_start,
    of_today,
    options,
    run,
)
from test_rank_faults import ranks

from infir2.checkpoint import open_checkpoint

STEPS = 4
VALUES = {
    "schedule__total_steps": STEPS,
    "rl__prompts_per_step": 4,
    "rl__over_sample_prompts": 12,
    "rl__mini_batches": 1,
    "rl__evaluate_every": 0,
    "rl__max_response_tokens": 24,
    "rl__chunk_tokens": 6,
    "checkpoint__background": "false",
}
NAMES = (
    *("loss", "reward", "gradient_norm", "response_tokens", "groups_sampled"),
    *("groups_unfinished", "staleness", "mismatch_max"),
)


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_guessing_start(world, tmp_path_factory.mktemp("start"))


def words(world: Path, start: Path, run_dir: Path, **values: object) -> list[str]:
    return options(world, run_dir, "rl1", **(VALUES | guessing(start) | values))


@pytest.fixture(scope="module")
def undisturbed(world: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run(words(world, start, directory, rl__partial="true", checkpoint__save_every=2))
    return directory


def test_a_response_is_continued_by_newer_weights(undisturbed: Path) -> None:
    trained = lines(undisturbed, "train")
    assert max(line["groups_unfinished"] for line in trained) > 0
    assert max(line["staleness"] for line in trained) > 0
    state = open_checkpoint(undisturbed).state
    assert len(state["carried"]) == trained[-1]["groups_unfinished"]
    num_drawn = sum(line["groups_sampled"] for line in trained) + len(state["carried"])
    assert state["cursor"] == num_drawn, "each prompt is drawn once and sampled once"
    rows = (undisturbed / "rollouts" / f"carried-{STEPS + 1}.jsonl").read_text().splitlines()
    begun = [each for row in rows for each in json.loads(row)["unfinished"]]
    assert {each["policy_version"] for each in begun} == {STEPS - 1}
    # What the engine's weights of the step generated has the trainer's bits; older tokens do not.
    for line in trained:
        assert (line["mismatch_max"] > 1e-4) == (line["staleness"] > 0)


KILLS = ("rollout.group:3", "rollout.group:9", "rollout.group:17", "train.step:3")
KILLS += ("save.before_rename:2", "save.after_rename:1")


@pytest.mark.parametrize(("faults", "save_every"), of_today(itertools.product(KILLS, (1, 2)), 2))
def test_killed_anywhere_it_goes_on_bit_for_bit(
    world: Path, start: Path, undisturbed: Path, tmp_path: Path, faults: str, save_every: int
) -> None:
    values = {"rl__partial": "true", "checkpoint__save_every": save_every}
    arguments = words(world, start, tmp_path / "run", **values)
    assert ranks(tmp_path, 1, arguments, struck=0, faults=faults)[0] == [-1]
    run(arguments)
    assert curve(tmp_path / "run", *NAMES) == curve(undisturbed, *NAMES)
    assert_same_state(tmp_path / "run", undisturbed)
    assert (
        open_checkpoint(tmp_path / "run").state["carried"]
        == open_checkpoint(undisturbed).state["carried"]
    )


def test_an_older_checkpoint_has_what_it_carried(
    world: Path, start: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The newest one is damaged: the groups with which the one before goes on are there still."""
    values = {"rl__partial": "true", "checkpoint__save_every": 1, "checkpoint__keep": 2}
    arguments = words(world, start, tmp_path / "run", **values)
    assert ranks(tmp_path, 1, arguments, struck=0, faults="train.step:4")[0] == [-1]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-2", "step-3"]
    assert open_checkpoint(checkpoints / "step-2").state["carried"]
    (checkpoints / "step-3" / ".metadata").write_bytes(b"damaged")
    run(arguments)
    assert curve(tmp_path / "run", *NAMES) == curve(undisturbed, *NAMES)
    assert_same_state(tmp_path / "run", undisturbed)


@pytest.mark.costly
def test_two_servers_generate_the_same_chunks(
    world: Path, start: Path, undisturbed: Path, tmp_path: Path
) -> None:
    servers = {"rollout__engine": "infir2", "rollout__engines": 2, "rollout__cache_gib": 0.1}
    arguments = words(world, start, tmp_path / "run", rl__partial="true", **servers)
    assert ranks(tmp_path, 1, arguments, struck=0, faults="rollout.group:9")[0] == [-1]
    run(arguments)
    assert curve(tmp_path / "run", *NAMES) == curve(undisturbed, *NAMES)


@pytest.mark.costly
def test_two_ranks_continue_the_same_groups_as_one(
    world: Path, start: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """One is killed while it samples; the log-probabilities of what both train are kept."""
    values = {"rl__partial": "true", "rl__keep_rollouts": "true", "checkpoint__save_every": 1}
    values |= {"data__micro_batch_tokens": 128}  # so that both have some
    arguments = words(world, start, tmp_path / "run", **values)
    codes, said = ranks(tmp_path, 2, arguments, struck=1, faults="rollout.group:20")
    assert codes == [71, -1], said
    assert 0 < len(lines(tmp_path / "run", "train")) < STEPS, "killed in the middle"
    codes, said = ranks(tmp_path, 2, arguments)
    assert codes == [0, 0], said
    names = ("reward", "response_tokens", "groups_sampled", "groups_unfinished", "staleness")
    assert curve(tmp_path / "run", *names) == curve(undisturbed, *names)
    found, wanted = (open_checkpoint(path).state for path in (tmp_path / "run", undisturbed))
    assert found["carried"] == wanted["carried"]
    for step in range(1, STEPS + 1):
        path = tmp_path / "run" / "kept_rollouts" / f"step-{step}.jsonl"
        groups = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        for group in (group for group in groups if group["trained"]):
            for each in group["responses"]:
                assert len(each["trainer_logprobs"]) == len(each["completion"]["token_ids"])


RESTING = {
    **{"schedule__total_steps": 3, "rl__partial": "true", "rl__rest_epochs": 1},
    **{"rl__group_size": 2, "rl__mini_batches": 2, "checkpoint__save_every": 1},
    "data__micro_batch_tokens": 128,
}
POOL = {"rollout__engine": "infir2", "rollout__engines": 2, "rollout__cache_gib": 0.1}


@pytest.fixture(scope="module")
def few_problems(start: Path) -> dict[str, Path]:
    """So few that a run begins them again, and groups so small that some are all right."""
    rows = (start / "problems.jsonl").read_text().splitlines(keepends=True)
    (start / "few.jsonl").write_text("".join(rows[:9]))
    return {"data__sources__0__path": start / "few.jsonl"}


@pytest.fixture(scope="module")
def by_two(
    world: Path,
    start: Path,
    few_problems: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The undisturbed run on two ranks."""
    directory = tmp_path_factory.mktemp("two") / "run"
    arguments = words(world, start, directory, **(RESTING | few_problems))
    codes, said = ranks(directory.parent, 2, arguments)
    assert codes == [0, 0], said
    return directory


@pytest.mark.costly
@pytest.mark.parametrize(
    ("engines", "struck", "faults"),
    [({}, 1, "rollout.group:14"), (POOL, 0, "rollout.group:28")],
    ids=["ranks", "pool"],
)
def test_two_ranks_go_on_bit_for_bit(
    world: Path,
    start: Path,
    few_problems: dict[str, Path],
    by_two: Path,
    tmp_path: Path,
    engines: dict[str, object],
    struck: int,
    faults: str,
) -> None:
    """Each with an engine of its own, or with a pool of two; prompts rest, responses go on."""
    run_dir = tmp_path / "run"
    arguments = words(world, start, run_dir, **(RESTING | few_problems | engines))
    codes, said = ranks(tmp_path, 2, arguments, struck=struck, faults=faults)
    assert codes[struck] == -1, said
    killed = open_checkpoint(run_dir).state
    assert killed["carried"]
    assert killed["resting"]
    codes, said = ranks(tmp_path, 2, arguments)
    assert codes == [0, 0], said
    names = (*NAMES, "prompts_resting")
    assert curve(run_dir, *names) == curve(by_two, *names)
    assert_same_state(run_dir, by_two)
    found, wanted = open_checkpoint(run_dir).state, open_checkpoint(by_two).state
    assert [found[name] for name in ("carried", "resting")] == [
        wanted[name] for name in ("carried", "resting")
    ]


def test_chunks_change_no_response(world: Path, start: Path, tmp_path: Path) -> None:
    """With a budget that leaves no group unfinished."""
    for chunk in (0, 5):
        values = {"rl__chunk_tokens": chunk, "rl__over_sample_prompts": 4}
        run(words(world, start, tmp_path / str(chunk), **values))
    names = ("reward", "loss", "response_tokens", "groups_sampled", "groups_unfinished")
    assert curve(tmp_path / "5", *names) == curve(tmp_path / "0", *names)
    assert_same_state(tmp_path / "5", tmp_path / "0")


def test_without_partial_what_is_unfinished_is_dropped(
    world: Path, start: Path, tmp_path: Path
) -> None:
    run(words(world, start, tmp_path / "run"))
    trained, state = lines(tmp_path / "run", "train"), open_checkpoint(tmp_path / "run").state
    num_dropped = sum(line["groups_unfinished"] for line in trained)
    assert num_dropped > 0
    assert state["cursor"] == sum(line["groups_sampled"] for line in trained) + num_dropped
    assert state["carried"] == []
    assert all(line["staleness"] == 0 and line["mismatch_max"] <= 1e-4 for line in trained)
    assert not list((tmp_path / "run" / "rollouts").glob("carried-*"))


@pytest.mark.costly
def test_sampling_two_steps_ahead(world: Path, start: Path, tmp_path: Path) -> None:
    """New weights every second step; killed while the trainer is inside such a block."""
    values = {"rl__max_off_policy_steps": 2, "schedule__total_steps": 6, "rl__partial": "true"}
    whole = {"rl__chunk_tokens": 0, "rl__partial": "false"}
    arguments = words(world, start, tmp_path / "a", **(values | whole), checkpoint__save_every=3)
    run(arguments)
    assert [age for _, age in curve(tmp_path / "a", "staleness")] == [0, 1, 1, 2, 1, 2]
    arguments = words(world, start, tmp_path / "b", **(values | whole), checkpoint__save_every=3)
    assert ranks(tmp_path, 1, arguments, struck=0, faults="train.step:4")[0] == [-1]
    assert open_checkpoint(tmp_path / "b").step == 3
    run(arguments)
    assert curve(tmp_path / "b", *NAMES) == curve(tmp_path / "a", *NAMES)
    assert_same_state(tmp_path / "b", tmp_path / "a")
