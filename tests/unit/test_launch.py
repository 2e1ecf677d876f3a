"""`infir2 launch`: command lines, torchrun, and the exit code of the launcher."""

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from stages import RECIPES, begin, curve, lines, options, run

from infir2.cli import main
from infir2.errors import ConfigError, RankError
from infir2.launch import ranks
from infir2.launch import ray as ray_launch
from infir2.launch.torchrun import Layout, default_ranks

LAUNCH = [sys.executable, "-m", "infir2", "launch"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "INFIR2_FAULTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of that name in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.toml", "a b.toml"):
        (tmp_path / name).touch()


def dry(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", words[0], "--dry-run", *words[1:]]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("recipes")
def test_a_dry_run_says_which_variables_the_verb_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUM_ROLLOUT", "100")
    words = ["launch", "ray", "--gpus-per-node", "8", "--dry-run", "--"]
    assert main([*words, "rl", "a.toml"]) == 0
    assert "rl reads from the environment: NUM_ROLLOUT=100" in capsys.readouterr().err
    assert main([*words, "sft", "a.toml"]) == 0
    assert "NUM_ROLLOUT" not in capsys.readouterr().err


def test_crowded_servers_are_refused_before_a_job_is_queued(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["launch", "slurm", "--nodes", "4", "--gpus-per-node", "8", "--", "rl"]
    assert main([*words, str(RECIPES.parent / "qwen2.5-7b/rl1.toml")]) == 2
    assert "put 4 servers on one of the 8 GPUs of the first node" in capsys.readouterr().err


def test_ray_is_refused_more_servers_than_its_nodes_have_room_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `infir2 plan` says: two nodes have four places for the nine."""
    words = ["launch", "ray", "--gpus-per-node", "8", "--nodes", "2", "--", "rl"]
    recipe = str(RECIPES.parent / "qwen2.5-7b/rl1.toml")
    assert main([*words, recipe, "--rollout.engines=9"]) == 2
    assert "put 3 servers on one of the nodes' GPUs" in capsys.readouterr().err


@pytest.mark.usefixtures("recipes")
def test_torchrun_on_one_node_and_on_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = shlex.split(
        dry(capsys, "torchrun", "--gpus-per-node", "8", "--", "sft", "a b.toml", "--run.seed=1")
    )
    assert one[1:6] == [
        *("-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file"),
        "--rdzv-endpoint=FILE",
    ]
    assert one[6:] == [
        "--nproc-per-node=8",
        "--max-restarts=3",
        "-m",
        "infir2",
        "sft",
        "a b.toml",
        "--run.seed=1",
    ]
    assert main(["launch", "torchrun", "--nodes", "2", "--", "cpt", "a.toml"]) == 2
    assert "MASTER_ADDR" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    many = dry(capsys, "torchrun", "--nodes", "2", "--gpus-per-node", "4", "--", "cpt", "a.toml")
    assert "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=10.0.0.1:29400" in many


def test_what_cannot_be_launched_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in [
        (["torchrun", "--", "export", "hf"], "one of cpt, sft, rl, eval"),
        (
            ["torchrun", "--engines", "2", "--", "rl", "a.toml"],
            "--engines is for infir2 launch ray",
        ),
        (
            ["ray", "--gpus-per-node", "2", "--engines", "2", "--", "sft", "a.toml"],
            "--engines is for infir2 launch ray",
        ),
        (["torchrun", "--nodes", "0", "--", "cpt"], "0 is not a number of at least 1"),
        (["ray", "--max-restarts", "-1", "--", "cpt"], "-1 is not a number of at least 0"),
        (["slurm", "--cpus-per-rank", "0", "--", "cpt"], "0 is not a number of at least 0.01"),
        (["slurm", "--cpus-per-rank", "inf", "--", "cpt"], "inf is not a number"),
        (["torchrun", "--nodes", "2.5", "--", "cpt"], "invalid number value: '2.5'"),
        (["torchrun", "cpt", "a b.toml"], "write infir2 launch torchrun -- cpt 'a b.toml'"),
        (["slurm", "--", "cpt", "a.toml"], "set --gpus-per-node M"),
        (["ray", "--cpu", "--", "cpt", "a.toml"], "set --gpus-per-node M"),
        (["torchrun", "--dry-run", "--", "cpt", "absent.toml"], "absent.toml: no such recipe"),
        (
            ["slurm", "--gpus-per-node", "1", "--", "cpt", "absent.toml"],
            "absent.toml: no such recipe",
        ),
        (["torchrun", "--gpus-per-node", "2", "--", "eval", "a.toml"], "one process"),
        (["mpirun", "--", "cpt"], "invalid choice"),
    ]:
        assert main(["launch", *words]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.usefixtures("recipes")
def test_the_slurm_script_is_a_shell_script_that_requeues_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = dry(
        capsys,
        "slurm",
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
        "--sbatch=--partition=h100",
        "--",
        "sft",
        "a b.toml",
    )
    for line in (
        "--nodes=2",
        "--gpus-per-node=8",
        "--ntasks-per-node=1",
        "--requeue",
        "--signal=TERM@300",
        "--partition=h100",
    ):
        assert f"#SBATCH {line}" in script
    assert "-- sft 'a b.toml'" in script
    assert "scontrol requeue" in script
    path = tmp_path / "job.sh"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert "--gpus-per-node=" not in dry(
        capsys, "slurm", "--cpu", "--gpus-per-node", "1", "--", "cpt", "a.toml"
    )
    assert "scontrol requeue" in dry(capsys, "slurm", "--", "eval", "a.toml")


@pytest.mark.usefixtures("recipes")
def test_ray_names_bundles_and_the_command_of_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    text = dry(
        capsys,
        "ray",
        "--nodes",
        "4",
        "--gpus-per-node",
        "8",
        "--cpus-per-rank",
        "4",
        "--",
        "rl",
        "a.toml",
    )
    assert "4 bundles of {'CPU': 32.0, 'GPU': 8.0}, STRICT_SPREAD" in text
    assert text.rstrip().endswith(
        "--endpoint HOST:PORT --run-id infir2 --local-address HOST -- rl a.toml"
    )
    apart = dry(
        capsys,
        "ray",
        "--nodes",
        "4",
        "--gpus-per-node",
        "8",
        "--engines",
        "6",
        "--gpus-per-engine",
        "2",
        "--",
        "rl",
        "a.toml",
    )
    assert "; 6 bundles of {'CPU': 2.0, 'GPU': 2.0}, PACK; in each of the first" in apart


def test_the_ranks_of_a_node_are_its_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    assert default_ranks() == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert default_ranks() == 1


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ([0, 0], 0),
        ([0, 75], 75),
        ([75, 71, 75], 71),
        ([71, 70], 70),
        ([71, 2, 70], 2),
        ([75, 17, 17], 17),
        ([], 71),
    ],
)
def test_the_worst_code_is_the_cause_and_not_its_echo(codes: list[int], worst: int) -> None:
    assert ranks.worst_code(codes) == worst


def test_the_worst_code_of_several_launchers_is_that_of_their_last_attempts(
    tmp_path: Path,
) -> None:
    def rank(launcher: str, attempt: int, number: int, code: int | None) -> None:
        directory = tmp_path / launcher / f"attempt-{attempt}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"rank-{number}.pid").write_text("1")
        if code is not None:
            (directory / f"rank-{number}.code").write_text(str(code))

    rank("n1-7", 0, 0, 17)
    rank("n1-7", 10, 0, 0)
    rank("n2-8", 0, 1, 75)
    assert ranks.worst_code_in(tmp_path) == 75
    rank("n2-8", 0, 2, None)
    assert ranks.worst_code_in(tmp_path) == 71
    assert (
        subprocess.run([sys.executable, "-m", "infir2.launch.ranks", str(tmp_path)]).returncode
        == 71
    )
    assert ranks.worst_code_in(tmp_path / "absent") == 71


def start(words: list[str], *launch: str, **variables: str) -> "subprocess.Popen[str]":
    return begin([*LAUNCH, "torchrun", *launch, "--", *words], **variables)


def wait_until(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.costly
def test_a_killed_rank_is_restarted_from_the_newest_checkpoint(world: Path, tmp_path: Path) -> None:
    def words(name: str) -> list[str]:
        return options(
            world,
            tmp_path / name,
            "cpt",
            schedule__total_steps=6,
            checkpoint__save_every=2,
            train__validate_every=0,
        )

    run(words("undisturbed"))
    process = start(
        words("killed"), "--max-restarts", "1", INFIR2_FAULTS="train.step:5"
    )  # the second life does 2 steps
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resumed from" in errors
    assert curve(tmp_path / "killed", "loss", "gradient_norm") == curve(
        tmp_path / "undisturbed", "loss", "gradient_norm"
    )
    process = start(
        [*words("dead"), "--run.seed=3"], "--max-restarts", "0", INFIR2_FAULTS="train.step:2"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 71
    assert errors.rstrip().endswith("the worst rank ended with code 71; its message is above")


def test_sigterm_to_the_launcher_saves_and_ends_with_75(world: Path, tmp_path: Path) -> None:
    words = options(
        world,
        tmp_path / "cpt",
        "cpt",
        schedule__total_steps=100000,
        checkpoint__save_every=100000,
        train__validate_every=0,
    )
    process = start(words)
    wait_until(
        lambda: (
            (tmp_path / "cpt" / "metrics.jsonl").exists()
            and len(curve(tmp_path / "cpt", "loss")) > 1
        ),
        process,
    )
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "is saved" in errors
    assert "Traceback" not in errors


@pytest.mark.costly
def test_a_stopped_evaluation_says_that_it_resumes(world: Path, tmp_path: Path) -> None:
    run(options(world, tmp_path / "cpt", "cpt", schedule__total_steps=4))
    words = [
        "eval",
        str(RECIPES / "eval.toml"),
        f"--model.path={tmp_path / 'cpt'}",
        f"--run.dir={tmp_path / 'eval'}",
    ]
    words += [
        f"--evaluate.problems.0.path={world / 'heldout.jsonl'}",
        "--run.threads=1",
        "--evaluate.samples=4",
    ]
    words += ["--evaluate.max_response_tokens=64"]
    process = start(words, INFIR2_FAULTS="evaluate:3:term")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    by_rank = "Stopped; the responses so far are kept. Run the same command to resume."
    assert f"infir2: {by_rank}" in errors.splitlines()
    assert "infir2: Stopped. Run the same command to resume." in errors.splitlines()
    _, errors = (again := start(words)).communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "eval: resumed after " in errors
    assert lines(tmp_path / "eval", "evaluation")[0]["num_problems"] > 0


class FakeGroup:
    """A placement group that is placed after `waits` waits."""

    def __init__(self, waits: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.waits, self.meanwhile = waits, meanwhile

    def wait(self, _seconds: float) -> bool:
        self.waits -= 1
        self.meanwhile()
        return self.waits < 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> "ray_launch._Driver":
    """The driver of a cluster whose placement groups are `FakeGroup`s."""
    monkeypatch.setitem(
        sys.modules, "ray", types.SimpleNamespace(cluster_resources=lambda: {"CPU": 1.0})
    )
    return ray_launch._Driver(Layout(cpu=True), ["cpt"], [])


def test_ray_waits_longer_for_resources_after_a_death(
    driver: "ray_launch._Driver",
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = iter(range(0, 100_000, 10))  # seconds
    monkeypatch.setattr(ray_launch.time, "monotonic", lambda: next(clock))
    with pytest.raises(ConfigError, match="after 60 s"):
        driver._await_resources([FakeGroup(50)], attempt=0)
    driver._await_resources([FakeGroup(50)], attempt=1)
    assert "waits up to 30 minutes for room" in capsys.readouterr().err
    with pytest.raises(RankError, match="after 1800 s") as caught:
        driver._await_resources([FakeGroup(math.inf)], attempt=1)
    assert caught.value.exit_code == 71


def test_a_signal_interrupts_the_wait_for_resources(driver: "ray_launch._Driver") -> None:
    with pytest.raises(ray_launch._Stopped):
        driver._await_resources(
            [FakeGroup(50, lambda: driver.stop(signal.SIGTERM, None))], attempt=0
        )
    with pytest.raises(ray_launch._Stopped):
        driver._await_resources([FakeGroup(0)], attempt=0)  # placed when the signal arrives


def test_an_error_in_the_recipe_is_reported_once_and_not_retried(
    world: Path, tmp_path: Path
) -> None:
    _, errors = (
        process := start(options(world, tmp_path / "cpt", "cpt", schedule__total_step=6))
    ).communicate(timeout=120)
    assert process.returncode == 2
    assert errors.count("did you mean schedule.total_steps?") == 1
    assert "Traceback" not in errors


def test_the_code_of_a_rank_stands_when_torchrun_stops_all(tmp_path: Path) -> None:
    """SIGTERM may come when `main` has returned and the process is still ending."""
    program = (
        "import atexit, os, sys; from infir2.launch.ranks import run_rank; "
        "atexit.register(os.kill, os.getpid(), 15); "
    )
    variables = {"INFIR2_RANKS_DIR": str(tmp_path), "TORCHELASTIC_RESTART_COUNT": "0", "RANK": "0"}
    variables |= {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    process = begin([sys.executable, "-c", program + "sys.exit(run_rank(lambda: 17))"], **variables)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (tmp_path / "attempt-0" / "rank-0.code").read_text() == "17"


def descendants(pid: int) -> list[int]:
    children = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            children += path.read_text().split()
    return [pid, *(each for child in children for each in descendants(int(child)))]


def listening(pids: list[int]) -> set[str]:
    """Addresses, as /proc/net prints them, on which the processes listen for TCP connections."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    sockets.add(os.readlink(entry.path))
    rows = [
        row.split()
        for name in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def test_the_ranks_of_one_node_listen_on_loopback_only(world: Path, tmp_path: Path) -> None:
    """Seen from the start of the launcher until both ranks have begun to train."""
    process = start(
        options(world, tmp_path / "run", "cpt", schedule__total_steps=4),
        *("--gpus-per-node", "2"),
        INFIR2_FAULTS="train.step:1:hang",
    )
    found, deadline = set(), time.monotonic() + 120
    while not (tmp_path / "run" / "recipe.toml").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        found |= listening(descendants(process.pid))
        time.sleep(0.1)
    found |= listening(descendants(process.pid))
    assert found, "the store and gloo listen"
    assert {address.partition(":")[0] for address in found} == {"0100007F"}


def test_ranks_do_not_outlive_a_killed_launcher(world: Path, tmp_path: Path) -> None:
    words = options(
        world,
        tmp_path / "cpt",
        "cpt",
        schedule__total_steps=100000,
        checkpoint__save_every=100000,
        train__validate_every=0,
    )
    process = start(words)
    lock = tmp_path / "cpt" / ".lock"
    wait_until(
        lambda: (
            lock.exists()
            and '"pid"' in lock.read_text()
            and (tmp_path / "cpt" / "metrics.jsonl").exists()
        ),
        process,
    )
    process.kill()
    process.communicate()
    run([*words, "--train.stop_after_step=1"])  # refused while a rank holds the lock


def test_benchmarks_have_one_process_on_each_node_and_its_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--", "eval", "m", "--benchmarks", "aime24", "--engines", "8"]
    script = dry(capsys, "slurm", "--nodes", "2", "--gpus-per-node", "8", *words)
    assert "#SBATCH --gpus-per-node=8" in script
    assert "launch torchrun --nodes 2 --gpus-per-node 1 " in script
    assert "-- eval m --benchmarks aime24 --engines 8" in script
    placed = dry(capsys, "ray", "--nodes", "2", "--gpus-per-node", "8", *words)
    assert "2 bundles of {'CPU': 1.0, 'GPU': 8.0}, STRICT_SPREAD" in placed
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    assert main(["launch", "slurm", "--in-job", *words]) == 2
    assert "--in-job is for a command inside a job of SLURM" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert "launch torchrun --nodes 3 " in dry(capsys, "slurm", "--in-job", *words)
    assert main(["launch", "slurm", "--cpu", "--nodes", "2", "--", "eval", "a.toml"]) == 2
    assert "infir2 eval RECIPE runs in one process" in capsys.readouterr().err
