"""A run directory that someone else changes: links, other types of files, moves, damaged files."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from file_faults import ERRORS
from stages import assert_same_state, curve, options, run

from infir2.checkpoint import Store, lock, open_checkpoint
from infir2.checkpoint.manifest import FileEntry, encode_manifest, read_manifest
from infir2.cli import main
from infir2.config import check_resume, load
from infir2.config.schema import TrainRecipe
from infir2.data import Loader
from infir2.errors import CheckpointError, ConfigError, RunMovedError
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


def change_state(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """As someone who also corrects the manifest."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    data = json.dumps(change(state) or state).encode()
    path.write_bytes(data)
    step, files = read_manifest(checkpoint)
    files["state.json"] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    (checkpoint / "manifest.json").write_bytes(encode_manifest(step, files))


STATES: dict[str, Callable[[dict], object]] = {
    "no object": lambda state: [state],
    "no kind": lambda state: state.pop("kind") and None,
    "another type": lambda state: state.update(loader=[]),
    "no place": lambda state: state["loader"].pop("place") and None,
    "a text for a number": lambda state: state["loader"]["place"].update(position="1"),
    "a negative position": lambda state: state["loader"]["place"].update(position=-1),
    "no counts": lambda state: state["loader"].update(quarantined={"a": 1}),
    "a text for a list": lambda state: state["loader"].update(rows="288"),
    "no model": lambda state: state.update(model_config="qwen2"),
}


@pytest.mark.parametrize("change", STATES)
def test_a_state_that_no_run_saved_is_one_sentence(
    world: Path,
    tmp_path: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    change_state(tmp_path / "run" / "checkpoints" / "step-4", STATES[change])
    assert main(cpt(world, tmp_path / "run")) == 3
    assert "step-4" in one_sentence(capsys.readouterr().err)


TOML = (
    *(b"a = " + b"[" * 5_000, b"a = " + b"9" * 6_000, b"[a" + b".a" * 5_000 + b"]"),
    *(b"\xff", b"x = 1", b"", b'extends = "recipe.toml"'),
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", TOML, ids=range(len(TOML)))
def test_a_damaged_stored_recipe_is_one_sentence_and_costs_nothing(
    tmp_path: Path, undisturbed: Path, text: bytes
) -> None:
    path = tmp_path / "recipe.toml"
    loaded = load(TrainRecipe, [undisturbed / "recipe.toml"])
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"recipe\.toml") as caught:
        check_resume(loaded, path)
    assert len(str(caught.value)) < 1_000
    assert check_resume(replace(loaded, accept_changes=True), path)


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("name", ["read_own", "load"])
def test_a_stored_recipe_that_cannot_be_read_now_is_not_given_up(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Neither the first nor the second time that it is opened."""
    path = tmp_path / "recipe.toml"
    shutil.copy(undisturbed / "recipe.toml", path)
    loaded = replace(load(TrainRecipe, [path]), accept_changes=True)

    def refuse(*_: object) -> None:
        try:
            raise OSError(number, os.strerror(number), str(path))
        except OSError as error:
            if name == "read_own":
                raise
            raise ConfigError("the recipe cannot be read") from error

    monkeypatch.setattr(f"infir2.config.resume.{name}", refuse)
    with pytest.raises(CheckpointError, match=r"recipe\.toml: cannot be read .* run the same"):
        check_resume(loaded, path)
    monkeypatch.undo()
    assert check_resume(loaded, path) == []


def test_a_damaged_lock_stops_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content of any kind: nobody holds it, and at worst a heartbeat is waited for."""
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.05)
    good = json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "started": "?"}).encode()
    draw = random.Random(7)
    for _ in range(100):
        data = bytearray(good)
        for _ in range(draw.choice((1, 1, 3, 20))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        for content in (bytes(data), b"[" * 4_096, b"7", b'{"pid": "x"}', b'{"pid": ' + b"9" * 400):
            (tmp_path / ".lock").write_bytes(content)
            Store(tmp_path, warn=lambda _: None).close()
