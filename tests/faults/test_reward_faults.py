"""F17: a reward check that hangs, dies or leaves processes behind costs its own item only."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stages import gone

from infir2.errors import ConfigError
from infir2.verify.pool import Outcome, Pool
from infir2.verify.process import living_descendants

SECONDS = 2.0  # of items that hang
PATIENCE = 60.0  # of others, on a busy machine


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    before = set(living_descendants(os.getpid()))
    pool = Pool("poison_checks:check", size=4, memory_bytes=1 << 28)
    yield pool
    pool.close()
    assert worker_ids(pool) == []
    assert set(living_descendants(os.getpid())) <= before
    assert zombies() == []


def worker_ids(pool: Pool) -> list[int]:
    """Ids of the living workers."""
    return [worker.process.pid for worker in pool._workers if worker.process.poll() is None]


def zombies() -> list[str]:
    listing = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "stat=,args="], capture_output=True, text=True
    ).stdout
    return [line for line in listing.splitlines() if line.startswith("Z")]


def one(pool: Pool, kind: str, value: object = None) -> Outcome:
    return pool.run([(kind, value)], PATIENCE)[0]


def test_four_poison_items_among_64_cost_only_themselves(pool: Pool, tmp_path: Path) -> None:
    poison = {3: "spin_in_c", 17: "swallow_exceptions", 18: "fork_and_hang", 40: "eat_memory"}
    items = [
        (poison.get(i, "good"), str(tmp_path / "pids") if poison.get(i) == "fork_and_hang" else i)
        for i in range(64)
    ]
    outcomes = pool.run(items, SECONDS)
    assert {outcomes[i].reason for i in (3, 17, 18)} == {"timeout"}
    assert outcomes[40].reason in ("oom", "timeout")
    assert [(o.value, o.reason) for i, o in enumerate(outcomes) if i not in poison] == [
        (i, "") for i in range(64) if i not in poison
    ]
    daemons = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(daemons) == 5
    assert gone(daemons)


@pytest.mark.parametrize(
    ("kind", "reason", "value"),
    [
        ("huge_output", "", "printed"),
        ("delete_working_directory", "error", None),
        ("leave_quietly", "killed", None),
        ("crash", "killed", None),
        ("eat_memory", "oom", None),
        ("nonsense", "error", None),
        ("huge_reply", "killed", None),
    ],
)
def test_each_kind_of_failure_has_its_reason_and_the_next_item_is_fine(
    pool: Pool, kind: str, reason: str, value: object
) -> None:
    outcomes = pool.run([(kind, None), ("good", 1)], PATIENCE)
    assert [(o.reason, o.value) for o in outcomes] == [(reason, value), ("", 1)]
    assert (one(pool, "good", 2).value, one(pool, kind).reason) == (2, reason)


def test_processes_left_by_a_check_that_returned_are_killed(pool: Pool, tmp_path: Path) -> None:
    assert one(pool, "fork_and_return", str(tmp_path / "pids")).value == "done"
    assert gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])
    assert one(pool, "good", 1).value == 1


def test_a_batch_has_its_own_limit(pool: Pool) -> None:
    pool.run([("good", i) for i in range(4)], PATIENCE)
    began = time.monotonic()
    items = [("swallow_exceptions", None)] * 40 + [("good", 1)]
    outcomes = pool.run(items, 10.0, batch_seconds=1.0)
    assert time.monotonic() - began < 50, "forty time limits on four workers would take 100 s"
    assert {o.reason for o in outcomes[:40]} == {"timeout"}
    assert len(outcomes) == 41


def test_slow_items_take_no_time_from_the_ones_behind_them(pool: Pool) -> None:
    items = [("swallow_exceptions", None)] * 8 + [("good", i) for i in range(8)]
    outcomes = pool.run(items, SECONDS)
    assert {outcome.reason for outcome in outcomes[:8]} == {"timeout"}
    assert [outcome.value for outcome in outcomes[8:]] == list(range(8))


def test_a_worker_killed_while_idle_is_replaced(pool: Pool) -> None:
    pool.run([("good", i) for i in range(8)], PATIENCE)
    for pid in worker_ids(pool):
        os.kill(pid, signal.SIGKILL)
    assert gone(worker_ids(pool))
    outcomes = pool.run([("good", i) for i in range(8)], PATIENCE)
    assert [outcome.value for outcome in outcomes] == list(range(8))


def test_threads_share_the_pool(pool: Pool) -> None:
    results: dict[int, list[object]] = {}

    def work(n: int) -> None:
        results[n] = [o.value for o in pool.run([("good", (n, i)) for i in range(20)], PATIENCE)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [[n, i] for i in range(20)] for n in range(8)}


def test_a_check_that_cannot_be_imported_is_the_users_error() -> None:
    pool = Pool("no_such_module:check", size=2)
    with pytest.raises(ConfigError, match="no_such_module"):
        pool.run([("good", 1)], PATIENCE)
    pool.close()


@pytest.mark.parametrize("busy", [True, False])
def test_workers_die_with_a_parent_that_is_killed(busy: bool) -> None:
    last = '[("swallow_exceptions", None)] * 2, 1.0' if busy else '[("good", 1)] * 2, 1.0'
    program = f"""
import json, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from infir2.verify.pool import Pool
pool = Pool("poison_checks:check", size=2)
pool.run([("good", 1)] * 20, 60.0)
thread = threading.Thread(target=pool.run, args=({last}), daemon=True)
thread.start()
time.sleep(0.3)
print(json.dumps([worker.process.pid for worker in pool._workers]), flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = json.loads(parent.stdout.readline())
    assert workers
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(workers, within_seconds=PATIENCE)


def test_a_forked_child_neither_uses_nor_kills_its_parents_workers() -> None:
    from infir2.verify.math import check_math, close_workers, shared_pool

    assert check_math("\\boxed{1/2}", "0.5", seconds=20).correct
    workers = worker_ids(shared_pool())
    child = os.fork()
    if child == 0:
        own = check_math("\\boxed{1/4}", "0.25", seconds=20).correct and not set(
            worker_ids(shared_pool())
        ) & set(workers)
        close_workers()
        os._exit(0 if own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert worker_ids(shared_pool()) == workers
    assert check_math("\\boxed{1/8}", "0.125", seconds=20).correct
    close_workers()
    assert gone(workers)
