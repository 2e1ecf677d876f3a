"""Runs of several ranks through faults (rows F6, F8, F9, F11, F13, F15): one recipe, other layouts, a rank that is struck."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from stages import curve, lines, options, run

from infir2.checkpoint import export_hf, open_checkpoint

HERE = Path(__file__).parent
STEPS = 4
VALUES = {"schedule__total_steps": STEPS, "checkpoint__save_every": 2, "train__validate_every": 2, "train__validation_batches": 2}


def words(world: Path, run_dir: Path, **values: object) -> list[str]:
    return options(world, run_dir, "cpt", **(VALUES | values))


def ranks(tmp_path: Path, num: int, arguments: list[str], struck: int = -1, faults: str = "") -> tuple[list[int], str]:
    """Exit codes by rank (-1: none was left) and what they said."""
    from test_layouts import torchrun

    codes = tmp_path / f"codes-{time.monotonic_ns()}"
    codes.mkdir()
    done = torchrun(num, str(HERE / "one_rank.py"), str(codes), str(struck), faults, *arguments)
    left = {int(path.name.partition("-")[2]): int(path.read_text()) for path in codes.iterdir()}
    return [left.get(rank, -1) for rank in range(num)], done.stderr


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_a_run_goes_on_with_any_number_of_ranks(world: Path, alone: Path, tmp_path: Path) -> None:
    """1 -> 2 and 2 -> 1 processes; two steps in one, two in the other."""
    started_alone, started_by_two = tmp_path / "one", tmp_path / "two"
    run(words(world, started_alone, train__stop_after_step=2))
    codes, said = ranks(tmp_path, 2, words(world, started_by_two, train__stop_after_step=2))
    assert codes == [0, 0], said
    assert sorted(path.name for path in started_by_two.glob("checkpoints/step-2/*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    ours = open_checkpoint(started_by_two).tensors()
    read_by_torch = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
    dcp.load(read_by_torch, storage_reader=dcp.FileSystemReader(ours.path), no_dist=True)
    assert all(torch.equal(read_by_torch[name], tensor) for name, tensor in ours.items())
    export_hf(started_by_two, tmp_path / "hf-two")
    export_hf(started_alone, tmp_path / "hf-one")
    a, b = load_file(tmp_path / "hf-two" / "model.safetensors"), load_file(tmp_path / "hf-one" / "model.safetensors")
    assert a.keys() == b.keys()
    assert max((a[name].float() - b[name].float()).abs().max().item() for name in a) < 1e-2

    run(words(world, started_by_two))
    codes, said = ranks(tmp_path, 2, words(world, started_alone, parallel__cp=2))
    assert codes == [0, 0], said
    for directory in (started_by_two, started_alone):
        resumed = [line for line in lines(directory, "train") if line["step"] == 3]
        undisturbed = [line for line in lines(alone, "train") if line["step"] == 3]
        assert resumed[0]["loss"] == pytest.approx(undisturbed[0]["loss"], abs=1e-3 if directory == started_alone else 1e-5)
        close(directory, alone)
    assert open_checkpoint(started_alone).state["loader"] == open_checkpoint(alone).state["loader"], "the data's place has no layout"


def test_sigterm_on_one_rank_saves_the_same_step_on_all(world: Path, alone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    codes, said = ranks(tmp_path, 2, words(world, run_dir), struck=1, faults="train.step:3:term")
    assert codes == [75, 75], said
    assert open_checkpoint(run_dir).step == 3
    assert said.count("stopped; step 3 is saved") == 1
    codes, said = ranks(tmp_path, 2, words(world, run_dir))
    assert codes == [0, 0], said
    close(run_dir, alone)


def test_a_full_disk_on_one_rank_fails_the_save_of_all_and_harms_no_other(world: Path, alone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words_of_run = words(world, run_dir, checkpoint__on_save_error="warn")
    codes, said = ranks(tmp_path, 2, words_of_run, struck=1, faults="save.after_shard:1:enospc,save.before_shard:2:enospc")
    assert codes == [0, 0], said
    assert [(line["step"], line["event"]) for line in lines(run_dir, "event")] == [(2, "save_failed")]
    assert "errno 28" in lines(run_dir, "event")[0]["detail"]
    assert [path.name for path in run_dir.glob("checkpoints/*")] == ["step-4"]
    assert open_checkpoint(run_dir).step == STEPS
    close(run_dir, alone)


def test_a_nan_on_one_rank_changes_no_rank(world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = words(world, run_dir, checkpoint__save_every=1, checkpoint__keep=9, train__validate_every=0)
    codes, said = ranks(tmp_path, 2, arguments, struck=1, faults="train.loss:2:nan")
    assert codes == [0, 0], said
    assert [line["skipped"] for line in lines(run_dir, "train")] == [False, True, False, False]
    before, after = (open_checkpoint(run_dir / "checkpoints" / f"step-{step}").tensors() for step in (1, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)
    shutil.rmtree(run_dir)
    codes, said = ranks(tmp_path, 2, arguments, struck=1, faults="train.loss:1:nan,train.loss:2:nan,train.loss:3:nan")
    assert codes == [17, 17], said


@pytest.mark.parametrize(("faults", "gone"), [("train.step:2:kill", True), ("train.step:2:hang", False)])
def test_a_dead_or_hung_rank_ends_all_and_says_where(world: Path, tmp_path: Path, faults: str, gone: bool) -> None:
    start = time.monotonic()
    run_dir = tmp_path / "run"
    codes, said = ranks(tmp_path, 2, words(world, run_dir, parallel__timeout_seconds=15), struck=1, faults=faults)
    assert time.monotonic() - start < 90
    assert 0 not in codes
    if not gone:
        assert "rank 1 gave no sign of life for 15 s in step 2" in said
        assert "in fault" in said, "the stack of the rank that hangs"
    assert not list(run_dir.glob("checkpoints/.tmp*"))


def test_uneven_data_and_ranks_without_trained_tokens(world: Path, alone: Path, tmp_path: Path) -> None:
    """Three ranks share two windows a step: one rank trains nothing, no rank waits for another, and all stop together."""
    run_dir = tmp_path / "run"
    codes, said = ranks(tmp_path, 3, words(world, run_dir))
    assert codes == [0, 0, 0], said
    close(run_dir, alone)
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS


def test_sizes_that_cannot_work_are_refused_before_any_group_starts(world: Path, tmp_path: Path) -> None:
    codes, said = ranks(tmp_path, 2, words(world, tmp_path / "run", parallel__tp=3))
    assert codes[0] == 2
    assert said.count("does not divide the 2 processes") == 1
