"""Jails for programs that a policy wrote: start one, talk to it, end it with everything it started.

Level "namespaces" (default): user/mount/pid/net/ipc namespaces, a root of read-only interpreter libraries, a tmpfs for
files, no privileges, rlimits. It shares the kernel with this machine: against a kernel exploit use a virtual machine.
Level "process": rlimits, an empty environment and a temporary directory, with your own user's rights. It is for machines
without namespaces and programs you trust, and is never chosen silently.
"""

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
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from infir2.errors import ConfigError
from infir2.verify import jail, plain, walls
from infir2.verify.process import kill_tree

START_SECONDS = 30.0


def _boot_text() -> str:
    """The program that `python -c` starts: plain, walls and jail as modules of their names, without files."""
    texts = [("infir2", ""), ("infir2.verify", "")]
    texts += [(module.__name__, Path(str(module.__file__)).read_text()) for module in (plain, walls, jail)]
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
    """Directories that a jail shows read-only: the interpreter's standard library and the system's shared libraries."""
    wanted = [str(Path(os.__file__).resolve().parents[1]), "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    return sorted({path for path in wanted if os.path.isdir(path)})


def _warn_of_process_level() -> None:
    warnings.warn(
        "level 'process' runs programs with your own rights: no protection of files and network",
        RuntimeWarning,
        stacklevel=2,
    )


class Cell:
    """One jailed interpreter, ready for one request. A context manager; leaving it ends and reaps every process inside.

    `stdin` is what the program reads; `peer` a socket that the process inside gets (an examiner's way to the program).
    Raises JailError when this machine cannot make a jail of that level, JailBrokenError when this one did not start.
    """

    def __init__(self, limits: Limits, stdin: bytes = b"", peer: socket.socket | None = None) -> None:
        if sys.platform != "linux":
            raise JailError("programs can be checked on Linux only: its namespaces are the jail")
        self.limits, self.received = limits, b""
        self.control, inside = socket.socketpair()
        self.status, status = os.pipe()
        self.folder = tempfile.TemporaryDirectory(prefix="infir2-jail-") if limits.level == "process" else None
        input_file = os.memfd_create("stdin")
        try:
            if self.folder:
                _warn_of_process_level()
            os.truncate(input_file, 0)
            with open(input_file, "wb", closefd=False) as file:
                file.write(stdin)
            os.lseek(input_file, 0, os.SEEK_SET)
            self.process = self._start(inside, status, input_file, peer)
        except OSError as error:
            self.control.close()
            os.close(self.status)
            raise JailBrokenError(str(error)) from error
        finally:
            inside.close()
            os.close(status)
            os.close(input_file)
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def _start(self, inside: socket.socket, status: int, input_file: int, peer: socket.socket | None) -> "subprocess.Popen[bytes]":
        config = asdict(self.limits) | {
            "cpu_seconds": math.ceil(self.limits.seconds) + 60,  # a backstop: the parent's wall clock decides
            "libraries": libraries(),
            "control": inside.fileno(),
            "status": status,
            "peer": peer.fileno() if peer else -1,
        }
        return subprocess.Popen(
            [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", "-c", _BOOT_TEXT, json.dumps(config)],
            stdin=input_file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin"},
            cwd=self.folder.name if self.folder else "/",
            pass_fds=[inside.fileno(), status, *([peer.fileno()] if peer else [])],
            start_new_session=True,
        )

    def _await_ready(self) -> None:
        said = self.receive(time.monotonic() + START_SECONDS)
        if said and "jail" in said:
            raise JailError(f"this machine refuses a jail of level '{self.limits.level}' ({said['jail']}): {_REMEDY}")
        if not said or "ready" not in said:
            raise JailBrokenError("the jail did not start")

    def send(self, message: dict[str, Any]) -> None:
        """One request. A jail that has ended is noticed by `receive`."""
        self.control.settimeout(self.limits.seconds)
        with suppress(OSError):
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float, max_bytes: int = jail.MAX_LINE_BYTES) -> dict[str, Any] | None:
        """The next message, {} when the deadline (monotonic seconds) passed, None when the jail ended or sent no message."""
        while b"\n" not in self.received:
            self.control.settimeout(max(deadline - time.monotonic(), 1e-6))
            try:
                chunk = self.control.recv(1 << 16)
            except TimeoutError:
                return {}
            except OSError:
                return None
            self.received += chunk
            if not chunk or len(self.received) > max_bytes:
                return None
        line, _, self.received = self.received.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) and message else None

    def output(self, deadline: float, max_bytes: int) -> tuple[bytes, int | None, str]:
        """Standard output until the program ends: (bytes, exit code, ""), or (bytes so far, None, "timeout" | "output")."""
        assert self.process.stdout is not None
        source, collected = self.process.stdout.fileno(), b""
        os.set_blocking(source, False)
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(self.status, select.POLLIN)
        while True:
            events = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not events:
                return collected, None, "timeout"
            chunk = b""
            with suppress(BlockingIOError):
                chunk = os.read(source, max_bytes + 1)
            collected += chunk
            if len(collected) > max_bytes:
                return collected, None, "output"
            if source in events and not chunk:
                poll.unregister(source)
            if self.status in events and not chunk:
                return collected, self.exit_code(), ""

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
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.control.close()
            os.close(self.status)
            if self.folder:
                self.folder.cleanup()

    def __enter__(self) -> "Cell":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
