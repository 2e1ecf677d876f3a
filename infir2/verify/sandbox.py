"""Jails for programs that a policy wrote: start them, exchange messages, kill all their processes.

Level "namespaces" (the default) has user/mount/pid/net/ipc namespaces, a root of read-only
interpreter libraries, a tmpfs for files, no privileges, and rlimits. It uses the machine's kernel,
so only a virtual machine protects against kernel exploits. Level "process" has rlimits, an empty
environment and a temporary directory, with your own user's rights. It is for trusted programs on
machines without namespaces, and is never chosen automatically.
"""

import fcntl
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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from infir2.errors import ConfigError
from infir2.verify import contest, examiner, jail, memory, plain, remote, serve, syscalls, walls
from infir2.verify.process import Channel, kill_tree

START_SECONDS = 30.0
END_SECONDS = 5.0


def _boot_text() -> str:
    """The program for `python -c`; it creates the modules plain, walls and jail without files."""
    texts = [("infir2", ""), ("infir2.verify", "")]
    texts += [
        (module.__name__, Path(str(module.__file__)).read_text())
        for module in (plain, serve, remote, examiner, contest, syscalls, memory, walls, jail)
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
    "allow unprivileged user namespaces (sysctl user.max_user_namespaces, "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0), "
    "in a container add CAP_SYS_ADMIN or seccomp=unconfined, "
    "or choose level 'process' if you trust the programs"
)


@dataclass(frozen=True)
class Limits:
    """Resources of one program.

    Attributes:
        seconds: wall clock of one test (an assert-style test, a call, or a run on one input).
        total_seconds: wall clock of all tests of a program.
        memory_bytes: address space of each process, and memory of all of them together.
        output_bytes: standard output of a run.
        file_bytes: size of a file and of the temporary file system.
        processes: processes and threads.
        level: kind of jail, see the module's docstring.
    """

    seconds: float = 6.0
    total_seconds: float = 60.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 64 << 10
    file_bytes: int = 16 << 20
    processes: int = 16
    level: Literal["namespaces", "process"] = "namespaces"


class JailError(ConfigError):
    """This machine cannot run programs safely. It implies nothing about a program."""


class JailBrokenError(Exception):
    """One jail failed to start or to be reaped; the item may be retried."""


def libraries() -> list[str]:
    """Directories of standard and shared libraries, which a jail mounts read-only.

    A jail hides the installed packages inside them.
    """
    candidates = [
        str(Path(os.__file__).resolve().parents[1]),
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
    ]
    return sorted({path for path in candidates if os.path.isdir(path)})


def _sealed_file(content: bytes) -> int:
    """Descriptor of a file in memory that a program can neither change nor enlarge."""
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


class Cell:
    """A context manager of one jailed interpreter for one request.

    Leaving it kills and reaps every process inside. The program reads `stdin`; the process inside
    inherits the socket `peer`, by which an examiner calls the program. Directories of installed
    `packages` are mounted read-only in `package_folder`. Raises JailError if this machine cannot
    create a jail of that level, JailBrokenError if this one did not start.
    """

    def __init__(
        self,
        limits: Limits,
        stdin: bytes = b"",
        peer: socket.socket | None = None,
        packages: Sequence[Path] = (),
    ) -> None:
        if sys.platform != "linux":
            raise JailError("programs can be checked on Linux only: jails need its namespaces")
        if limits.level == "process":
            warnings.warn(
                "level 'process' runs programs with your own rights: "
                "files and network are not protected",
                RuntimeWarning,
                stacklevel=2,
            )
        self.limits, self._packages = limits, packages
        self._exit: tuple[int, bool] | None = None  # code, and whether memory was the reason
        try:
            with ExitStack() as parent_side, ExitStack() as child_side:
                self._start(parent_side, child_side, stdin, peer)
                self._open = parent_side.pop_all()
        except OSError as error:
            raise JailBrokenError(f"the jail did not start: {error}") from error
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        parent_side: ExitStack,
        child_side: ExitStack,
        stdin: bytes,
        peer: socket.socket | None,
    ) -> None:
        """Start the process; each stack closes the descriptors of its side."""
        folder = "/"
        if self.limits.level == "process":
            folder = parent_side.enter_context(tempfile.TemporaryDirectory(prefix="infir2-jail-"))
        parent_end, control = socket.socketpair()
        self.channel = Channel(parent_side.enter_context(parent_end))
        child_side.enter_context(control)
        self.status, status = os.pipe()
        parent_side.callback(os.close, self.status)
        child_side.callback(os.close, status)
        input_file = _sealed_file(stdin)
        child_side.callback(os.close, input_file)
        config = self._config(control.fileno(), status, peer.fileno() if peer else -1)
        interpreter = [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8"]
        self.process = subprocess.Popen(
            [*interpreter, "-c", _BOOT_TEXT, json.dumps(config)],
            stdin=input_file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin"},
            cwd=folder,
            pass_fds=[control.fileno(), status, *([peer.fileno()] if peer else [])],
            start_new_session=True,
        )
        assert self.process.stdout is not None
        parent_side.enter_context(self.process.stdout)

    def _config(self, control: int, status: int, peer: int) -> dict[str, Any]:
        """The settings that jail.py and walls.py read, with the descriptors that they inherit."""
        mounted = libraries()
        packages = [
            path for folder in mounted for path in glob.glob(f"{folder}/python3*/*-packages")
        ]
        return asdict(self.limits) | {
            # a second limit; the parent's wall clock is the first
            "cpu_seconds": math.ceil(self.limits.total_seconds) + 1,
            "libraries": mounted,
            "hidden": packages,
            "packages": list(map(str, self._packages)),
            "control": control,
            "status": status,
            "peer": peer,
        }

    @property
    def package_folder(self) -> str:
        """Where the program finds `packages`."""
        if self.limits.level == "namespaces":
            return walls.PACKAGES
        return str(self._packages[0].parent) if self._packages else ""

    def _await_ready(self) -> None:
        reply = self.channel.receive(time.monotonic() + START_SECONDS)
        if reply and "jail" in reply:
            raise JailError(
                f"this machine cannot create a jail of level '{self.limits.level}' "
                f"({reply['jail']}): {_REMEDY}"
            )
        if not reply or "ready" not in reply:
            raise JailBrokenError("the jail did not start")

    def send(self, message: dict[str, Any]) -> None:
        """Send the request; `channel` receives the reply."""
        self.channel.send(message, self.limits.seconds)

    def output(self, deadline: float, max_bytes: int) -> tuple[bytes, int | None, str]:
        """Standard output until the program ends: (bytes, exit code, "").

        If a limit is exceeded first: (bytes so far, None, "timeout" or "output").
        """
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
        """Exit code of the program, negative for a signal; JailBrokenError if its watcher died."""
        if self._exit is None:
            code, _, stopped = os.read(self.status, 32).decode().partition(" ")
            if not code:
                raise JailBrokenError("the jail's watcher died")
            self._exit = int(code), stopped.strip() == "memory"
        return self._exit[0]

    def out_of_memory(self) -> bool:
        """Whether its watcher killed this jail, which has ended, for its memory."""
        if self._exit is None and select.select([self.status], [], [], END_SECONDS)[0]:
            self.exit_code()
        return self._exit is not None and self._exit[1]

    def close(self) -> None:
        """Kill and reap. In a pid namespace the watcher exits only after every process inside."""
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
