"""Faults F1-F5 of the checkpoint store.

Kills at every named point, damaged files, full and read-only disks, two jobs in one run directory.
"""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stages import gone

from infir2 import faults
from infir2.checkpoint import Store, dcp, open_checkpoint
from infir2.checkpoint import lock as lock_module
from infir2.checkpoint import store as store_module
from infir2.checkpoint.reader import published_steps
from infir2.errors import CheckpointCorruptError, CheckpointError, ConfigError, OutputExistsError

SAVE_POINTS = [point for point in faults.POINTS if point.startswith("save.")]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Two tensor files per checkpoint, and counters of fault points that start at zero."""
    monkeypatch.setattr(dcp, "FILE_BYTES", 1)
    monkeypatch.setattr(faults, "_passes", Counter())


def save(store: Store, step: int) -> Path:
    return store.save(
        step,
        {"parameters/a": torch.full((64,), float(step)), "optimizer/a": torch.ones(3)},
        {"step": step},
    )


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process, which a real SIGKILL can end; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(70)
    return os.waitpid(pid, 0)[1]


def assert_intact(run_dir: Path, step: int) -> None:
    checkpoint = open_checkpoint(run_dir)
    assert checkpoint.step == checkpoint.state["step"] == step
    assert checkpoint.tensors()["parameters/a"].tolist() == [float(step)] * 64


@pytest.mark.parametrize(
    ("point", "passing"),
    [(point, 1) for point in SAVE_POINTS] + [("save.before_shard", 2), ("save.after_shard", 2)],
)
def test_a_kill_at_any_point_leaves_the_newest_whole_checkpoint(
    tmp_path, monkeypatch, point, passing
):
    store = Store(tmp_path, keep=1)
    save(store, 1)
    store.close()

    def next_save() -> None:
        monkeypatch.setenv("INFIR2_FAULTS", f"{point}:{passing}")
        monkeypatch.setattr(faults, "_passes", Counter())
        save(Store(tmp_path, keep=1), 2)

    status = in_child(next_save)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    expected = 2 if point in ("save.after_rename", "save.during_retention") else 1
    assert_intact(tmp_path, expected)

    leftovers = [
        entry.name for entry in store.directory.iterdir() if not entry.name.startswith("step-")
    ]
    warnings: list[str] = []
    resumed = Store(tmp_path, keep=1, warn=warnings.append)
    assert resumed.newest().step == expected
    for name in leftovers:
        assert any(name in warning for warning in warnings), "a leftover is removed and named"
    assert any("took over the lock" in warning for warning in warnings)
    save(resumed, 3)
    assert [entry.name for entry in resumed.directory.iterdir()] == ["step-3"]
    assert_intact(tmp_path, 3)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "name", ["__0_0.distcp", "__0_1.distcp", ".metadata", "state.json", "manifest.json"]
)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_taken(tmp_path, name, damage):
    warnings: list[str] = []
    store = Store(tmp_path, keep=2, warn=warnings.append)
    save(store, 1)
    damage(save(store, 2) / name)
    with pytest.raises(CheckpointCorruptError, match=name):
        open_checkpoint(store.directory / "step-2")
    assert store.newest().step == 1
    assert "step-2" in warnings[-1]
    assert name in warnings[-1]
    damage(store.directory / "step-1" / name)
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints verifies") as caught:
        store.newest()
    assert caught.value.exit_code == 3


def test_a_flip_of_any_byte_of_the_manifest_is_found(tmp_path):
    manifest = save(Store(tmp_path), 1) / "manifest.json"
    good = manifest.read_bytes()
    for position in range(len(good)):
        manifest.write_bytes(
            good[:position] + bytes([good[position] ^ 0x01]) + good[position + 1 :]
        )
        with pytest.raises(CheckpointError, match=r"manifest\.json|checkpoints verifies"):
            open_checkpoint(tmp_path, warn=lambda _: None)
    manifest.write_bytes(good)
    assert open_checkpoint(tmp_path).step == 1


def test_full_disk_once_makes_room_and_succeeds(tmp_path, monkeypatch):
    warnings: list[str] = []
    store = Store(tmp_path, keep=3, warn=warnings.append)
    for step in (1, 2, 3):
        save(store, step)
    flip(
        store.directory / "step-3" / "state.json"
    )  # a damaged newest one must not cost the newest good one
    monkeypatch.setattr(faults, "_passes", Counter())
    monkeypatch.setenv("INFIR2_FAULTS", "save.after_shard:2:enospc")
    save(store, 4)
    assert_intact(tmp_path, 4)
    assert 2 in published_steps(store.directory)
    assert 1 not in published_steps(store.directory)
    assert any("errno 28" in warning for warning in warnings)


def test_full_disk_twice_is_an_error_and_harms_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path, keep=2, warn=lambda _: None)
    save(store, 1)
    monkeypatch.setattr(faults, "_passes", Counter())
    monkeypatch.setenv(
        "INFIR2_FAULTS", "save.before_manifest:1:enospc,save.before_manifest:2:enospc"
    )
    with pytest.raises(
        CheckpointError, match=r"checkpoints: step 2 could not be saved .*errno 28 ENOSPC"
    ):
        save(store, 2)
    assert [entry.name for entry in store.directory.iterdir()] == ["step-1"]
    assert_intact(tmp_path, 1)


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    store = Store(tmp_path, warn=lambda _: None)
    save(store, 1)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    monkeypatch.setattr(dcp, "save_tensors", lambda *_: pytest.fail("must not begin to write"))
    with pytest.raises(CheckpointError, match="ENOSPC"):
        save(store, 2)
    assert_intact(tmp_path, 1)


def test_a_vanished_directory_is_an_error_with_its_name(tmp_path):
    warnings: list[str] = []
    store = Store(tmp_path / "run", warn=warnings.append)
    store.directory.rmdir()
    with pytest.raises(
        CheckpointError, match=r"run/checkpoints: step 1 could not be saved .*errno 2 ENOENT"
    ):
        save(store, 1)


NAMESPACE_SCRIPT = """
import subprocess, sys, types
import torch
from infir2.checkpoint import Store, open_checkpoint
from infir2.errors import CheckpointError

