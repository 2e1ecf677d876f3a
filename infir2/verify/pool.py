"""Run checks in processes that can be killed: a hard wall clock for each, whatever the check does.

The workers are plain subprocesses (no fork: a trainer has threads) that import neither torch nor transformers. They
start on first use, live until the pool is closed, and are replaced after a kill. When this process dies, however it dies,
an idle worker sees its input end and a busy one is ended by the kernel's timer (worker.py).
"""

import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2.errors import ConfigError
from infir2.verify.process import Channel, kill_tree

START_SECONDS, START_ATTEMPTS = 120.0, 3


@dataclass(frozen=True)
class Outcome:
    """What became of one check: its value, or the reason ("timeout", "error", "oom", "killed") why there is none."""

    value: Any = None
    reason: str = ""
    detail: str = ""
    seconds: float = 0.0


class _Worker:
    """One process, and the socket that is its standard input and our way to it."""

    def __init__(self, function: str, memory_bytes: int) -> None:
        root = str(Path(__file__).resolve().parents[2])
        variables = os.environ | {
            "PYTHONPATH": os.pathsep.join([root, *(place for place in sys.path if place)])
        }
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        words = [sys.executable, "-P", "-m", "infir2.verify.worker", function, str(memory_bytes)]
        with theirs:
            self.process = subprocess.Popen(
                words,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=variables,
                start_new_session=True,
            )

    def kill(self) -> None:
        kill_tree(self.process)
        self.channel.socket.close()


class Pool:
    """At most `size` workers that call `function` ("module:name", arguments and value JSON-able).

    Thread-safe: calls share the workers. `memory_bytes` bounds a worker's address space (0: no bound).
    """

    def __init__(self, function: str, size: int, memory_bytes: int = 1 << 30) -> None:
        self._function, self._size, self._memory_bytes = function, size, memory_bytes
        self._workers: set[_Worker] = set()
        self._idle: queue.LifoQueue[_Worker | None] = (
            queue.LifoQueue()
        )  # the warmest first; None may be started
        for _ in range(size):
            self._idle.put(None)

    def run(
        self, items: Sequence[Sequence[Any]], item_seconds: float, batch_seconds: float
    ) -> list[Outcome]:
        """Outcomes in the order of `items` (argument lists). An item over its time, or not begun in the batch's, is a timeout.

        Raises ConfigError when workers cannot start.
        """
        last = time.monotonic() + batch_seconds
        with ThreadPoolExecutor(max_workers=self._size) as threads:
            checks = [threads.submit(self._check, item, item_seconds, last) for item in items]
            try:
                return [check.result() for check in checks]
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    def close(self) -> None:
        """Kill and reap every worker; a check that is under way in another thread gets the reason "killed"."""
        for worker in list(self._workers):
            self._kill(worker)

    def _check(self, arguments: Sequence[Any], seconds: float, last: float) -> Outcome:
        """One item, in a thread of its own: wait for a worker, ask it, and kill it unless it is as good as before."""
        try:
            worker = self._idle.get(timeout=max(0.0, last - time.monotonic()))
        except queue.Empty:
            return Outcome(reason="timeout", detail="the batch's time was over")
        try:
            if worker is None or worker.process.poll() is not None:
                worker = self._started(worker, last)
            began = time.monotonic()
            if worker is None or began >= last:
                return Outcome(reason="timeout", detail="the batch's time was over")
            worker.channel.send({"arguments": list(arguments), "seconds": seconds}, seconds)
            reply = worker.channel.receive(min(began + seconds, last))
            taken = time.monotonic() - began
            if not reply or reply.get("unclean") or reply.get("reason") == "oom":
                self._kill(worker)
                worker = None
            if reply == {}:
                return Outcome(
                    reason="timeout", detail=f"stopped after {taken:.1f} s", seconds=taken
                )
            reply = reply or {"reason": "killed", "detail": "its process died"}
            return Outcome(
                reply.get("value"), reply.get("reason", ""), reply.get("detail", ""), taken
            )
        finally:
            self._idle.put(worker)

    def _started(self, dead: _Worker | None, last: float) -> _Worker | None:
        """A new worker, ready to be asked; None when the batch's time is over before it is."""
        if dead is not None:
            self._kill(dead)
        why = ""
        for _ in range(START_ATTEMPTS):
            worker = _Worker(self._function, self._memory_bytes)
            self._workers.add(worker)
            said = worker.channel.receive(min(time.monotonic() + START_SECONDS, last))
            if said and "ready" in said:
                return worker
            self._kill(worker)
            if time.monotonic() >= last:
                return None
            why = (
                f"not ready within {START_SECONDS:.0f} s"
                if said == {}
                else (said or {}).get("failed", "ended before it was ready")
            )
        raise ConfigError(
            f"the process that checks answers cannot start ({why}); reinstall infir2 with its dependencies"
        )

    def _kill(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.discard(worker)
