"""Run checks in processes that can be killed, so that each has a hard limit of wall-clock time.

The workers are plain subprocesses (not forks: a trainer has threads) that import neither torch nor
transformers. They start on first use, live until the pool is closed, and are replaced after a kill.
When this process dies for any reason, an idle worker reads the end of its input, and the kernel's
timer ends a busy one (worker.py).
"""

import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2.errors import ConfigError
from infir2.verify.process import Channel, kill_tree

KEYS = re.compile(
    r"INFIR2_\w*KEY|\w*(API_KEY|TOKEN|SECRET|PASSWORD)$|AWS_"
)  # variables that hold a secret
START_SECONDS, START_ATTEMPTS = 120.0, 3
REMEDY = "reinstall infir2 with its dependencies"
UNLIMITED_SECONDS = threading.TIMEOUT_MAX / 2  # a queue accepts no infinity


@dataclass(frozen=True)
class Outcome:
    """The value of one check, or why there is none: "timeout", "error", "oom" or "killed"."""

    value: Any = None
    reason: str = ""
    detail: str = ""
    seconds: float = 0.0


class _Worker:
    """A worker process and the socket that is its standard input."""

    def __init__(self, function: str, memory_bytes: int, has_keys: bool) -> None:
        root = str(Path(__file__).resolve().parents[2])
        search_path = os.pathsep.join([root, *(entry for entry in sys.path if entry)])
        parent_end, child_end = socket.socketpair()
        self.channel, self.is_ready = Channel(parent_end), False
        command = [sys.executable, "-P", "-m", "infir2.verify.worker", function, str(memory_bytes)]
        with child_end:
            self.process = subprocess.Popen(
                command,
                stdin=child_end.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(has_keys) | {"PYTHONPATH": search_path},
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill the process with its descendants, reap it, and close the socket."""
        kill_tree(self.process)
        self.channel.socket.close()


class Pool:
    """At most `size` workers that call `function` ("module:name"), shared by all threads.

    Its arguments and value must be JSON-serializable. `memory_bytes` bounds a worker's address
    space; 0 means no bound. `remedy` is what to do if it cannot be imported. Only with `has_keys`
    does its environment have this process's keys.
    """

    def __init__(
        self,
        function: str,
        size: int,
        memory_bytes: int = 1 << 30,
        remedy: str = REMEDY,
        has_keys: bool = False,
    ) -> None:
        self._function, self._size, self._memory_bytes = function, size, memory_bytes
        self._remedy, self._has_keys = remedy, has_keys
        self._workers: set[_Worker] = set()
        # The most recently used worker comes first; None stands for one that is not started yet.
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)

    def run(
        self,
        items: Sequence[Sequence[Any]],
        item_seconds: float,
        batch_seconds: float = UNLIMITED_SECONDS,
    ) -> list[Outcome]:
        """Outcomes in the order of `items` (argument lists).

        Every item has its own `item_seconds`, however slow the ones before it are. An item that
        exceeds them is a timeout, and so is one that does not start within `batch_seconds`, if the
        caller sets them. Raises ConfigError if workers cannot start.
        """
        deadline = time.monotonic() + batch_seconds
        if len(items) == 1:  # to start a thread takes longer than many an item
            return [self._check(items[0], item_seconds, deadline)]
        with ThreadPoolExecutor(max_workers=self._size) as threads:
            checks = [threads.submit(self._check, item, item_seconds, deadline) for item in items]
            try:
                return [check.result() for check in checks]
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    def start(self) -> None:
        """Start one worker. Raises ConfigError if it cannot start."""
        worker = self._idle.get()
        try:
            worker = self._ready(worker, time.monotonic() + UNLIMITED_SECONDS)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kill and reap every worker; checks running in other threads get the reason "killed"."""
        for worker in list(self._workers):
            self._kill(worker)

    def _check(self, arguments: Sequence[Any], seconds: float, deadline: float) -> Outcome:
        """Check one item in this thread; kill the worker if it cannot be reused."""
        expired = Outcome(reason="timeout", detail="the batch's time limit expired")
        try:
            worker = self._idle.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return expired
        spare = None
        try:
            worker = self._ready(worker, deadline)
            start = time.monotonic()
            if worker is None or start >= deadline:
                return expired
            worker.channel.send({"arguments": list(arguments), "seconds": seconds}, seconds)
            limit = min(start + seconds, deadline)
            reply = worker.channel.receive(min(start + seconds / 2, limit))
            if reply == {}:  # likely to be killed: the next item shall not wait for a replacement
                spare = self._spawn()
                reply = worker.channel.receive(limit)
            elapsed = time.monotonic() - start
            if not reply or reply.get("unclean") or reply.get("reason") == "oom":
                self._kill(worker)
                worker, spare = spare, None
            return _outcome(reply, elapsed)
        except BaseException:  # such as Ctrl-C: the reply would be taken for that of the next item
            if worker is not None:
                self._kill(worker)
            worker = None
            raise
        finally:
            if spare is not None:
                self._kill(spare)
            self._idle.put(worker)

    def _ready(self, worker: _Worker | None, deadline: float) -> _Worker | None:
        """That worker if it is ready in time, or else a new one; None if the deadline passes."""
        if worker is not None and worker.process.poll() is not None:
            self._kill(worker)
            worker = None
        return worker if worker is not None and worker.is_ready else self._started(worker, deadline)

    def _spawn(self) -> _Worker:
        worker = _Worker(self._function, self._memory_bytes, self._has_keys)
        self._workers.add(worker)
        return worker

    def _started(self, worker: _Worker | None, deadline: float) -> _Worker | None:
        """`worker` or a new one when it is ready; None if the deadline passes first."""
        cause = ""
        for _ in range(START_ATTEMPTS):
            worker = worker or self._spawn()
            reply = worker.channel.receive(min(time.monotonic() + START_SECONDS, deadline))
            if reply and "ready" in reply:
                worker.is_ready = True
                return worker
            self._kill(worker)
            worker = None
            if time.monotonic() >= deadline:
                return None
            cause = (reply or {}).get("failed", "ended before it was ready")
            if reply == {}:
                cause = f"not ready within {START_SECONDS:.0f} s"
        raise ConfigError(f"the process that checks answers cannot start ({cause}); {self._remedy}")

    def _kill(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.discard(worker)


def _environment(has_keys: bool) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if has_keys or not KEYS.match(name)}


def _outcome(reply: dict[str, Any] | None, seconds: float) -> Outcome:
    """What a worker's reply says: {} if none came in time, None if the process died."""
    if reply == {}:
        return Outcome(reason="timeout", detail=f"stopped after {seconds:.1f} s", seconds=seconds)
    reply = reply or {"reason": "killed", "detail": "its process died"}
    return Outcome(reply.get("value"), reply.get("reason", ""), reply.get("detail", ""), seconds)
