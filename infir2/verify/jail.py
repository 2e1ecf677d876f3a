"""The code inside a jail: sandbox.py starts it under `python -I -S`, with the modules it imports.

They import only the standard library. A first process creates the namespaces and watches; the
second one (process 1 of its pid namespace) builds a file system of read-only libraries and a small
tmpfs, drops every privilege, sends {"ready": true}, and only then receives the program.

The process that runs a program (serve.py) contains nothing that decides the verdict: no expected
value, no test, no key. The parent compares plain values (compare.py); an assert-style test runs in
a second jail (examiner.py), which calls the program's functions by messages (remote.py).
"""

import builtins
import json
import socket
import sys

from infir2.verify.contest import judge_contest
from infir2.verify.examiner import examine
from infir2.verify.serve import load_and_serve, run, send
from infir2.verify.walls import confine


def _script(channel: socket.socket, program: str) -> None:
    try:
        run(program, "__main__")
    except Exception as error:
        send(channel, error=type(error).__name__, detail=str(error)[:200])
        sys.exit(1)


def main() -> None:
    """Confine this process, then serve the request in the first line of the control channel."""
    config = json.loads(sys.argv[1])
    channel = socket.socket(fileno=config["control"])
    try:
        confine(config)
    except (OSError, ValueError) as error:
        return send(channel, jail=f"{type(error).__name__}: {error}")
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # which `python -S` lacks
    send(channel, ready=True)
    requests = channel.makefile("rb")
    request = json.loads(requests.readline())
    if request["mode"] == "script":
        _script(channel, request["program"])
    elif request["mode"] == "serve":
        load_and_serve(channel, requests, request["program"], request["prelude"])
    elif request["mode"] == "contest":
        judge_contest(channel, requests, request)
    else:
        examine(channel, socket.socket(fileno=config["peer"]), request)
