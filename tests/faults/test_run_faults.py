"""Faults F1-F4, F7-F10, F13, F15, F26, F27 through the command line, one process; kills."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import campaign
import pytest
import torch
from stages import SHAPE, assert_same_state, begin, curve, lines, of_today, options, run

import infir2.train.loop as train_run
from infir2 import faults
from infir2.checkpoint import Store, open_checkpoint
from infir2.cli import main
from infir2.data import Loader
from infir2.errors import DataError
from infir2.train.losses import NextTokenLoss, TokenScores
from infir2.train.trainer import Trainer
from infir2.train.watches import SpikeMonitor


@pytest.fixture(autouse=True)
def passings_from_nought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_passes", Counter())


def cpt(world: Path, directory: Path, **values: object) -> list[str]:
    return options(
        world,
        directory,
        "cpt",
        **{
            "schedule__total_steps": 8,
            "checkpoint__save_every": 2,
            "train__validate_every": 0,
            **values,
        },
    )


def infir2(words: list[str], **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, "-m", "infir2", *words],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
    )


def events(run_dir: Path) -> list[tuple[int, str]]:
    return [(event["step"], event["event"]) for event in lines(run_dir, "event")]


def checkpoint(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(run_dir / "checkpoints" / f"step-{step}").tensors())


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "cpt"
    run(cpt(world, directory))
    return directory


@pytest.mark.costly
def test_three_random_kills_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "STEPS", {"cpt": 20, "sft": 20, "rl": 4})
    runs = campaign.Campaign(tmp_path, seed=7)
    runs.prepare()
    for kind in campaign.STEPS:
        runs.kill_run(kind, 1)


@pytest.mark.parametrize(
    ("point", "passing"), [(point, 2) for point in faults.POINTS if point.startswith("save.")]
)
def test_f1_a_kill_at_any_point_of_a_save_changes_nothing(
    world: Path, tmp_path: Path, undisturbed: Path, point: str, passing: int
) -> None:
    """Killed in the second save: the next run resumes from the newest good checkpoint."""
    words = cpt(world, tmp_path / "run", checkpoint__keep=1)
    pid = os.fork()
    if pid == 0:
        os.environ["INFIR2_FAULTS"] = f"{point}:{passing}"
        os._exit(main(words))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    published = open_checkpoint(tmp_path / "run").step
    assert published == {"save.after_rename": 4, "save.during_retention": 6}.get(point, 2)
    run(words)
    assert curve(tmp_path / "run", "loss") == curve(undisturbed, "loss")
    assert_same_state(tmp_path / "run", undisturbed)
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-8"]


def test_f1_a_kill_during_a_save_loses_two_intervals_at_most(
    world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """The save of step 4 hangs: training continues up to step 6, where the next save is due."""
    words, metrics = cpt(world, tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "INFIR2_FAULTS": "save.before_rename:2:hang",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "infir2", *words], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while (
        not (metrics.exists() and '"kind": "train", "step": 6' in metrics.read_text())
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    time.sleep(1)
    assert curve(tmp_path / "run", "loss")[-1][0] == 6
    process.kill()
    process.wait()
    assert open_checkpoint(tmp_path / "run").step == 2
    run(words)
    assert curve(tmp_path / "run", "loss") == curve(undisturbed, "loss")
    assert_same_state(tmp_path / "run", undisturbed)
    assert [line["step"] for line in lines(tmp_path / "run", "save")] == [2, 4, 6, 8]
    assert all(0 < line["seconds"] < 60 for line in lines(tmp_path / "run", "save"))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_f2_a_damaged_checkpoint_is_passed_over_and_named(
    world: Path, tmp_path: Path, undisturbed: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = cpt(world, tmp_path / "run", checkpoint__keep=2)
    run([*words, "--train.stop_after_step=6"])

    def spoil(step: int) -> str:
        path = max(
            (tmp_path / "run" / "checkpoints" / f"step-{step}").iterdir(),
            key=lambda path: path.stat().st_size,
        )
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink() if damage == "remove" else path.write_bytes(
            data if damage == "flip" else data[:-1]
        )
        return path.name

    name = spoil(6)
    run(words)
    said = capsys.readouterr().err
    assert "skipped checkpoint step-6" in said
    assert name in said
    assert curve(tmp_path / "run", "loss") == curve(undisturbed, "loss")
    assert_same_state(tmp_path / "run", undisturbed)
    for step in (6, 8):
        spoil(step)
    assert main(words) == 3
    assert "none of its 2 checkpoints verifies" in capsys.readouterr().err


FILL = """
import sys
import time
from pathlib import Path
from unittest.mock import Mock
from infir2.cli import main
from infir2.checkpoint import Store
from infir2.data import Loader

