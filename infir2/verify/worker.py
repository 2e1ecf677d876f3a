"""The process that pool.py starts: `python -m infir2.verify.worker MODULE:FUNCTION MEMORY_BYTES`.

The protocol is one JSON object per line. The worker sends {"ready": true}; then for each
{"arguments": [...], "seconds": s} it replies {"value": ...} or {"reason": "error" | "oom",
"detail": "..."}, with "unclean": true if the check left processes behind. It imports neither torch
nor transformers.
"""

import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from infir2.verify.process import Channel, adopt_orphans

SEND_SECONDS = 60.0
IDLE_SECONDS = 7 * 86_400.0  # a worker without requests for a week exits; the pool starts another


def main() -> None:
    """Serve until the channel ends; a check's own standard input and output are /dev/null."""
    channel = Channel(socket.socket(fileno=os.dup(0)))
    name, memory_bytes = sys.argv[1], int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_orphans()
    _leave_the_file_system()
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
        if prepare := getattr(module, "prepare", None):
            prepare()
        function = getattr(module, function_name)
    except Exception as error:
        return channel.send({"failed": f"{type(error).__name__}: {error}"}, SEND_SECONDS)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    channel.send({"ready": True}, SEND_SECONDS)
    while request := channel.receive(time.monotonic() + IDLE_SECONDS):
        channel.send(_answer(function, request) | {"unclean": _has_children()}, SEND_SECONDS)
    # The parent has ended: end this session with every process that a check left behind.
    os.killpg(0, signal.SIGKILL)


def _answer(function: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    # The kernel's timer: SIGALRM's default action ends this process even if the parent died and C
    # code never returns.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 1.0)
    try:
        value = _plain(function(*request["arguments"]))
        json.dumps(value)  # raises if the value cannot be sent
        return {"value": value}
    except MemoryError as error:
        return {"reason": "oom", "detail": str(error)}
    except BaseException as error:
        return {"reason": "error", "detail": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _plain(value: Any) -> Any:
    """The number of Python in a scalar of numpy or torch; any other value as it is."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value


def _has_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _leave_the_file_system() -> None:
    """Work in a deleted directory, so that checks leave no files and overwrite no user's file."""
    directory = tempfile.mkdtemp()
    os.chdir(directory)
    os.rmdir(directory)


if __name__ == "__main__":
    main()
