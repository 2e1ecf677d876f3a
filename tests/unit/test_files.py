"""Atomic writes, published directories and JSON lines: crashes, refused syncs and permissions."""

import errno
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from infir2 import files
from infir2.checkpoint import Store
from infir2.directories import new_directory
from infir2.errors import CheckpointError, OutputExistsError
from infir2.files import (
    JsonLinesWriter,
    disk_errors,
    fsync_directory,
    keep_json_lines,
    open_regular,
    read_json_lines,
    read_regular,
    require_regular,
    truncate_torn_line,
    write_atomically,
)
from infir2.model.safetensors_io import write_hf


def modes(directory: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_output_gets_the_permissions_that_the_umask_allows(
    tmp_path: Path, umask: int
) -> None:
    """safetensors creates files with mode 0600; a server of another user must read an export."""
    tensors = [("a", torch.ones(2, 2)), ("b", torch.ones(2, 2))]
    scales = {"a.scale": torch.ones(1)}
    write_hf(tmp_path / "hf", iter(tensors), {"model_type": "x"}, None, 16, scales)
    Store(tmp_path / "run").save(1, dict(tensors), {"step": 1})
    write_atomically(tmp_path / "recipe.toml", b"")
    JsonLinesWriter(tmp_path / "metrics.jsonl").append({"step": 1})
    with new_directory(tmp_path / "nested") as work:
        (work / "release").mkdir()
        (work / "release" / "weights").touch(mode=0o600)
    assert modes(tmp_path) == {0o666 & ~umask}
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "fp8_scales.st",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.toml"
    write_atomically(path, b"old")
    write_atomically(path, b"older")
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with (
        pytest.raises(
            CheckpointError, match=r"x \(No space left on device, errno 28 ENOSPC\); free"
        ),
        disk_errors("x"),
    ):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def refuse(code: int, directories_only: bool = False):  # type: ignore[no-untyped-def]
    """An `os.fsync` that fails with `code`."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if directories_only and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return real(descriptor)
        raise OSError(code, os.strerror(code))

    return fsync


def save_checkpoint(directory: Path) -> None:
    Store(directory, warn=lambda _: None).save(1, {"a": torch.ones(2)}, {"step": 1})


def export_model(directory: Path) -> None:
    write_hf(directory, iter([("a", torch.ones(2))]), {"model_type": "x"})


@pytest.mark.parametrize("write", [save_checkpoint, export_model])
def test_a_file_system_that_cannot_sync_directories_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL, directories_only=True))
    write(tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO, directories_only=True))
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(tmp_path / "other")


def test_only_einval_of_a_directory_sync_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    fsync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        fsync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        fsync_directory(tmp_path / "file")


def fill(target: Path, error: Exception | None = None) -> None:
    with new_directory(target) as work:
        (work / "file").write_text("x")
        assert not target.exists()
        if error:
            raise error


def fill_too_late(target: Path) -> None:
    with new_directory(target):
        target.mkdir()
        (target / "theirs").touch()


def test_a_new_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        fill(target, ZeroDivisionError())
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space"):
        fill(target, OSError(errno.ENOSPC, "No space left on device"))
    assert list(tmp_path.iterdir()) == []
    fill(target)
    assert (target / "file").read_text() == "x"
    with pytest.raises(OutputExistsError, match="exists already"):
        fill(target)
    with pytest.raises(OutputExistsError, match="created meanwhile"):
        fill_too_late(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_json_lines_come_back_whatever_they_hold(tmp_path: Path) -> None:
    rows = [
        {"text": "ä\u2028\x85\r\n"},
        {"lone": "\ud800"},
        {"array": np.array([0.1], np.float32), "tensor": torch.ones(2)},
    ]
    writer = JsonLinesWriter(tmp_path / "new" / "rows.jsonl")
    writer.append(*rows[:2])
    writer.append(rows[2])
    writer.close()
    read = read_json_lines(writer.path)
    assert read[:2] == rows[:2]
    assert np.float32(read[2]["array"][0]) == np.float32(0.1)
    assert read[2]["tensor"] == [1.0, 1.0]
    assert writer.path.read_bytes().count(b"\n") == 3


TORN = b'{"step": 1}\n{"st\xff\n7\n{"step": 2}\n{"step": 3}\n{"step": 4'


def test_damaged_and_torn_lines_are_left_out_and_the_next_line_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    truncate_torn_line(path)
    assert read_json_lines(path) == []
    path.write_bytes(TORN)
    assert [row["step"] for row in read_json_lines(path)] == [1, 2, 3]
    truncate_torn_line(path)
    assert path.read_bytes() == TORN[: TORN.rindex(b"\n") + 1]
    JsonLinesWriter(path).append({"step": 4})
    assert [row["step"] for row in read_json_lines(path)] == [1, 2, 3, 4]
    path.write_bytes(b'{"step": 1')
    truncate_torn_line(path)
    assert path.read_bytes() == b""


def test_rejected_lines_are_removed_and_a_file_without_any_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    keep_json_lines(path, lambda row: True)
    assert not path.exists()
    path.write_bytes(TORN + b"}")
    keep_json_lines(path, lambda row: row["step"] != 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n{"step": 4}\n'
    monkeypatch.setattr(files, "write_atomically", lambda *_: pytest.fail("nothing to change"))
    keep_json_lines(path, lambda row: True)


def test_lines_wait_for_a_disk_that_refuses_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "run"
    blocked.touch()
    writer = JsonLinesWriter(blocked / "metrics.jsonl")
    writer.append({"step": 1})
    writer.append({"step": 2})
    assert capsys.readouterr().err.count("its lines are kept until it can") == 1
    blocked.unlink()
    writer.close()
    assert [json.loads(line)["step"] for line in writer.path.read_text().splitlines()] == [1, 2]


def make_irregular(directory: Path) -> dict[str, Path]:
    """A path of each kind that is not a regular file."""
    directory.mkdir(exist_ok=True)
    paths = {name: directory / name for name in ("fifo", "directory", "socket", "loop")}
    os.mkfifo(paths["fifo"])
    paths["directory"].mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(paths["socket"]))
    paths["loop"].symlink_to(paths["loop"])
    long, other = directory / ("n" * 300), directory / "a\0b"
    return paths | {"device": Path("/dev/zero"), "name": long, "nul": other, "part": other / "c"}


def test_nothing_but_a_file_or_a_link_is_replaced(tmp_path: Path) -> None:
    """As root, a page for /dev/null would take the place of the device."""
    for kind in ("fifo", "socket", "directory"):
        path = make_irregular(tmp_path / kind)[kind]
        before = path.lstat()
        with pytest.raises(OSError, match=r"not a regular file|directory"):
            write_atomically(path, b"x")
        assert os.path.samestat(path.lstat(), before)
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"kept")
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert (target.read_bytes(), link.read_bytes()) == (b"kept", b"new")


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    for name, path in make_irregular(tmp_path).items():
        for read in (require_regular, open_regular, lambda path: read_regular(path, 9)):
            with pytest.raises(OSError, match=r".") as raised:  # and it does not block
                read(path)
            assert raised.value.strerror, name
    path = tmp_path / "file"
    path.write_bytes(b"123456789")
    linked = tmp_path / "link"
    linked.symlink_to(path)
    assert read_regular(linked, 9) == b"123456789"
    with open_regular(path) as file:
        assert file.read() == b"123456789"
    assert require_regular(path) == 9
    for read in (require_regular, read_regular):
        with pytest.raises(OSError, match="larger than the 8 bytes"):
            read(path, 8)
    with pytest.raises(OSError, match="larger than the 3 bytes"):  # it has size 0
        read_regular(Path("/proc/self/status"), 3)
