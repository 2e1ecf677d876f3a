"""A run directory that someone else changes: links, other types of files, moves, damaged files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stages import assert_same_state, curve, options, run

from infir2.checkpoint import Store, open_checkpoint
from infir2.cli import main
from infir2.data import Loader
from infir2.errors import CheckpointError, RunMovedError
from infir2.files import JsonLinesWriter, read_json_lines, truncate_torn_line


def cpt(world: Path, directory: Path, **values: object) -> list[str]:
    small = {"schedule__total_steps": 4, "checkpoint__save_every": 2, "train__validate_every": 0}
    return options(world, directory, "cpt", **(small | values))


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run(cpt(world, directory))
    return directory


def one_sentence(text: str) -> str:
    """The only error that a command printed; it is no traceback."""
    assert "Traceback" not in text
    (sentence,) = [line for line in text.splitlines() if "error:" in line]
    return sentence


NAMES = (
    *(".lock", "metrics.jsonl", "samples.jsonl", "quarantine.jsonl"),
    *("recipe.toml", "environment.json", "checkpoints"),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dangling", [False, True])
def test_a_run_writes_through_no_link(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, dangling: bool
) -> None:
    run_dir, victim = tmp_path / "run", tmp_path / "victim"
    run_dir.mkdir()
    if not dangling:
        victim.mkdir() if name == "checkpoints" else victim.write_text("precious\n")
    (run_dir / name).symlink_to(victim)
    code = main(cpt(world, run_dir))
    assert code == (0 if name in ("recipe.toml", "environment.json") else 3)
    if code:
        assert f"{name}: it is a symbolic link, not a" in one_sentence(capsys.readouterr().err)
    if dangling:
        assert not victim.exists()
    elif name == "checkpoints":
        assert not list(victim.iterdir())
    else:
        assert victim.read_text() == "precious\n"


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "__0_0.distcp", ""])
def test_a_checkpoint_with_a_link_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    """The content is right: whoever made the link can change it after it was verified."""
    warnings: list[str] = []
    store = Store(tmp_path / "run", warn=warnings.append)
    for step in (1, 2):
        path = store.save(step, {"a": torch.ones(1)}, {"step": step}) / name
    shutil.move(path, tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    assert "symbolic link" in warnings[-1]
    store.save(3, {}, {})
    assert (tmp_path / "moved").exists()


KINDS: dict[str, Callable[[Path], object]] = {
    "directory": Path.mkdir,
    "fifo": os.mkfifo,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES[:-1])
def test_other_types_of_files_neither_hang_nor_fill_the_memory(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    undisturbed: Path,
    name: str,
    kind: str,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / name).unlink(missing_ok=True)
    KINDS[kind](run_dir / name)
    code = main([*cpt(world, run_dir), "--accept-changes"])
    error = capsys.readouterr().err
    if code:
        assert code in (2, 3)
        assert name in one_sentence(error)
    else:
        assert "Traceback" not in error
    assert_same_state(run_dir, undisturbed)


def test_lines_go_to_the_directory_that_was_there_first(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    writer = JsonLinesWriter(tmp_path / "run" / "rows.jsonl")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    writer.append({"row": 1})
    writer.close()
    assert not list((tmp_path / "run").iterdir())
    assert read_json_lines(tmp_path / "moved" / "rows.jsonl") == [{"row": 1}]


def test_lines_are_not_cut_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("no newline")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="it is a symbolic link, not a regular file"):
        truncate_torn_line(tmp_path / "rows.jsonl")
    assert (tmp_path / "victim").read_text() == "no newline"


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def move_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, step: int, run_dir: Path, other: Path | None
) -> None:
    """Before training step `step`, move the run away and, if named, another run to its path."""
    real, steps = Loader.next_step, []

    def next_step(loader: Loader) -> list:
        steps.append(1)
        if len(steps) == step:
            run_dir.rename(run_dir.with_name("moved"))
            if other is not None:
                other.rename(run_dir)
        return real(loader)

    monkeypatch.setattr(Loader, "next_step", next_step)


@pytest.mark.parametrize(
    ("background", "policy", "replaced"),
    [("true", "warn", True), ("false", "stop", True), ("true", "warn", False)],
)
def test_a_run_that_is_moved_stops_and_writes_nothing_to_its_old_path(
    world: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    background: str,
    policy: str,
    replaced: bool,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(undisturbed, other)
    before = snapshot(other)
    arguments = cpt(
        world,
        tmp_path / "run",
        checkpoint__background=background,
        checkpoint__on_save_error=policy,
    )
    move_while_it_runs(monkeypatch, 4, tmp_path / "run", other if replaced else None)
    assert main(arguments) == 3
    sentence = one_sentence(capsys.readouterr().err)
    assert f"{tmp_path}/run: this path does not lead to the directory of this run" in sentence
    if replaced:
        assert snapshot(tmp_path / "run") == before
    else:
        assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    moved = tmp_path / "moved"
    assert open_checkpoint(moved).step == 2
    run(cpt(world, moved))
    assert curve(moved, "loss") == curve(undisturbed, "loss")
    assert_same_state(moved, undisturbed)


def test_a_store_removes_nothing_of_another_run(tmp_path: Path) -> None:
    """Neither when it makes room on a full disk nor when it keeps the newest."""
    store = Store(tmp_path / "run", keep=1)
    store.save(1, {}, {})
    other = Store(tmp_path / "other", keep=5)
    for step in (1, 2, 3):
        other.save(step, {}, {})
    other.close()
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "other").rename(tmp_path / "run")
    before = snapshot(tmp_path / "run")
    for work in (lambda: store.save(4, {}, {}), store._free_space, lambda: store._retain(4)):
        with pytest.raises(RunMovedError):
            work()
    assert snapshot(tmp_path / "run") == before


def test_a_directory_that_is_moved_and_back_is_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="was moved, removed or replaced"):
        store.save(1, {}, {})
    (tmp_path / "moved").rename(tmp_path / "run")
    store.save(1, {}, {})
    assert open_checkpoint(tmp_path / "run").step == 1
