"""A run that is stopped anywhere and started again is the run that was never stopped."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stages import assert_same_state, begin, curve, lines, options, run

from infir2.cli import main
from infir2.config.schema import ModelSection
from infir2.train.build import open_tokenizer


def infir2(words: list[str], **variables: str) -> "subprocess.Popen[str]":
    return begin([sys.executable, "-m", "infir2", *words], **variables)


def wait_for_lines(process: "subprocess.Popen[str]", path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} has fewer than {count} lines after two minutes"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "cpt"
    run(
        options(
            world,
            directory,
            "cpt",
            schedule__total_steps=8,
            checkpoint__save_every=3,
            train__validate_every=4,
        )
    )
    return directory


def test_killed_cpt_goes_on_bit_for_bit(world: Path, tmp_path: Path, undisturbed: Path) -> None:
    words = options(
        world,
        tmp_path / "cpt",
        "cpt",
        schedule__total_steps=8,
        checkpoint__save_every=3,
        train__validate_every=4,
    )
    killed = infir2(words, INFIR2_FAULTS="train.step:6")
    assert killed.wait() == -signal.SIGKILL
    assert curve(tmp_path / "cpt", "loss")[-1][0] == 5  # two steps beyond the checkpoint of step 3
    run(words)
    assert curve(tmp_path / "cpt", "loss", "gradient_norm") == curve(
        undisturbed, "loss", "gradient_norm"
    )
    assert [line["validation_loss"] for line in lines(tmp_path / "cpt", "validation")] == [
        line["validation_loss"] for line in lines(undisturbed, "validation")
    ]
    assert_same_state(tmp_path / "cpt", undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_signal_saves_and_says_so(
    world: Path, tmp_path: Path, number: int, code: int
) -> None:
    words = options(
        world,
        tmp_path / "cpt",
        "cpt",
        schedule__total_steps=100000,
        checkpoint__save_every=100000,
        train__validate_every=0,
    )
    process = infir2(words)
    wait_for_lines(process, tmp_path / "cpt" / "metrics.jsonl", 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in errors
    last = curve(tmp_path / "cpt", "loss")[-1][0]
    assert (tmp_path / "cpt" / "checkpoints" / f"step-{last}").is_dir()
    assert f"step {last} is saved" in errors


def test_sft_resumes_in_the_middle_of_an_epoch(
    world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    def words(name: str) -> list[str]:
        return options(
            world,
            tmp_path / name,
            "sft1",
            model__path=undisturbed,
            checkpoint__save_every=5,
            train__epochs=0.5,
        )

    run(words("a"))
    assert main([*words("b"), "--train.stop_after_step=3"]) == 0
    run(words("b"))
    assert curve(tmp_path / "a", "loss") == curve(tmp_path / "b", "loss")
    assert_same_state(tmp_path / "a", tmp_path / "b")


def test_another_recipe_is_refused_and_safe_keys_are_not(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(
        world, tmp_path / "cpt", "cpt", schedule__total_steps=4, train__stop_after_step=2
    )
    run(words)
    assert main([*words, "--run.seed=99"]) == 2
    assert "run.seed" in capsys.readouterr().err
    run([*words, "--train.stop_after_step=3", "--checkpoint.keep=1"])
    assert curve(tmp_path / "cpt", "loss")[-1][0] == 3


def test_decay_branches_from_a_stable_checkpoint_with_optimizer_and_data(
    world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """WSD: step 4-6 of a branch whose decay starts at step 3 begin where the stable phase stood."""
    stable = options(
        world,
        tmp_path / "stable",
        "cpt",
        schedule__total_steps=8,
        checkpoint__save_every=3,
        train__stop_after_step=3,
    )
    run(stable)
    branch = f"--checkpoint.branch_from={tmp_path / 'stable' / 'checkpoints' / 'step-3'}"
    words = options(
        world,
        tmp_path / "branch",
        "cpt",
        schedule__total_steps=6,
        schedule__decay_from_step=3,
        schedule__decay_steps=3,
    )
    run([*words, branch])
    steps = curve(tmp_path / "branch", "loss", "learning_rate")
    assert [step for step, *_ in steps] == [4, 5, 6]
    # the first loss is taken before the first decayed update: data and weights go on exactly
    assert steps[0][1] == curve(undisturbed, "loss")[3][1]
    assert steps[0][2] > steps[1][2] > steps[2][2] == pytest.approx(3e-5)


def test_two_jobs_cannot_share_a_run_directory(world: Path, tmp_path: Path) -> None:
    words = options(
        world,
        tmp_path / "cpt",
        "cpt",
        schedule__total_steps=100000,
        checkpoint__save_every=100000,
        train__validate_every=0,
    )
    first = infir2(words)
    wait_for_lines(first, tmp_path / "cpt" / "metrics.jsonl", 1)
    second = infir2(words)
    _, errors = second.communicate(timeout=120)
    first.kill()
    first.wait()
    assert second.returncode == 2
    assert str(first.pid) in errors
    assert "Traceback" not in errors


def test_a_resumed_run_reads_its_checkpoint_alone_and_not_the_model_it_began_with(
    world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    run(["export", "hf", str(undisturbed), "--to", str(tmp_path / "hf")])
    values = {
        "model__path": tmp_path / "hf",
        "schedule__total_steps": 3,
        "checkpoint__save_every": 2,
    }
    run(options(world, tmp_path / "whole", "sft1", **values))
    run(options(world, tmp_path / "halved", "sft1", train__stop_after_step=2, **values))
    (tmp_path / "hf" / "model.safetensors").unlink()
    run(options(world, tmp_path / "halved", "sft1", **values))
    assert_same_state(tmp_path / "halved", tmp_path / "whole")
    assert main(options(world, tmp_path / "new", "sft1", **values)) == 3, "a new run needs it"


def test_a_run_with_relative_paths_is_exported_from_any_directory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    (home / "data").symlink_to(world)
    monkeypatch.chdir(home)
    values = {"schedule__total_steps": 1, "schedule__decay_steps": 0, "schedule__warmup_steps": 0}
    run(options(Path("data"), Path("run"), "cpt", **values))
    monkeypatch.chdir(other)
    run(["export", "hf", "../home/run", "--to", "hf"])
    exported = Path("hf/tokenizer.json").read_bytes()
    assert exported == (world / "tokenizer/tokenizer.json").read_bytes()
    tokenizer = open_tokenizer(ModelSection(path="../home/run"))
    assert tokenizer.directory == home / "data/tokenizer"
    home.rename(tmp_path / "moved")  # with its tokenizer
    monkeypatch.chdir(tmp_path / "moved")
    run(["export", "hf", "run", "--to", "hf"])
