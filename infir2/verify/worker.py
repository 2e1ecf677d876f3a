"""The process that pool.py starts: `python -m infir2.verify.worker MODULE:FUNCTION MEMORY_BYTES`.

Protocol, one JSON object a line: the worker says {"ready": true}; then for each {"arguments": [...], "seconds": s} it
answers {"value": ...} or {"reason": "error" | "oom", "detail": "..."}, with "unclean": true when the check left processes
behind. Imports neither torch nor transformers.
"""

import json
import os
import resource
import signal
import sys
import tempfile
from importlib import import_module
from typing import BinaryIO

from infir2.verify.process import adopt_orphans


def main() -> None:
    """Serve until standard input ends. The protocol keeps private descriptors: what a check prints goes nowhere."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
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
    except Exception as error:
        _reply(replies, {"failed": f"{type(error).__name__}: {error}"})
        return
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    _reply(replies, {"ready": True})
    for line in requests:
        answer = _answer(getattr(module, function_name), json.loads(line))
        _reply(replies, answer | {"unclean": _has_children()})
    os.killpg(0, signal.SIGKILL)  # the parent is gone; so is whatever a check left running in this session


def _answer(function: object, request: dict) -> dict:
    # The kernel's own clock: SIGALRM's default action ends this process even if the parent died and C code never returns.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 1.0)
    try:
        assert callable(function)
        return {"value": function(*request["arguments"])}
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


def _reply(replies: BinaryIO, message: dict) -> None:
    try:
        line = json.dumps(message)
    except (TypeError, ValueError) as error:
        line = json.dumps({"reason": "error", "detail": f"the check returned what JSON cannot hold: {error}"[:300]})
    replies.write(line.encode() + b"\n")


if __name__ == "__main__":
    main()
