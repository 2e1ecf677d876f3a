"""The process that pool.py starts: `python -m infir2.verify.worker MODULE:FUNCTION MEMORY_BYTES`.

Protocol, one JSON object a line: the worker says {"ready": true}; then for each {"arguments": [...], "seconds": s} it
answers {"value": ...} or {"reason": "error" | "oom", "detail": "..."}, with "unclean": true when the check left processes
behind. Imports neither torch nor transformers.
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

SEND_SECONDS, IDLE_SECONDS = (
    60.0,
    7 * 86_400.0,
)  # a worker that nobody asks for a week ends; the pool starts another


def main() -> None:
    """Serve until the channel ends. It is standard input no longer: what a check reads or prints goes nowhere."""
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
    os.killpg(
        0, signal.SIGKILL
    )  # the parent is gone; so is whatever a check left running in this session


def _answer(function: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    # The kernel's own clock: SIGALRM's default action ends this process even if the parent died and C code never returns.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 1.0)
    try:
        value = function(*request["arguments"])
        json.dumps(value)  # raises for what cannot be sent
        return {"value": value}
    except MemoryError as error:
        return {"reason": "oom", "detail": str(error)}
    except BaseException as error:
        return {"reason": "error", "detail": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _has_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _leave_the_file_system() -> None:
    """Work in a directory that is already deleted: nothing to leave behind, nothing of the user's to overwrite."""
    place = tempfile.mkdtemp()
    os.chdir(place)
    os.rmdir(place)


if __name__ == "__main__":
    main()
