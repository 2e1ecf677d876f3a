"""Two jobs and one run directory on a file system without `flock`: exactly one gets it (F5)."""

import errno
import fcntl
import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from infir2.checkpoint import Store, claim
from infir2.checkpoint import lock as lock_module
from infir2.checkpoint.claim import Claim, process_start
from infir2.errors import OutputExistsError

HELD, REFUSED, FAILED = b"h", b"r", b"f"


@pytest.fixture(autouse=True, params=[errno.ENOLCK, errno.EOPNOTSUPP])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


class Jobs:
    """Processes that start a store at the same instant and hold it until `end`."""

    def __init__(self, run_dir: Path, number: int) -> None:
        self._run_dir = run_dir
        (start, self._start), (self._outcomes, outcomes) = os.pipe(), os.pipe()
        self._pids = [self._fork(start, outcomes) for _ in range(number)]
        os.close(start)
        os.close(outcomes)

    def _fork(self, start: int, outcomes: int) -> int:
        pid = os.fork()
        if pid == 0:
            os.close(self._start)
            os.read(start, 1)  # until the parent closes its end
            try:
                store = Store(self._run_dir, warn=lambda _: None)
                os.write(outcomes, HELD)
                signal.pause()
                store.close()
            except OutputExistsError:
                os.write(outcomes, REFUSED)
            except BaseException:
                os.write(outcomes, FAILED)
            os._exit(0)
        return pid

    def outcomes(self) -> bytes:
        """Start them; what each got, sorted."""
        os.close(self._start)
        received = b"".join(os.read(self._outcomes, 1) for _ in self._pids)
        return bytes(sorted(received))

    def kill(self) -> None:
        os.close(self._outcomes)
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [2, 5])
def test_exactly_one_of_jobs_that_start_at_one_instant_holds_the_directory(
    tmp_path: Path, number: int
) -> None:
    """In one directory: every trial but the first finds the lock and the claim of a killed job."""
    for trial in range(40 if number == 2 else 10):
        run_dir = tmp_path / "run" if trial % 2 else tmp_path / f"new-{trial}"
        jobs = Jobs(run_dir, number)
        assert jobs.outcomes() == HELD + REFUSED * (number - 1), f"trial {trial}"
        jobs.kill()
        assert len(list(run_dir.glob(".lock-*"))) == 1, "the winner removes claims of the dead"


def test_a_store_that_is_closed_leaves_nothing_of_its_claim(tmp_path: Path) -> None:
    warnings: list[str] = []
    store = Store(tmp_path / "run", warn=warnings.append)
    store.save(1, {}, {})
    assert "its file system has no locks" in warnings[0]
    (name,) = (path.name for path in (tmp_path / "run").glob(".lock-*"))
    assert str(os.getpid()) in name
    store.close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "checkpoints"]
    Store(tmp_path / "new", warn=warnings.append).close()
    assert not (tmp_path / "new").exists(), "a start that wrote nothing leaves nothing"


def name_of(pid: int, start: int, host: str = "", token: str = "0" * 16) -> str:
    return f".lock-{token}-{pid}-{start}-{host or claim._host()}"


def test_the_number_of_a_dead_process_that_another_one_has_is_no_holder(tmp_path: Path) -> None:
    """Of the claim and of the lock file: the processes differ in when they were started."""
    pid = os.getppid()
    started = process_start(pid)
    assert started is not None
    (tmp_path / name_of(pid, started - 1)).write_text("1")
    holder = {"host": os.uname().nodename, "pid": pid, "started": "?", "process_start": 1}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    Store(tmp_path, warn=lambda _: None).close()
    (tmp_path / name_of(pid, started)).write_text("1")
    with pytest.raises(OutputExistsError, match="another job uses this run directory"):
        Store(tmp_path, warn=lambda _: None)
    (tmp_path / name_of(pid, started)).unlink()
    holder["process_start"] = started
    (tmp_path / ".lock").write_text(json.dumps(holder))
    with pytest.raises(OutputExistsError, match=f"another job uses .*pid {pid}"):
        Store(tmp_path, warn=lambda _: None)


@pytest.mark.parametrize(("held", "token"), [*itertools.product(["", "1"], ["0" * 16, "f" * 16])])
def test_heartbeats_of_another_host_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str, token: str
) -> None:
    """A silent claim is that of a dead job. A live one wins, unless it is only deciding and has the
    larger token: then this job waits until the other one, which sees it, gives up."""
    path = tmp_path / name_of(1, 1, "abc", token)
    path.write_text(held)
    won = Claim.acquire(tmp_path, silent_seconds=0.3)
    assert won is not None
    won.release()
    assert not path.exists()

    path.write_text(held)
    stopped, started = threading.Event(), time.monotonic()

    def beat() -> None:
        while not stopped.wait(0.05):
            if not held and token[0] == "f" and time.monotonic() - started > 1:
                path.unlink(missing_ok=True)
                return
            os.utime(path)

    other = threading.Thread(target=beat)
    other.start()
    won = Claim.acquire(tmp_path, silent_seconds=0.5)
    stopped.set()
    other.join()
    if held or token[0] == "0":
        assert won is None
    else:
        assert won is not None
        assert time.monotonic() - started > 1
        won.release()


def test_a_job_that_stood_still_until_it_counted_as_dead_does_not_win(tmp_path: Path) -> None:
    own = Claim(tmp_path)
    own.path.unlink()
    assert not own._win([])
    own.release()


def test_a_holder_sends_heartbeats_for_its_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    store = Store(tmp_path, warn=lambda _: None)
    (path,) = tmp_path.glob(".lock-*")
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 5
    while path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.stat().st_mtime > 0
    store.close()


def test_a_zombie_holds_nothing(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert process_start(pid) is None
    os.waitpid(pid, 0)
    assert process_start(os.getpid()) is not None