full, free, *words = sys.argv[1:]
real, taken = Loader.next_step, []

def next_step(loader):
    taken.append(1)
    if len(taken) == int(full):
        while not Path("run/checkpoints/step-30").exists():
            time.sleep(0.01)
        try:
            Path("run/filler").write_bytes(bytes(2**23))
        except OSError:
            pass
    if len(taken) == int(free):
        Path("run/filler").unlink()
    return real(loader)

Loader.next_step = next_step
sys.exit(main(words))
"""
ON_A_SMALL_DISK = """
mkdir -p run; mount -t tmpfs -o size=4m none run
{fill}; echo "code $?"
if test -e run/filler; then {run}; echo "code $?"; rm run/filler; {run}; echo "code $?"; fi
ls run/checkpoints
cp -r run kept
"""
NUM_STEPS = 70


def unshared(flags: str, script: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """Run a script in namespaces of its own; skips the test where there are none."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", flags, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no private namespaces on this machine")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["unshare", flags, "bash", "-c", script],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def long(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("long") / "run"
    run(cpt(world, directory, schedule__total_steps=NUM_STEPS, checkpoint__save_every=30))
    return directory


@pytest.mark.parametrize(("policy", "free"), of_today([("stop", 0), ("warn", 68)], 1))
def test_f3_a_real_full_disk_stops_the_run_or_is_told_and_harms_nothing(
    world: Path, tmp_path: Path, long: Path, policy: str, free: int
) -> None:
    """The 4 MB disk of the run fills at step 32; many lines follow until the save of 60."""
    values = {
        "schedule__total_steps": NUM_STEPS,
        "checkpoint__save_every": 30,
        "checkpoint__keep": 2,
    }
    words = cpt(world, Path("run"), checkpoint__on_save_error=policy, **values)
    fill = shlex.join([sys.executable, "-c", FILL, "32", str(free), *words])
    done = unshared(
        "-Urm",
        ON_A_SMALL_DISK.format(fill=fill, run=shlex.join([sys.executable, "-m", "infir2", *words])),
        tmp_path,
    )
    failed = [(60, "save_failed")] if policy == "warn" else []
    codes = (
        [0] if policy == "warn" else [3, 3, 0]
    )  # when it fills up, while it is full, when there is room again
    expected = [word for code in codes for word in ("code", str(code))]
    older = "step-30" if policy == "warn" else "step-60"  # a failed save costs no older one
    assert done.stdout.split() == [*expected, older, f"step-{NUM_STEPS}"], done.stderr
    assert (
        done.stderr.count(
            "run/metrics.jsonl cannot be written "
            "(No space left on device, errno 28 ENOSPC); its lines are kept"
        )
        == 1
    )
    assert "step 60 could not be saved" in done.stderr
    assert (
        "cannot be written (No space left on device, errno 28 ENOSPC); free space" in done.stderr
    ) == (policy == "stop")
    assert "internal error" not in done.stderr
    assert curve(tmp_path / "kept", "loss") == curve(long, "loss")
    assert_same_state(tmp_path / "kept", long)
    assert events(tmp_path / "kept") == failed


