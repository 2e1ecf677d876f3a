"""Run checks in processes that can be killed: a hard wall clock for each, whatever the check does.

The workers are plain subprocesses (no fork: a trainer has threads) that import neither torch nor transformers. They
start on first use, live until the pool is closed, and are replaced after a kill. When this process dies, however it dies,
an idle worker sees its input end and a busy one is ended by the kernel's timer (worker.py).
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2.errors import ConfigError
from infir2.verify.process import kill_tree

START_SECONDS = 120.0
MAX_REPLY_BYTES = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What became of one check: its value, or the reason ("timeout", "error", "oom", "killed") why there is none."""

    value: Any = None
    reason: str = ""
    detail: str = ""
    seconds: float = 0.0


class _Worker:
    """One process and the item that it works on. `index` is the item's place in the batch, None without one."""

    def __init__(self, function: str, memory_bytes: int) -> None:
        self.arguments = [sys.executable, "-P", "-m", "infir2.verify.worker", function, str(memory_bytes)]
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.index: int | None = None
        self.began = 0.0
        self.deadline = 0.0
        self.received = b""

    def start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *(place for place in sys.path if place)])}
        self.process = subprocess.Popen(
            self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True, bufsize=0
        )
        self.ready, self.index, self.received = False, None, b""
        self.deadline = time.monotonic() + START_SECONDS

    def send(self, index: int, arguments: Sequence[Any], seconds: float) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.ready
        self.index, self.began = index, time.monotonic()
        self.deadline = self.began + seconds
        with suppress(BrokenPipeError):  # seen as the end of its replies
            self.process.stdin.write(json.dumps({"arguments": list(arguments), "seconds": seconds}).encode() + b"\n")

    def fileno(self) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def receive(self) -> dict | None:
        """One reply, {} while there is only part of one, None when the worker has ended or talks nonsense."""
        chunk = os.read(self.fileno(), 1 << 16)
        self.received += chunk
        if not chunk or len(self.received) > MAX_REPLY_BYTES:
            return None
        line, newline, rest = self.received.partition(b"\n")
        if not newline:
            return {}
        self.received = rest
        try:
            reply = json.loads(line)
        except ValueError:
            return None
        return reply if isinstance(reply, dict) and reply else None

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        if self.process is not None:
            kill_tree(self.process)
            self.forget()

    def forget(self) -> None:
        """Close the pipes without touching the process (which may belong to the parent of this fork)."""
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                pipe.close()
            self.process.returncode = self.process.returncode if self.process.returncode is not None else 0
        self.process, self.ready, self.index = None, False, None


