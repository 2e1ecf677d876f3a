"""Jails for programs that a policy wrote: start one, talk to it, end it with everything it started.

Level "namespaces" (default): user/mount/pid/net/ipc namespaces, a root of read-only interpreter libraries, a tmpfs for
files, no privileges, rlimits. It shares the kernel with this machine: against a kernel exploit use a virtual machine.
Level "process": rlimits, an empty environment and a temporary directory, with your own user's rights. It is for machines
without namespaces and programs you trust, and is never chosen silently.
"""

import glob
import json
import math
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from infir2.errors import ConfigError
from infir2.verify import jail, plain, walls
from infir2.verify.process import Channel, kill_tree

START_SECONDS = 30.0


def _boot_text() -> str:
    """The program that `python -c` starts: plain, walls and jail as modules of their names, without files."""
    texts = [("infir2", ""), ("infir2.verify", "")]
    texts += [
        (module.__name__, Path(str(module.__file__)).read_text()) for module in (plain, walls, jail)
    ]
    return f"""
import sys, types
for name, text in {texts!r}:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
module.main()
"""


_BOOT_TEXT = _boot_text()
_REMEDY = (
    "allow unprivileged user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1, "
    "kernel.apparmor_restrict_unprivileged_userns=0), in a container add CAP_SYS_ADMIN or seccomp=unconfined, "
    "or choose level 'process' if you trust the programs"
)


@dataclass(frozen=True)
class Limits:
    """What a program may use. `seconds` of wall clock for one test (an assert-style test, a call, or a run on one input)."""

    seconds: float = 6.0
    total_seconds: float = 60.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 64 << 10
    file_bytes: int = 16 << 20
    processes: int = 16
    level: Literal["namespaces", "process"] = "namespaces"


class JailError(ConfigError):
    """Programs cannot be run safely here. Never a statement about a program."""


class JailBrokenError(Exception):
    """One jail broke down (start, reaping); the item may be tried again."""


def libraries() -> list[str]:
    """Directories that a jail shows read-only (installed packages inside them are covered): standard and shared libraries."""
    wanted = [
        str(Path(os.__file__).resolve().parents[1]),
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
    ]
    return sorted({path for path in wanted if os.path.isdir(path)})


class Cell:
    """One jailed interpreter, ready for one request. A context manager; leaving it ends and reaps every process inside.

    `stdin` is what the program reads; `peer` a socket that the process inside gets (an examiner's way to the program).
    Raises JailError when this machine cannot make a jail of that level, JailBrokenError when this one did not start.
    """

    def __init__(
        self, limits: Limits, stdin: bytes = b"", peer: socket.socket | None = None
    ) -> None:
        if sys.platform != "linux":
            raise JailError("programs can be checked on Linux only: its namespaces are the jail")
        if limits.level == "process":
            sentence = "level 'process' runs programs with your own rights: no protection of files and network"
            warnings.warn(sentence, RuntimeWarning, stacklevel=2)
        self.limits = limits
        try:
            with ExitStack() as mine, ExitStack() as inside:
                self._start(mine, inside, stdin, peer)
                self._open = mine.pop_all()
        except OSError as error:
            raise JailBrokenError(f"the jail did not start: {error}") from error
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def _start(
        self, mine: ExitStack, theirs: ExitStack, stdin: bytes, peer: socket.socket | None
    ) -> None:
        folder = (
            mine.enter_context(tempfile.TemporaryDirectory(prefix="infir2-jail-"))
            if self.limits.level == "process"
            else "/"
        )
        ours, control = socket.socketpair()
        self.channel = Channel(mine.enter_context(ours))
        theirs.enter_context(control)
        self.status, status = os.pipe()
        mine.callback(os.close, self.status)
        theirs.callback(os.close, status)
        input_file = os.memfd_create("stdin")
        theirs.callback(os.close, input_file)
        with open(input_file, "wb", closefd=False) as file:
            file.write(stdin)
        os.lseek(input_file, 0, os.SEEK_SET)
        shown = libraries()
        config = asdict(self.limits) | {
            "cpu_seconds": math.ceil(self.limits.total_seconds)
            + 1,  # a backstop: the parent's wall clock decides
            "libraries": shown,
            "hidden": [
                path for place in shown for path in glob.glob(f"{place}/python3*/*-packages")
            ],
            "control": control.fileno(),
            "status": status,
            "peer": peer.fileno() if peer else -1,
        }
        self.process = subprocess.Popen(
            [
                os.path.realpath(sys.executable),
                "-I",
                "-S",
                "-X",
                "utf8",
                "-c",
                _BOOT_TEXT,
                json.dumps(config),
            ],
            stdin=input_file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin"},
            cwd=folder,
            pass_fds=[control.fileno(), status, *([peer.fileno()] if peer else [])],
            start_new_session=True,
        )
        assert self.process.stdout is not None
        mine.enter_context(self.process.stdout)

    def _await_ready(self) -> None:
        said = self.channel.receive(time.monotonic() + START_SECONDS)
        if said and "jail" in said:
            raise JailError(
                f"this machine refuses a jail of level '{self.limits.level}' ({said['jail']}): {_REMEDY}"
            )
        if not said or "ready" not in said:
            raise JailBrokenError("the jail did not start")

    def send(self, message: dict[str, Any]) -> None:
        """One request; the answer comes through `channel`."""
        self.channel.send(message, self.limits.seconds)

    def output(self, deadline: float, max_bytes: int) -> tuple[bytes, int | None, str]:
        """Standard output until the program ends: (bytes, exit code, ""), or (bytes so far, None, "timeout" | "output")."""
        assert self.process.stdout is not None
        source, collected = self.process.stdout.fileno(), bytearray()
        os.set_blocking(source, False)
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(self.status, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            events = dict(poll.poll(max(0.0, left) * 1000))
            if not events or left < 0:
                return bytes(collected), None, "timeout"
            try:
                chunk = os.read(source, max_bytes + 1)
                ended = not chunk
            except BlockingIOError:
                chunk, ended = b"", False
            collected += chunk
            if len(collected) > max_bytes:
                return bytes(collected), None, "output"
            if ended and source in events:
                poll.unregister(source)
            if self.status in events and not chunk:
                return bytes(collected), self.exit_code(), ""

    def exit_code(self) -> int:
        """Exit code of the ended program, negative for a signal. JailBrokenError when its watcher died."""
        text = os.read(self.status, 32)
        if not text:
            raise JailBrokenError("the jail's watcher died")
        return int(text)

    def close(self) -> None:
        """End and reap. In a pid namespace the watcher returns only after every process inside is gone."""
        try:
            if self.limits.level == "namespaces":
                self.process.terminate()
                self.process.wait(timeout=10.0)
        except subprocess.TimeoutExpired as error:
            raise JailBrokenError("the jail did not end within 10 s") from error
        finally:
            kill_tree(self.process)
            self._open.close()

    def __enter__(self) -> "Cell":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
