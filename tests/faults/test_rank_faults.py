"""Faults F3, F6, F8, F9, F11, F13, F15 on several ranks: other layouts, one rank that fails."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from stages import begin, curve, lines, make_rl_start, of_today, options, run, torchrun

from infir2.checkpoint import open_checkpoint
from infir2.config import load
from infir2.config.schema import TrainRecipe
from infir2.convert import export_hf
from infir2.data import ChatTokenizer, Loader

HERE = Path(__file__).parent
STEPS = 4
VALUES = {
    "schedule__total_steps": STEPS,
    "checkpoint__save_every": 2,
    "checkpoint__keep": 2,
    "train__validate_every": 2,
    "train__validation_batches": 2,
}


def words(world: Path, run_dir: Path, **values: object) -> list[str]:
    return options(world, run_dir, "cpt", **(VALUES | values))


def ranks(
    tmp_path: Path, num: int, arguments: list[str], struck: int = -1, faults: str = ""
) -> tuple[list[int], str]:
    """Exit codes by rank (-1: none was left) and what they said."""
    codes = tmp_path / f"codes-{time.monotonic_ns()}"
    codes.mkdir()
    _, said = torchrun(num, str(HERE / "one_rank.py"), str(codes), str(struck), faults, *arguments)
    left = {int(path.name.partition("-")[2]): int(path.read_text()) for path in codes.iterdir()}
    return [left.get(rank, -1) for rank in range(num)], said


@pytest.fixture(scope="module")
def single_process(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run in one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    run(words(world, directory))
    return directory


def close(found: Path, wanted: Path) -> None:
    """The same steps and trained tokens; losses to 1e-6 at the first step compared, 1e-3 after."""
    a, b = curve(found, "loss", "trained_tokens"), curve(wanted, "loss", "trained_tokens")
    assert [(step, tokens) for step, _, tokens in a] == [(step, tokens) for step, _, tokens in b]
    assert a[0][1] == pytest.approx(b[0][1], abs=1e-6)
    assert [loss for _, loss, _ in a] == pytest.approx([loss for _, loss, _ in b], abs=1e-3)


@pytest.fixture(scope="module")
def by_two(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run on two ranks."""
    directory = tmp_path_factory.mktemp("two") / "run"
    codes, said = ranks(directory.parent, 2, words(world, directory))
    assert codes == [0, 0], said
    return directory


def test_f6_two_ranks_train_and_save_what_one_does(
    single_process: Path, by_two: Path, tmp_path: Path
) -> None:
    assert sorted(path.name for path in by_two.glob("checkpoints/step-2/*.distcp")) == [
        "__0_0.distcp",
        "__1_0.distcp",
    ]
    close(by_two, single_process)
    ours = open_checkpoint(by_two).tensors()
    read_by_torch = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
    dcp.load(read_by_torch, storage_reader=dcp.FileSystemReader(ours.path), no_dist=True)
    assert all(torch.equal(read_by_torch[name], tensor) for name, tensor in ours.items())
    export_hf(by_two / "checkpoints" / "step-2", tmp_path / "hf-two")
    export_hf(single_process / "checkpoints" / "step-2", tmp_path / "hf-one")
    a, b = (
        load_file(tmp_path / "hf-two" / "model.safetensors"),
        load_file(tmp_path / "hf-one" / "model.safetensors"),
    )
    assert a.keys() == b.keys()
    assert max((a[name].float() - b[name].float()).abs().max().item() for name in a) < 1e-2


DEATHS = ("train.loss:2:kill", "train.loss:2:exit", "train.loss:2:enospc", "train.step:2:hang")


@pytest.mark.parametrize(
    ("start", "num", "cp"),
    of_today([("by_two", 1, 1), ("single_process", 4, 1), ("single_process", 2, 2)], 2),
)
def test_f6_a_checkpoint_goes_on_with_another_number_of_ranks(
    world: Path, tmp_path: Path, request: pytest.FixtureRequest, start: str, num: int, cp: int
) -> None:
    """One checkpoint: the first resumed loss agrees to 1e-6, later ones to 1e-3; same data."""
    undisturbed, run_dir = request.getfixturevalue(start), tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS}")
    codes, said = ranks(tmp_path, num, words(world, run_dir, parallel__cp=cp))
    assert codes == [0] * num, said
    assert "(step 2)" in said
    loss = [
        {line["step"]: line["loss"] for line in lines(directory, "train")}
        for directory in (run_dir, undisturbed)
    ]
    assert loss[0][3] == pytest.approx(loss[1][3], abs=1e-6)
    close(run_dir, undisturbed)
    assert (
        open_checkpoint(run_dir).state["loader"] == open_checkpoint(undisturbed).state["loader"]
    ), "the data's place has no layout"