class Pool:
    """At most `size` workers that call `function` ("module:name", arguments and value JSON-able).

    Thread-safe: calls share the workers. `memory_bytes` bounds a worker's address space (0: no bound).
    """

    def __init__(self, function: str, size: int, memory_bytes: int = 1 << 30) -> None:
        self._idle = [_Worker(function, memory_bytes) for _ in range(size)]
        self._workers = list(self._idle)
        self._condition = threading.Condition()
        self._closed = False

    def run(self, items: Sequence[Sequence[Any]], item_seconds: float, batch_seconds: float) -> list[Outcome]:
        """Outcomes in the order of `items` (argument lists). An item over its time, or not begun in the batch's, is a timeout.

        Raises ConfigError when workers cannot start.
        """
        if not items:
            return []
        workers = self._acquire(len(items))
        batch = _Batch(items, item_seconds, time.monotonic() + batch_seconds)
        try:
            while batch.unfinished:
                batch.advance(workers)
        finally:
            for worker in workers:
                if worker.index is not None:
                    worker.kill()
            self._release(workers)
        return [outcome for outcome in batch.outcomes if outcome is not None]

    def process_ids(self) -> list[int]:
        """Ids of the living workers."""
        return [worker.process.pid for worker in self._workers if worker.process is not None and worker.alive()]

    def close(self) -> None:
        """Kill and reap every worker; batches of other threads get 5 s to end first."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: len(self._idle) == len(self._workers), timeout=5.0)
        for worker in self._workers:
            worker.kill()

    def forget(self) -> None:
        """Drop the workers without killing them: for a forked child, whose parent goes on using them."""
        for worker in self._workers:
            worker.forget()

    def _acquire(self, wanted: int) -> list[_Worker]:
        with self._condition:
            self._condition.wait_for(lambda: bool(self._idle) or self._closed)
            assert not self._closed, "the pool is closed"
            self._idle.sort(key=lambda worker: not worker.ready)
            taken, self._idle = self._idle[:wanted], self._idle[wanted:]
            return taken

    def _release(self, workers: list[_Worker]) -> None:
        with self._condition:
            self._idle += workers
            self._condition.notify_all()


class _Batch:
    """The items of one call to `Pool.run`."""

    def __init__(self, items: Sequence[Sequence[Any]], item_seconds: float, deadline: float) -> None:
        self.items, self.item_seconds, self.deadline = items, item_seconds, deadline
        self.waiting = deque(range(len(items)))
        self.outcomes: list[Outcome | None] = [None] * len(items)
        self.unfinished = len(items)
        self.failed_starts = 0

    def advance(self, workers: list[_Worker]) -> None:
        """Hand out items, wait for the next reply or deadline, and take what has come."""
        for worker in workers:
            if self.waiting and worker.index is None:
                self._occupy(worker)
        busy = [worker for worker in workers if worker.index is not None or (worker.process is not None and not worker.ready)]
        now = time.monotonic()
        wait = max(0.0, min([self.deadline, *(worker.deadline for worker in busy)]) - now)
        poll = select.poll()
        by_descriptor = {worker.fileno(): worker for worker in busy}
        for descriptor in by_descriptor:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(wait * 1000 + 1):
            self._take(by_descriptor[descriptor])
        self._expire(busy)

    def _occupy(self, worker: _Worker) -> None:
        if not worker.alive():
            worker.kill()
            worker.start()
        elif worker.ready:
            index = self.waiting.popleft()
            worker.send(index, self.items[index], self.item_seconds)

    def _take(self, worker: _Worker) -> None:
        reply = worker.receive()
        if reply == {}:
            return
        if worker.ready and worker.index is not None:
            self._finish(worker, reply if reply is not None else {"reason": "killed", "detail": "its process died"})
            if reply is None or reply.get("unclean") or reply.get("reason") == "oom":
                worker.kill()
        elif reply is not None and "ready" in reply:
            worker.ready = True
        else:
            self._failed_start(worker, reply["failed"] if reply else "it ended before it was ready")

    def _expire(self, busy: list[_Worker]) -> None:
        now = time.monotonic()
        for worker in busy:
            if worker.index is not None and now >= min(worker.deadline, self.deadline):
                self._finish(worker, {"reason": "timeout", "detail": f"stopped after {now - worker.began:.1f} s"})
                worker.kill()
            elif worker.process is not None and not worker.ready and now >= worker.deadline:
                self._failed_start(worker, f"it was not ready within {START_SECONDS:.0f} s")
        while self.waiting and now >= self.deadline:
            self._record(self.waiting.popleft(), Outcome(reason="timeout", detail="the batch's time was over"))

    def _failed_start(self, worker: _Worker, why: str) -> None:
        worker.kill()
        self.failed_starts += 1
        if self.failed_starts >= 3:
            raise ConfigError(f"the process that checks answers cannot start ({why}); reinstall infir2 with its dependencies")

    def _finish(self, worker: _Worker, reply: dict) -> None:
        assert worker.index is not None
        seconds = time.monotonic() - worker.began
        self._record(worker.index, Outcome(reply.get("value"), reply.get("reason", ""), reply.get("detail", ""), seconds))
        worker.index = None

    def _record(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        self.unfinished -= 1