run_dir = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", run_dir], check=True)
warnings = []
store = Store(run_dir, keep=3, warn=warnings.append)

def save(step, kilobytes):
    store.save(step, {"a": torch.full((kilobytes, 256), float(step))}, {"step": step})

def content():
    return sorted(entry.name for entry in store.directory.iterdir())

save(1, 1200); save(2, 1200); save(3, 1200)
save(4, 1200)  # the disk is full: 1 and 2 have to go
assert content() == ["step-3", "step-4"], content()
import infir2.checkpoint.store as module
# Disable the check of free space, so that the write itself fails.
module.shutil.disk_usage = lambda path: types.SimpleNamespace(free=2**40)
try:
    save(5, 3600)
    sys.exit("saved on a full disk")
except CheckpointError as error:
    assert "errno 28 ENOSPC" in str(error) and error.exit_code == 3, error
assert content() == ["step-4"], content()
assert open_checkpoint(run_dir).tensors()["a"][0, 0].item() == 4.0
# The open lock file forbids a plain remount.
subprocess.run(["mount", "--bind", run_dir, run_dir], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", run_dir], check=True)
try:
    save(6, 10)
    sys.exit("saved on a read-only disk")
except CheckpointError as error:
    assert "errno 30 EROFS" in str(error), error
assert open_checkpoint(run_dir).step == 4
store.close()
try:
    Store(run_dir)
    sys.exit("opened for writing on a read-only disk")
except CheckpointError as error:
    assert "errno 30" in str(error), error
"""


def test_a_real_full_and_a_real_read_only_disk(tmp_path):
    unshare = ["unshare", "-Urm"]
    try:
        possible = (
            subprocess.run(
                [*unshare, "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True
            ).returncode
            == 0
        )
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("no private mount namespace on this machine")
    result = subprocess.run(
        [*unshare, sys.executable, "-c", NAMESPACE_SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_a_write_that_fails_in_the_middle_of_a_file(tmp_path, monkeypatch):
    """EFBIG from the kernel itself, through RLIMIT_FSIZE in a child."""
    save(Store(tmp_path), 1)

    def limited() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        store = Store(tmp_path, warn=lambda _: None)
        try:
            store.save(2, {"a": torch.zeros(10_000)}, {"step": 2})
        except CheckpointError as error:
            os._exit(0 if f"errno {errno.EFBIG}" in str(error) else 1)
        os._exit(2)

    assert os.waitstatus_to_exitcode(in_child(limited)) == 0
    assert_intact(tmp_path, 1)


def test_a_second_job_is_refused_at_once_and_names_the_first(tmp_path):
    store = Store(tmp_path)
    save(store, 1)

    def second() -> None:
        started = time.monotonic()
        try:
            Store(tmp_path)
        except OutputExistsError as error:
            named = f"pid {os.getppid()} on " in str(error) and "another job uses" in str(error)
            os._exit(0 if named and time.monotonic() - started < 1 else 1)
        os._exit(2)

    assert os.waitstatus_to_exitcode(in_child(second)) == 0
    assert Store(tmp_path).newest().step == 1, "the same process may open its run again"
    assert open_checkpoint(tmp_path).step == 1, "reading needs no lock"
    store.close()


def test_a_dead_job_whose_child_is_alive_is_named(tmp_path):
    """A child that outlives its killed parent keeps the lock; the message names what to end."""
    reader, writer = os.pipe()

    def job() -> None:
        Store(tmp_path).save(1, {}, {})
        store = Store(tmp_path)  # held until the kill
        child = os.fork()
        if child == 0:
            time.sleep(60)
        os.write(writer, f"{child}\n".encode())
        assert store
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(job)
    child = int(os.read(reader, 100))
    try:
        with pytest.raises(OutputExistsError, match="is dead but one of its child processes"):
            Store(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
    assert gone([child])
    assert Store(tmp_path, warn=lambda _: None).newest().step == 1


def test_a_directory_that_cannot_be_synced_after_the_rename_keeps_the_checkpoint(
    tmp_path, monkeypatch
):
    warnings: list[str] = []
    store = Store(tmp_path, warn=warnings.append)
    real = store_module.fsync_directory

    def sync(path: Path) -> None:
        if path == store.directory:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path)

    monkeypatch.setattr(store_module, "fsync_directory", sync)
    save(store, 1)
    assert_intact(tmp_path, 1)
    assert [entry.name for entry in store.directory.iterdir()] == ["step-1"]
    assert "could not be synced" in warnings[0]


def test_the_lock_is_free_after_close_without_a_warning(tmp_path):
    Store(tmp_path).close()
    warnings: list[str] = []
    assert os.waitstatus_to_exitcode(in_child(lambda: Store(tmp_path).close())) == 0
    Store(tmp_path, warn=warnings.append).close()
    assert warnings == []


def test_a_job_in_another_interpreter_is_refused_with_one_sentence(tmp_path):
    script = textwrap.dedent("""
        import sys
        from infir2.checkpoint import Store
        from infir2.errors import UserError
        try:
            Store(sys.argv[1])
        except UserError as error:
            print(error)
            sys.exit(error.exit_code)
    """)
    store = Store(tmp_path)
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    store.close()
    assert result.returncode == 2, result.stderr
    assert len(result.stdout.splitlines()) == 1


FAR_AWAY = '{"host": "far-away", "pid": 7, "started": "2026-01-01 00:00:00"}'


@pytest.mark.timeout(30)
def test_a_lock_is_released_while_the_same_thread_acquires_another(tmp_path, monkeypatch):
    """As when the garbage collector finalizes a store while another one starts."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, read = lock_module.RunLock.acquire(tmp_path / "a", print), lock_module._read_holder
    monkeypatch.setattr(lock_module, "_read_holder", lambda fd: (first.release(), read(fd))[1])
    second = lock_module.RunLock.acquire(tmp_path / "b", print)
    monkeypatch.setattr(lock_module, "_read_holder", read)
    second.release()
    assert not (tmp_path / "a" / lock_module.LOCK).exists()


@pytest.mark.timeout(30)
def test_the_guard_is_free_while_the_thread_of_heartbeats_starts(tmp_path, monkeypatch):
    """The new thread may collect garbage before it runs, and release the lock of another store."""
    (tmp_path / "run").mkdir()
    free, thread_class, guard = [], threading.Thread, lock_module._held_guard

    def release_another() -> None:
        free.append(guard.acquire(timeout=2))
        if free[-1]:
            guard.release()

    class Starting(thread_class):
        def start(self) -> None:
            helper = thread_class(target=release_another)
            helper.start()
            helper.join()
            super().start()

    monkeypatch.setattr(lock_module.threading, "Thread", Starting)
    lock_module.RunLock.acquire(tmp_path / "run", print).release()
    assert free == [True]


def test_heartbeats_of_another_host_are_respected_and_a_silent_host_is_taken_over(
    tmp_path, monkeypatch
):
    """Where a file system does not share locks between hosts, only heartbeats show a holder."""
    monkeypatch.setattr(lock_module, "WATCH_SECONDS", 30.0)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / ".lock"
    path.write_text(FAR_AWAY)
    refused = threading.Event()
    heartbeats = threading.Thread(
        target=lambda: [os.utime(path) for _ in iter(lambda: refused.wait(0.5), True)]
    )
    heartbeats.start()
    warnings: list[str] = []
    with pytest.raises(OutputExistsError, match=r"another job uses.*pid 7 on far-away"):
        Store(tmp_path, warn=warnings.append)
    refused.set()
    heartbeats.join()
    assert "for a heartbeat" in warnings[0], "the warning comes before the wait"
    monkeypatch.setattr(lock_module, "WATCH_SECONDS", 1.0)
    started = time.monotonic()
    Store(tmp_path, warn=warnings.append).close()
    assert 1.0 <= time.monotonic() - started < 5
    assert "took over the lock" in warnings[-1]
    assert "far-away" in warnings[-1]
    path.write_text(FAR_AWAY)
    old = time.time() - 2 * lock_module.STALE_SECONDS
    os.utime(path, (old, old))
    num_before = len(warnings)
    Store(tmp_path, warn=warnings.append).close()
    assert not [text for text in warnings[num_before:] if "waiting" in text], (
        "a stale lock is taken over without waiting"
    )


def test_a_lock_that_the_file_server_keeps_for_a_dead_host_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "WATCH_SECONDS", 0.5)
    path = tmp_path / ".lock"
    path.write_text(FAR_AWAY)
    with path.open() as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        started = time.monotonic()
        threading.Timer(1.5, fcntl.flock, [kept, fcntl.LOCK_UN]).start()
        Store(tmp_path, warn=lambda _: None).close()
        assert 1.5 <= time.monotonic() - started < 5
        path.write_text(FAR_AWAY)
        fcntl.flock(kept, fcntl.LOCK_EX)
        monkeypatch.setattr(lock_module, "STALE_SECONDS", 1.0)
        with pytest.raises(OutputExistsError, match="another job uses"):
            Store(tmp_path, warn=lambda _: None)