@pytest.mark.parametrize("name", ["recipe.toml", "metrics.jsonl"])
def test_f3_a_start_that_the_disk_refuses_is_a_checkpoint_error(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    words = cpt(world, tmp_path / "run")
    run([*words, "--train.stop_after_step=4"])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")  # so that lines have to go
    before = (tmp_path / "run" / name).read_bytes()
    real = Path.replace

    def replace_file(self: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace_file)
    assert main(words) == 3
    assert (
        f"{name}: cannot be written (No space left on device, errno 28 ENOSPC)"
        in capsys.readouterr().err
    )
    assert (tmp_path / "run" / name).read_bytes() == before
    monkeypatch.undo()
    run(words)
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == list(range(1, 9))


def test_f3_a_last_save_that_fails_is_not_success(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(
        "INFIR2_FAULTS", "save.before_manifest:4:enospc,save.before_manifest:5:enospc"
    )
    words = cpt(world, tmp_path / "run", checkpoint__on_save_error="warn")
    assert main(words) == 3
    assert (
        "its last step, 8, could not be saved, and the newest checkpoint is step 6"
        in capsys.readouterr().err
    )
    run(words)
    assert open_checkpoint(tmp_path / "run").step == 8


@pytest.mark.parametrize("background", ["true", "false"])
def test_f3_a_save_that_fails_twice_stops_the_run_or_is_told(
    world: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    background: str,
) -> None:
    monkeypatch.setenv(
        "INFIR2_FAULTS", "save.before_manifest:2:enospc,save.before_manifest:3:enospc"
    )
    words = cpt(world, tmp_path / "stop", checkpoint__background=background)
    assert main(words) == 3
    assert "step 4 could not be saved" in capsys.readouterr().err
    assert open_checkpoint(tmp_path / "stop").step == 2
    monkeypatch.setattr(faults, "_passes", Counter())
    run(
        cpt(
            world,
            tmp_path / "warn",
            checkpoint__background=background,
            checkpoint__on_save_error="warn",
        )
    )
    ((step, name),) = events(tmp_path / "warn")
    assert (step, name) == (4, "save_failed")
    monkeypatch.delenv("INFIR2_FAULTS")
    run(words)
    for name in ("stop", "warn"):
        assert curve(tmp_path / name, "loss") == curve(undisturbed, "loss")
        assert_same_state(tmp_path / name, undisturbed)


def test_f4_a_directory_that_vanishes_is_an_error_with_its_errno(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Loader.next_step
    taken: list[int] = []

    def vanish(self: Loader) -> list:
        taken.append(1)
        if len(taken) == 4:
            (tmp_path / "run" / "checkpoints").rename(tmp_path / "gone")
        return real(self)

    monkeypatch.setattr(Loader, "next_step", vanish)
    stopped = main(cpt(world, tmp_path / "run", checkpoint__background="false"))
    assert stopped == 3
    assert (
        "step 4 could not be saved (No such file or directory, errno 2 ENOENT)"
        in capsys.readouterr().err
    )
    assert (tmp_path / "gone" / "step-2").is_dir()


def test_a_background_save_holds_the_weights_of_its_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next update waits for a slow copy: the published bytes equal a foreground save's."""
    real = torch.Tensor.copy_
    waited = []

    def slow_copy(self: torch.Tensor, *arguments: object, **values: object) -> torch.Tensor:
        if threading.current_thread().name.startswith("infir2-save"):
            waited.append(time.sleep(0.002))
        return real(self, *arguments, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "copy_", slow_copy)
    run(cpt(world, tmp_path / "a", checkpoint__keep=9))
    monkeypatch.undo()
    assert waited
    run(cpt(world, tmp_path / "b", checkpoint__keep=9, checkpoint__background="false"))
    for step in (2, 4, 6, 8):
        ours, theirs = checkpoint(tmp_path / "a", step), checkpoint(tmp_path / "b", step)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("--data.tokenizer={copy}", "data.tokenizer"),
        ("--data.sources.0.weight=2.0", "data.sources.0.weight = 1.0, and now it is 2.0"),
        ("--run.seed=9", "run.seed = 1236, and now it is 9"),
        ("--model.shape.ffn_size=128", "model.shape.ffn_size = 136, and now it is 128"),
    ],
)
def test_f7_a_recipe_that_makes_another_run_is_refused(
    world: Path,
    tmp_path: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    sentence: str,
) -> None:
    before = sorted((undisturbed / "checkpoints").iterdir())
    assert main([*cpt(world, undisturbed), change.format(copy=tmp_path)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "--accept-changes" in error
    assert sorted((undisturbed / "checkpoints").iterdir()) == before


def test_f7_changes_that_do_not_change_the_numbers_are_printed_and_taken(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = cpt(world, tmp_path / "run")
    run([*words, "--train.stop_after_step=4"])
    run([*words, "--data.micro_batch_tokens=1024"])
    assert "resumed with data.micro_batch_tokens = 1024 (was 2048)" in capsys.readouterr().err
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == list(range(1, 9))


def test_f7_a_refusal_comes_first_and_leaves_the_recipe_as_it_was(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before process groups exist; the original command still resumes afterwards."""
    import infir2.train.supervisor as module

    words = cpt(world, tmp_path / "run")
    run([*words, "--train.stop_after_step=4"])
    with monkeypatch.context() as patch:
        patch.setattr(module, "init_ranks", lambda *_: pytest.fail("must be refused before"))
        assert main([*words, "--run.seed=9"]) == 2
    accepted = [*words, "--accept-changes"]
    assert main([*accepted, "--model.shape.ffn_size=128"]) == 2, "no option makes the tensors fit"
    assert "model.shape makes ffn_size = 128, and" in capsys.readouterr().err
    assert main([*accepted, "--data.sources.0.path=/nowhere.jsonl"]) == 4
    run(words)
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == list(range(1, 9))


def test_f7_other_data_that_is_accepted_begins_at_its_start(
    world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    words = cpt(world, tmp_path / "run", checkpoint__save_every=4)
    run([*words, "--train.stop_after_step=4"])
    changed = [*words, "--run.seed=9", "--accept-changes"]
    stopped = infir2(
        changed, INFIR2_FAULTS="train.step:2"
    )  # killed before it has saved: the same command goes on
    assert stopped.returncode == -signal.SIGKILL
    run(changed)
    assert events(tmp_path / "run") == [(4, "data_from_its_start")] * 2
    assert curve(tmp_path / "run", "loss")[:4] == curve(undisturbed, "loss")[:4]
    assert curve(tmp_path / "run", "loss")[4:] != curve(undisturbed, "loss")[4:]


@pytest.mark.parametrize("content", ["[run]\nseed = ", None])
def test_f7_a_recipe_that_cannot_be_read_back_counts_as_changed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    words, path = cpt(world, tmp_path / "run"), tmp_path / "run" / "recipe.toml"
    run([*words, "--train.stop_after_step=2"])
    path.unlink() if content is None else path.write_text(content)
    assert main(words) == 2
    assert "the recipe that this run was started with cannot be read" in capsys.readouterr().err
    run([*words, "--accept-changes"])
    run(words)


def test_f7_a_resumed_run_needs_nothing_of_the_run_it_began_with(
    world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """Neither its model nor, without data.tokenizer, what it says of its tokenizer."""
    shutil.copytree(undisturbed, tmp_path / "parent")
    words = options(
        world,
        tmp_path / "run",
        "sft1",
        model__path=tmp_path / "parent",
        schedule__total_steps=4,
        checkpoint__save_every=2,
    )
    words = [*words, "--data.tokenizer="]
    run([*words, "--train.stop_after_step=2"])
    shutil.rmtree(tmp_path / "parent")
    assert main(["check", *words]) == 0
    run(words)
    assert open_checkpoint(tmp_path / "run").step == 4


def test_f8_sigterm_in_a_validation(world: Path, tmp_path: Path, undisturbed: Path) -> None:
    """The step is saved, the rest of the validation made up for."""
    words = cpt(world, tmp_path / "run", checkpoint__save_every=100, train__validate_every=4)
    stopped = infir2(
        [*words, "--data.micro_batch_tokens=1024"], INFIR2_FAULTS="validate:2:term"
    )  # one before the first step
    assert stopped.returncode == 75, stopped.stderr
    assert "step 4 is saved in" in stopped.stderr
    assert [line["step"] for line in lines(tmp_path / "run", "validation")] == [0]
    run(words)
    assert [line["step"] for line in lines(tmp_path / "run", "validation")] == [0, 4, 8]
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == list(range(1, 9))


def test_f8_sigterm_where_a_branch_has_saved_nothing_names_what_it_goes_on_from(
    world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    source = undisturbed / "checkpoints" / "step-8"
    words = cpt(
        world, tmp_path / "branch", checkpoint__branch_from=source, schedule__total_steps=10
    )
    stopped = infir2(words, INFIR2_FAULTS="train.start:1:term")
    assert stopped.returncode == 75, stopped.stderr
    assert f"step 8 is saved in {undisturbed}." in stopped.stderr


@pytest.mark.parametrize(("point", "saved"), [("train.start:1", 0), ("train.step:6", 6)])
def test_f8_sigterm_in_start_up_and_in_a_step(
    world: Path, tmp_path: Path, undisturbed: Path, point: str, saved: int
) -> None:
    words = cpt(world, tmp_path / "run", checkpoint__save_every=100)
    stopped = infir2(words, INFIR2_FAULTS=f"{point}:term")
    assert stopped.returncode == 75, stopped.stderr
    assert ("nothing was saved" if saved == 0 else f"step {saved} is saved") in stopped.stderr
    run(words)
    assert curve(tmp_path / "run", "loss") == curve(undisturbed, "loss")
    assert_same_state(tmp_path / "run", undisturbed)


@pytest.fixture(scope="module")
def rl_words(world: Path, undisturbed: Path) -> list[str]:
    """An RL run with evaluations, whose directory is still to be named."""
    directory = undisturbed.parent
    run(["export", "hf", str(undisturbed), "--to", str(directory / "hf")])
    run(["export", "fp8", str(directory / "hf"), "--to", str(directory / "fp8")])
    words = options(
        world,
        directory,
        "rl1",
        schedule__total_steps=3,
        checkpoint__save_every=100,
        rl__evaluate_every=2,
    )
    words += [
        f"--model.path={undisturbed}",
        f"--rollout.model={directory / 'fp8'}",
        f"--evaluate.problems.0.path={world / 'heldout.jsonl'}",
    ]
    return [
        *words,
        "--evaluate.max_response_tokens=8",
        "--evaluate.samples=1",
        "--evaluate.max_problems=6",
    ]


@pytest.fixture(scope="module")
def undisturbed_rl(rl_words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rl") / "run"
    run([*rl_words, f"--run.dir={directory}"])
    return directory


@pytest.mark.parametrize(
    ("point", "saved"), [("rollout.group:2", 0), ("rollout.group:10", 2), ("evaluate:2", 2)]
)
def test_f8_sigterm_in_a_rollout_and_in_an_evaluation(
    rl_words: list[str], undisturbed_rl: Path, tmp_path: Path, point: str, saved: int
) -> None:
    """It stops inside the evaluation; finished steps are saved, it runs after the resume."""
    words = [*rl_words, f"--run.dir={tmp_path / 'run'}"]
    stopped = infir2(words, INFIR2_FAULTS=f"{point}:term")
    assert stopped.returncode == 75, stopped.stderr
    assert ("nothing was saved" if saved == 0 else f"step {saved} is saved") in stopped.stderr
    assert len(curve(tmp_path / "run", "reward")) == saved
    run(words)
    names = ("reward", "response_tokens", "groups_sampled", "policy_version")
    assert curve(tmp_path / "run", *names) == curve(undisturbed_rl, *names)
    scores = [
        [(line["step"], line["truncated_fraction"]) for line in lines(d, "evaluation")]
        for d in (tmp_path / "run", undisturbed_rl)
    ]
    assert [step for step, _ in scores[0]] == [2, 3]
    assert scores[0] == scores[1]
    assert_same_state(tmp_path / "run", undisturbed_rl)


def test_f8_sigterm_before_there_is_a_run(world: Path, tmp_path: Path) -> None:
    process = begin(
        [sys.executable, "-X", "importtime", "-m", "infir2", *cpt(world, tmp_path / "run")]
    )
    assert process.stderr is not None
    for line in process.stderr:  # torch is being imported: the run directory does not exist yet
        if "torch._utils" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "nothing was saved" in rest
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("code", [0, 4])
def test_f8_sigterm_while_a_run_is_being_closed_changes_nothing(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
) -> None:
    """A launcher sends it to all ranks when one ends: each keeps its exit code, unlogged."""
    signals = []

    def close_and_be_stopped(store: Store) -> None:
        close(store)
        os.kill(os.getpid(), signal.SIGTERM)
        signals.append("closing")

    def train_and_be_stopped(*arguments: object) -> None:
        try:
            run_training(*arguments)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            signals.append("closed")

    close, run_training = Store.close, train_run.run_training
    monkeypatch.setattr(Store, "close", close_and_be_stopped)
    monkeypatch.setattr("infir2.train.loop.run_training", train_and_be_stopped)
    if code:
        monkeypatch.setattr(Trainer, "step", Mock(side_effect=DataError("no such row.")))
    handler = signal.getsignal(signal.SIGTERM)
    assert main(cpt(world, tmp_path / "run")) == code
    assert signals == ["closing", "closed"]
    assert signal.getsignal(signal.SIGTERM) is handler
    said = capsys.readouterr().err
    assert "stopped" not in said.lower()
    assert ("no such row." in said) == bool(code)


def test_f9_a_nan_changes_nothing_and_three_in_a_row_stop_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(
        "INFIR2_FAULTS", "train.loss:2:nan,train.loss:4:nan,train.loss:5:nan,train.loss:6:nan"
    )
    assert main(cpt(world, tmp_path / "run", checkpoint__save_every=1, checkpoint__keep=9)) == 17
    assert (
        "stopped at step 6: the loss or the gradient was not finite 3 steps in a row"
        in capsys.readouterr().err
    )
    assert events(tmp_path / "run") == [(step, "non_finite") for step in (2, 4, 5, 6)]
    assert "cpt.jsonl:" in lines(tmp_path / "run", "event")[0]["detail"]  # the rows of the batch
    first, second, third = (checkpoint(tmp_path / "run", step) for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in first)


def test_f10_a_loss_spike_is_an_event_or_the_end(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five steps with ten times the loss and a stop in between: the log restores the window."""
    calls: list[int] = []

    class TenfoldLoss(NextTokenLoss):
        def __call__(self, scores: TokenScores) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            calls.append(1)
            loss, metrics = super().__call__(scores)
            return loss * (10 if 14 <= len(calls) <= 18 else 1), metrics

    monkeypatch.setattr(train_run, "next_token_loss", TenfoldLoss())

    def words(name: str) -> list[str]:
        return cpt(world, tmp_path / name, schedule__total_steps=20, data__batch_sequences=1)

    run([*words("run"), "--train.stop_after_step=15"])
    run(words("run"))
    assert events(tmp_path / "run") == [(14, "loss_spike"), (17, "loss_spike")]
    calls.clear()
    assert main([*words("stop"), "--train.on_spike=stop"]) == 1
    assert "stopped at step 17" in capsys.readouterr().err
    assert open_checkpoint(tmp_path / "stop").step == 16


def test_f10_the_window_does_not_follow_the_spike() -> None:
    monitor = SpikeMonitor()
    assert [monitor.add(2.0) for _ in range(20)] == [0] * 20
    assert [monitor.add(20.0) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert monitor.mean == 2.0
    assert monitor.add(2.1) == 0


def sft(world: Path, tmp_path: Path, rows: list[dict], **values: object) -> list[str]:
    """An SFT run of a new model on these rows."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = options(world, tmp_path / "run", "sft1", train__validate_every=0, **values)
    words += [
        f"--data.sources.0.path={tmp_path / 'rows.jsonl'}",
        "--model.path=",
        "--data.max_quarantined_fraction=0.5",
    ]
    return words + [f"--model.shape.{name}={value}" for name, value in SHAPE.items()]


def test_f13_a_dataset_shorter_than_one_step_wraps(world: Path, tmp_path: Path) -> None:
    """Three rows, four samples a step: two epochs are two steps, and each trains four samples."""
    rows = [json.loads(line) for line in (world / "sft1.jsonl").read_text().splitlines()[:3]]
    run(sft(world, tmp_path, rows, train__epochs=2.0))
    trained = lines(tmp_path / "run", "train")
    assert [line["step"] for line in trained] == [1, 2]
    assert all(line["trained_tokens"] > 0 and not line["skipped"] for line in trained)
    ((said,),) = [
        [
            event["detail"]
            for event in lines(tmp_path / "run", "event")
            if event["event"] == "few_rows"
        ]
    ]
    assert said.startswith("3 rows for data.batch_samples = 4")


@pytest.mark.parametrize(("policy", "counted"), [("drop", {"too_long": 2}), ("truncate", {})])
def test_f15_rows_that_are_too_long_follow_the_recipe(
    world: Path, tmp_path: Path, policy: str, counted: dict[str, int]
) -> None:
    rows = [json.loads(line) for line in (world / "sft1.jsonl").read_text().splitlines()[:6]]
    for row in rows[:2]:
        row["messages"][0]["content"] = " ".join([row["messages"][0]["content"]] * 30)
    words = sft(world, tmp_path, rows, schedule__total_steps=3, data__on_too_long=policy)
    run([*words, "--data.sequence_tokens=128", "--data.micro_batch_tokens=256"])
    path = tmp_path / "run" / "quarantine.jsonl"
    assert (
        Counter(
            json.loads(line)["reason"]
            for line in (path.read_text().splitlines() if path.exists() else [])
        )
        == counted
    )
    assert all(
        line["trained_tokens"] > 0 and not line["skipped"]
        for line in lines(tmp_path / "run", "train")
    )


def test_f15_a_step_without_a_trained_token_is_skipped_and_counted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Loader.next_step
    taken: list[int] = []

    def masked(self: Loader) -> list:
        taken.append(1)
        batches = real(self)
        return (
            [replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)) for batch in batches]
            if len(taken) == 3
            else batches
        )

    monkeypatch.setattr(Loader, "next_step", masked)
    run(cpt(world, tmp_path / "run", checkpoint__save_every=1, checkpoint__keep=9))
    assert events(tmp_path / "run") == [(3, "nothing_to_train")]
    before, after = checkpoint(tmp_path / "run", 2), checkpoint(tmp_path / "run", 3)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_f26_a_broken_view_neither_stops_nor_delays_the_run(
    world: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """TensorBoard's files cannot be written: the record is complete, no step waits."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    freed, tried = threading.Event(), threading.Event()

    def write(*_: object) -> None:
        tried.set()
        if fault == "raises":
            raise OSError(28, "No space left on device")
        freed.wait()

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr("infir2.checkpoint.record._CLOSE_SECONDS", 1.0)
    try:
        run(cpt(world, tmp_path / "run"))
        assert tried.wait(10)
    finally:
        freed.set()
    assert curve(tmp_path / "run", "loss") == curve(undisturbed, "loss")


def test_f27_a_clock_that_jumps_changes_no_timer(
    world: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = time.time, []

    def jumping() -> float:
        calls.append(1)
        return real() + (-1 if len(calls) % 2 else 1) * 365 * 86400

    monkeypatch.setattr(time, "time", jumping)
    words = cpt(world, tmp_path / "run")
    run([*words, "--train.stop_after_step=4"])
    run(words)
    assert calls
    assert curve(tmp_path / "run", "loss") == curve(undisturbed, "loss")
    assert all(
        0 < line["seconds"] < 60 and line["tokens_per_second"] > 0
        for line in lines(tmp_path / "run", "train")
    )


def test_f27_few_open_files_are_a_warning(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        assert main(["check", *cpt(world, tmp_path / "run")]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "only 512 open files are allowed; run `ulimit -n 4096`" in capsys.readouterr().out


TWO_HOSTS = """
hostname node-a; INFIR2_FAULTS=save.after_shard:2 {run}
echo $?; hostname node-b
{python} -c "import sys; from infir2.checkpoint import lock; lock.WATCH_SECONDS = 2.0
from infir2.cli import main; sys.exit(main(sys.argv[1:]))" {words}
echo $?
"""


@pytest.mark.costly
def test_f27_a_restart_under_another_host_name_goes_on(
    world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """A launcher restarts a run on another node seconds after the first node died in a save."""
    words = shlex.join(cpt(world, Path("run")))
    python = shlex.quote(sys.executable)
    done = unshared(
        "-Uru",
        TWO_HOSTS.format(run=f"{python} -m infir2 {words}", python=python, words=words),
        tmp_path,
    )
    assert done.stdout.split() == ["137", "0"], done.stderr
    assert "was on another host" in done.stderr
    assert "on node-a" in done.stderr
    assert ".tmp-step-4-node-a" in done.stderr, "what it left is removed and named"
    assert curve(tmp_path / "run", "loss") == curve(undisturbed, "loss")
    assert_same_state(tmp_path / "run", undisturbed)
