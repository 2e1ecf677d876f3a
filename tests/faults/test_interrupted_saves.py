"""A foreground save that ends in any way ends the run: no hang, a free lock, nothing lost."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from stages import assert_same_state, begin, curve, options, run

from infir2.checkpoint import Store, open_checkpoint
from infir2.cli import main


def cpt(world: Path, directory: Path) -> list[str]:
    keys = {"schedule__total_steps": 4, "checkpoint__save_every": 2, "train__validate_every": 0}
    return options(world, directory, "cpt", checkpoint__background="false", **keys)


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run(cpt(world, directory))
    return directory


def is_locked(run_dir: Path) -> bool:
    """Whether another process is refused."""
    pid = os.fork()
    if pid == 0:
        try:
            Store(run_dir, warn=lambda _: None).close()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("error", "code"), [(MemoryError, 70), (KeyboardInterrupt, 130)])
def test_a_save_that_raises_anything_ends_the_run_and_frees_the_lock(
    world: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    code: int,
) -> None:
    real = Store._finish

    def finish(store: Store, *arguments: object) -> None:
        if arguments[2] == 4:
            raise error
        real(store, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_finish", finish)
    arguments = cpt(world, tmp_path / "run")
    assert main(arguments) == code
    assert not is_locked(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.undo()
    run(arguments)
    assert curve(tmp_path / "run", "loss") == curve(undisturbed, "loss")
    assert_same_state(tmp_path / "run", undisturbed)


@pytest.mark.timeout(180)
def test_a_second_ctrl_c_ends_a_save_that_does_not_end(
    world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """And SIGTERM in between, which alone waits for the save, does not stop that."""
    arguments = cpt(world, tmp_path / "run")
    process = begin(
        [sys.executable, "-m", "infir2", *arguments], INFIR2_FAULTS="save.before_rename:2:hang"
    )
    directory = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(directory.glob(".tmp-step-4-*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not is_locked(tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").step == 2
    run(arguments)
    assert_same_state(tmp_path / "run", undisturbed)