def test_a_holder_sends_heartbeats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    store = Store(tmp_path)
    os.utime(tmp_path / ".lock", (0, 0))
    deadline = time.monotonic() + 5
    while (tmp_path / ".lock").stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / ".lock").stat().st_mtime > 0
    store.close()


def test_leftovers_of_any_host_are_removed_and_named(tmp_path):
    directory, warnings = tmp_path / "checkpoints", []
    leftovers = [
        directory / f".tmp-step-3-{host}-99-aa" for host in ("far-away", os.uname().nodename)
    ]
    for path in leftovers:
        path.mkdir(parents=True)
    (unrelated := directory / ".tmp-notes").mkdir()
    Store(tmp_path, warn=warnings.append).close()
    assert list(directory.iterdir()) == [unrelated]
    assert all(any(str(path) in warning for warning in warnings) for path in leftovers)


@pytest.mark.parametrize(
    "value",
    [
        "save.nowhere:1",
        "save.after_shard",
        "save.after_shard:0",
        "save.after_shard:x",
        "train.step:1:explode",
    ],
)
def test_a_wrong_fault_variable_is_refused(monkeypatch, value):
    monkeypatch.setenv("INFIR2_FAULTS", value)
    with pytest.raises(ConfigError, match="INFIR2_FAULTS"):
        faults.fault("train.step")


def test_the_term_action_is_a_real_signal(monkeypatch):
    monkeypatch.setenv("INFIR2_FAULTS", "train.step:2:term")
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        faults.fault("train.step")
        assert received == []
        faults.fault("train.step")
        faults.fault("train.step")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [1]


def test_every_fault_point_in_the_package_is_declared_and_every_declared_one_exists():
    import re

    source = "\n".join(
        path.read_text()
        for path in Path(faults.__file__).parent.rglob("*.py")
        if path != Path(faults.__file__)
    )
    used = set(re.findall(r'\bfault\("([^"]+)"\)', source))
    assert used == set(faults.POINTS)