@pytest.mark.parametrize(
    ("fault", "saved"), of_today([("train.start:1", 1), ("train.step:3", 3)], 1)
)
def test_f8_sigterm_on_one_rank_saves_the_same_step_on_all(
    world: Path, single_process: Path, tmp_path: Path, fault: str, saved: int
) -> None:
    run_dir = tmp_path / "run"
    arguments = words(world, run_dir, train__validate_every=0)
    codes, said = ranks(tmp_path, 2, arguments, struck=1, faults=f"{fault}:term")
    assert codes == [75, 75], said
    assert open_checkpoint(run_dir).step == saved
    assert said.count(f"Stopped; step {saved} is saved") == 1
    if saved == STEPS - 1:  # the other goes on alike
        codes, said = ranks(tmp_path, 2, words(world, run_dir))
        assert codes == [0, 0], said
        close(run_dir, single_process)


def test_f3_a_full_disk_on_one_rank_fails_the_save_of_all_and_harms_no_other(
    world: Path, single_process: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words_of_run = words(world, run_dir, checkpoint__on_save_error="warn")
    codes, said = ranks(
        tmp_path,
        2,
        words_of_run,
        struck=1,
        faults="save.after_shard:1:enospc,save.before_shard:2:enospc",
    )
    assert codes == [0, 0], said
    assert [(line["step"], line["event"]) for line in lines(run_dir, "event")] == [
        (2, "save_failed")
    ]
    assert "errno 28" in lines(run_dir, "event")[0]["detail"]
    assert [path.name for path in run_dir.glob("checkpoints/*")] == ["step-4"]
    assert open_checkpoint(run_dir).step == STEPS
    close(run_dir, single_process)


def rows_of_step(world: Path, rank: int, step: int) -> set[str]:
    """Origins of the rows that a rank of two reads in a step of the run."""
    recipe = load(TrainRecipe, [words(world, Path("x"))[1]], words(world, Path("x"))[2:]).recipe
    loader = Loader(
        recipe.data, "documents", ChatTokenizer(world / "tokenizer"), recipe.run.seed, rank, 2
    )
    for _ in range(step):
        batches = loader.next_step()
    return {origin for batch in batches for origin in batch.origins}


@pytest.mark.costly
def test_f9_a_nan_on_one_rank_changes_no_rank(world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = words(
        world, run_dir, checkpoint__save_every=1, checkpoint__keep=9, train__validate_every=0
    )
    codes, said = ranks(tmp_path, 2, arguments, struck=1, faults="train.loss:2:nan")
    assert codes == [0, 0], said
    assert [line["skipped"] for line in lines(run_dir, "train")] == [False, True, False, False]
    before, after = (
        open_checkpoint(run_dir / "checkpoints" / f"step-{step}").tensors() for step in (1, 2)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    (event,) = lines(run_dir, "event")
    detail, by_rank = event["detail"], [rows_of_step(world, rank, 2) for rank in (0, 1)]
    assert by_rank[1] - by_rank[0], "the ranks read different rows"
    assert all(
        f"{origin}" in detail.partition("rows ")[2].split(", ")
        for origin in by_rank[0] | by_rank[1]
    ), detail
    shutil.rmtree(run_dir)
    codes, said = ranks(
        tmp_path,
        2,
        arguments,
        struck=1,
        faults="train.loss:1:nan,train.loss:2:nan,train.loss:3:nan",
    )
    assert codes == [17, 17], said


@pytest.mark.parametrize(("point", "saved"), of_today([("validate:2", 2), ("validate:1", 0)], 1))
def test_f8_sigterm_on_one_rank_in_a_validation_ends_all_there(
    world: Path, single_process: Path, tmp_path: Path, point: str, saved: int
) -> None:
    """One micro-batch a validation: before the first step, and after the second."""
    run_dir = tmp_path / "run"
    arguments = words(world, run_dir, checkpoint__save_every=100)
    codes, said = ranks(tmp_path, 2, arguments, struck=1, faults=f"{point}:term")
    assert codes == [75, 75], said
    assert len(lines(run_dir, "train")) == saved, "no step was done after the signal"
    assert [line["step"] for line in lines(run_dir, "validation")] == ([0] if saved else [])
    codes, said = ranks(tmp_path, 2, arguments)
    assert codes == [0, 0], said
    assert [line["step"] for line in lines(run_dir, "validation")] == [0, 2, 4]
    close(run_dir, single_process)


@pytest.mark.costly
def test_f8_sigterm_on_one_rank_in_an_evaluation_ends_all_there(
    world: Path, tmp_path: Path
) -> None:
    start, run_dir = make_rl_start(world, tmp_path / "start"), tmp_path / "run"
    arguments = options(
        world,
        run_dir,
        "rl1",
        schedule__total_steps=2,
        checkpoint__save_every=100,
        rl__evaluate_every=1,
    )
    arguments += [
        f"--model.path={start / 'cpt'}",
        f"--rollout.model={start / 'fp8'}",
        "--evaluate.samples=1",
        "--evaluate.max_problems=6",
    ]
    arguments += [
        f"--evaluate.problems.0.path={world / 'heldout.jsonl'}",
        "--evaluate.max_response_tokens=8",
    ]
    codes, said = ranks(tmp_path, 2, arguments, struck=1, faults="evaluate:2:term")
    assert codes == [75, 75], said
    assert said.count("step 1 is saved in") == 1
    assert (len(lines(run_dir, "train")), lines(run_dir, "evaluation")) == (1, [])
    codes, said = ranks(tmp_path, 2, arguments)
    assert codes == [0, 0], said
    assert [line["step"] for line in lines(run_dir, "evaluation")] == [1, 2], (
        "the one that was stopped is made up for"
    )


@pytest.mark.parametrize(("pause", "code"), [(2.5, 0), (9.0, 71)])
def test_the_watchdog_lets_a_collective_fail_first(pause: float, code: int) -> None:
    """A rank that waits for a hanging one has the same time limit there, and says more."""
    program = (
        "import time; from infir2.parallel.watchdog import Watchdog; "
        f"Watchdog(1, 1.0).heartbeat('step 7'); time.sleep({pause})"
    )
    process = begin([sys.executable, "-c", program])
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert ("rank 1 sent no heartbeat for 1 s in step 7" in said) == bool(code)


@pytest.mark.parametrize("faults", of_today(DEATHS, 2))
def test_f11_a_rank_that_dies_raises_or_hangs_ends_all_and_says_where(
    world: Path, tmp_path: Path, faults: str
) -> None:
    """Within 10 s of `timeout_seconds`; at "train.loss" the other rank is in a collective."""
    run_dir = tmp_path / "run"
    timeout = 15 if "hang" in faults else 120  # which the others need not wait for
    codes, said = ranks(
        tmp_path,
        2,
        words(world, run_dir, parallel__timeout_seconds=timeout),
        struck=1,
        faults=faults,
    )
    ended = (
        next(tmp_path.glob("codes-*")) / "rank-0"
    )  # the other rank's code, written last; torchrun's own end is not ours to bound
    assert ended.exists(), said
    assert ended.stat().st_mtime - (run_dir / "metrics.jsonl").stat().st_mtime < 15 + 10
    assert 0 not in codes
    assert 75 not in codes, "nothing was saved"
    # the other says where the collective broke; who was killed says nothing, and torchrun names it
    assert re.search(r"rank 0 failed in step 2: \w*Error", said), said
    assert "in _timed_step" in said, "its stack, in the step"
    assert 'distributed_c10d.py", line' in said or "_engine_run_backward" in said, (
        "and in the collective"
    )
    struck = {
        "kill": "(SIGKILL)",
        "exit": "exitcode  : 1 ",
        "enospc": "rank 1 failed in step 2: OSError",
        "hang": "rank 1 sent no heartbeat for 15 s in step 2",
    }
    action = faults.rpartition(":")[2]
    assert struck[action] in said
    if action in ("kill", "exit"):
        assert re.search(r"rank +: 1 \(local_rank: 1\)", said)
    else:
        assert "in fault" in said, "the stack of the rank that is struck"
        assert "trainer.py" in said
    assert not list(run_dir.glob("checkpoints/.tmp*"))


@pytest.mark.costly
def test_f13_uneven_data_and_ranks_without_trained_tokens(
    world: Path, single_process: Path, tmp_path: Path
) -> None:
    """Three ranks share two windows a step: one trains nothing, none waits, all stop together."""
    run_dir = tmp_path / "run"
    codes, said = ranks(tmp_path, 3, words(world, run_dir))
    assert codes == [0, 0, 0], said
    close(run_dir, single_process)
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS


def test_f7_another_recipe_and_what_needs_one_process_are_refused_before_any_group_starts(
    world: Path, by_two: Path, tmp_path: Path
) -> None:
    """`MASTER_PORT` leads nowhere: a process group would wait for it."""
    for option, sentence, run_dir in [
        ("--run.seed=9", "run.seed = 1236, and now it is 9", by_two),
        ("--optimizer.grad_dtype=bf16", "need one process, not 2", tmp_path / "run"),
    ]:
        command = [sys.executable, "-m", "infir2", *words(world, run_dir), option]
        variables = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",
        }
        done = subprocess.run(
            command,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert sentence in done.stderr
    assert not (tmp_path / "run").exists()


def test_sizes_that_cannot_work_are_refused_before_any_group_starts(
    world: Path, tmp_path: Path
) -> None:
    codes, said = ranks(tmp_path, 2, words(world, tmp_path / "run", parallel__tp=3))
    assert codes[0] == 2
    assert said.count("does not divide the 2 processes") == 1
