"""Confinement of a jail, set up from inside by the process that it confines.

This file imports only the standard library, because it runs inside jails (jail.py).
"""

import ctypes
import os
import resource
import signal
from contextlib import suppress
from typing import Any

from infir2.verify import memory
from infir2.verify.syscalls import install_filter, leave_session_keyring

# Linux's constants (sched.h, mount.h, prctl.h), which the standard library does not define.
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
PACKAGES = "/packages"
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
WATCH_SECONDS = 0.02  # between two readings of the jail's memory
_WATCHED_SIGNALS = (signal.SIGTERM, signal.SIGCHLD)
_PDEATHSIG, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 24, 36, 38


def _call(libc: ctypes.CDLL, name: str, *arguments: Any) -> None:
    values = [
        a.encode() if isinstance(a, str) else ctypes.c_ulong(a) if isinstance(a, int) else a
        for a in arguments
    ]
    if getattr(libc, name)(*values) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _unshare(libc: ctypes.CDLL) -> None:
    """Enter new namespaces; a user namespace too, unless this is root and may do without."""
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    if os.geteuid() == 0:
        try:
            return _call(libc, "unshare", flags)
        except OSError:
            pass
    user, group = os.geteuid(), os.getegid()
    _call(libc, "unshare", flags | _NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"65534 {user} 1"),
        ("gid_map", f"65534 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _bind(libc: ctypes.CDLL, source: str, target: str, flags: int) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        open(target, "w").close()
    _call(libc, "mount", source, target, None, _BIND | _REC, None)
    # A user namespace may not clear flags of the source's mount: repeat them (ST_* to MS_*).
    present = os.statvfs(source).f_flag
    inherited = present & (1 | 2 | 4 | 8 | 1024 | 2048) | ((1 << 21) if present & 4096 else 0)
    _call(libc, "mount", None, target, None, _BIND | _REMOUNT | inherited | flags, None)


def _build_root(
    libc: ctypes.CDLL, libraries: list[str], hidden: list[str], packages: list[str], file_bytes: int
) -> None:
    """Change to a root of read-only libraries, /dev/null, /dev/urandom and a tmpfs at /tmp."""
    _call(libc, "mount", None, "/", None, _REC | _PRIVATE, None)
    top = "/proc"  # the new root is built over it, since no library is below it
    base = top + "/jail"
    _call(libc, "mount", "tmpfs", top, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=0755")
    for path in libraries:
        _bind(libc, path, base + path, _RDONLY | _NOSUID | _NODEV)
    for path in hidden:
        _call(libc, "mount", "tmpfs", base + path, "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=4k")
    for path in packages:
        target = f"{base}{PACKAGES}/{os.path.basename(path)}"
        _bind(libc, path, target, _RDONLY | _NOSUID | _NODEV)
    for folder in (base + "/dev", base + "/tmp", top + "/old"):
        os.makedirs(folder, exist_ok=True)
    for device in ("/dev/null", "/dev/urandom"):
        _bind(libc, device, base + device, _NOSUID)
    options = f"size={file_bytes},mode=1777,nr_inodes=4096"
    _call(libc, "mount", "tmpfs", base + "/tmp", "tmpfs", _NOSUID | _NODEV, options)
    os.chdir(top)
    _call(libc, "pivot_root", ".", "old")
    _call(libc, "umount2", "/old", _DETACH)
    _call(libc, "mount", None, "/", None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV, None)
    # The kernel denies user namespaces, and so new capabilities, to a process whose root is not its
    # mount namespace's.
    os.chroot("/jail")
    os.chdir("/tmp")


def _drop_privileges(libc: ctypes.CDLL, user: int) -> None:
    """Drop all capabilities for good; as real root, change to a user id that only this jail uses.

    RLIMIT_NPROC counts processes per user id.
    """
    for capability in range(64):
        libc.prctl(_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
        try:
            os.setresgid(user, user, user)
        except OSError:  # in a container that maps few ids
            user = 65534
            os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _call(libc, "capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    _call(libc, "prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)


def _set_limits(config: dict) -> None:
    sizes = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_AS: config["memory_bytes"],
        resource.RLIMIT_FSIZE: config["file_bytes"],
        resource.RLIMIT_NPROC: config["processes"],
        resource.RLIMIT_CPU: config["cpu_seconds"],
    }
    for kind, size in sizes.items():
        hard = resource.getrlimit(kind)[1]
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(kind, (size, size))


def confine(config: dict) -> None:
    """Return only in the confined child; the calling process becomes its watcher for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespaces = config["level"] == "namespaces"
    user = 1 << 30 | os.getpid()
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    os.stat(f"{os.getpid()}/task", dir_fd=proc)
    if namespaces:
        _unshare(libc)
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    # The signal comes when the parent's thread ends; that thread waits in run_code.
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED_SIGNALS)
    child = os.fork()
    if child:
        os.fchdir(proc)
        _watch(child, config)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED_SIGNALS)
    os.close(config["status"])
    os.close(proc)
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if namespaces:
        leave_session_keyring(libc)
        _build_root(
            libc, *(config[key] for key in ("libraries", "hidden", "packages", "file_bytes"))
        )
        _drop_privileges(libc, user)
        libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of credentials clears it
    _set_limits(config)
    if namespaces:
        install_filter(libc)


def _uses_more_than(limit: int, own_network: bool) -> bool:
    return memory.used_bytes(memory.family(os.getpid()), own_network, limit) > limit


def _watch(child: int, config: dict) -> None:
    """Wait for the child, then write its exit code and what stopped it to `status`.

    SIGTERM kills the child, and so does memory of the whole jail beyond its limit. In a pid
    namespace all descendants of the child die before it.
    """
    status, namespaces, stopped = config["status"], config["level"] == "namespaces", ""
    os.closerange(0, status)
    os.closerange(status + 1, 1024)
    limit = config["memory_bytes"]
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        signaled = signal.sigtimedwait(_WATCHED_SIGNALS, WATCH_SECONDS)
        if signaled and signaled.si_signo == signal.SIGTERM:
            os.kill(child, signal.SIGKILL)
        elif all(_uses_more_than(limit, namespaces) for _ in range(3)):
            # Three times: a process that ends leaves its share of common pages to others, which are
            # then read a second time.
            stopped = "memory"
            for process in memory.family(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
    os.write(status, b"%d %s\n" % (os.waitstatus_to_exitcode(ended[1]), stopped.encode()))
    # Without a pid namespace the parent kills the processes that this one has adopted.
    while not namespaces:
        signal.pause()
    os._exit(0)
