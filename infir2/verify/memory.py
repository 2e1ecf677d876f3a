"""What the processes of a jail use of the machine's memory, read from /proc by its watcher.

The current directory must be /proc: the watcher enters it before the jail changes its root. This
file imports only the standard library, because it runs inside jails (jail.py).
"""

import os
from contextlib import suppress

PIPE_BYTES = 64 << 10  # linux/pipe_fs_i.h; the filter of kernel calls forbids a larger pipe
SOCKET_BYTES = 256 << 10  # a Unix socket's default buffer with its overhead


def family(ancestor: int) -> list[int]:
    """The living descendants of a process, without itself."""
    members = [ancestor]
    for process in members:  # the list grows during the loop
        for task in _entries(f"{process}/task"):
            members += map(int, _text(f"{process}/task/{task}/children").split())
    return members[1:]


def used_bytes(processes: list[int], own_network: bool, enough: int) -> int:
    """Memory of some processes, shared pages counted once; an upper bound if at most `enough`.

    Descriptors count with what a pipe's buffer may hold, and with `own_network` (all sockets of
    this network namespace are theirs) sockets with their buffers.
    """
    buffers = PIPE_BYTES * sum(len(_entries(f"{process}/fd")) for process in processes)
    if own_network:
        buffers += SOCKET_BYTES * _text("self/net/unix").count("\n")
    resident = {process: _resident_bytes(process) for process in processes}
    if buffers + sum(resident.values()) <= enough:
        return buffers + sum(resident.values())
    return buffers + sum(
        _kilobytes(_text(f"{process}/smaps_rollup"), ("Pss:", "SwapPss:")) or bound
        for process, bound in resident.items()
    )


def _resident_bytes(process: int) -> int:
    """By any of its threads: a first thread that has ended shows no memory."""
    fields = ("VmRSS:", "VmSwap:", "VmPTE:")
    threads = _entries(f"{process}/task")
    return max(
        (_kilobytes(_text(f"{process}/task/{t}/status"), fields) for t in threads), default=0
    )


def _kilobytes(text: str, fields: tuple[str, ...]) -> int:
    """The sum in bytes of lines such as `VmRSS:  120 kB`."""
    lines = (line.split() for line in text.splitlines())
    return sum(int(line[1]) << 10 for line in lines if line and line[0] in fields)


def _entries(folder: str) -> list[str]:
    with suppress(OSError):
        return os.listdir(folder)
    return []


def _text(path: str) -> str:
    with suppress(OSError), open(path) as file:
        return file.read()
    return ""
