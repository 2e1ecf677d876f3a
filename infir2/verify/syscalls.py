"""The kernel calls that a jailed program may make, as a seccomp filter.

Every call that `_ALLOWED` does not list fails with ENOSYS, as in a kernel that lacks it: keyrings,
io_uring, userfaultfd, ptrace, bpf, mounts, and shared memory that no limit bounds. So does a call
that a future kernel adds. `_CHECKED` lists calls that depend on an argument. This file imports only
the standard library, because it runs inside jails (jail.py).
"""

import ctypes
import errno
import os
import struct

# Number of each call on x86_64 and aarch64; "-" where a newer call replaces it.
_ALLOWED = """
read/0/63 write/1/64 open/2/- close/3/57 stat/4/- fstat/5/80 lstat/6/- poll/7/- ppoll/271/73
select/23/- pselect6/270/72 lseek/8/62 pread64/17/67 pwrite64/18/68 readv/19/65 writev/20/66
preadv/295/69 pwritev/296/70 preadv2/327/286 pwritev2/328/287 access/21/- faccessat/269/48
faccessat2/439/439 pipe/22/- pipe2/293/59 dup/32/23 dup2/33/- dup3/292/24 openat/257/56
openat2/437/437 newfstatat/262/79 statx/332/291 statfs/137/43 fstatfs/138/44 getdents/78/-
getdents64/217/61 getcwd/79/17 chdir/80/49 fchdir/81/50 rename/82/- renameat/264/38
renameat2/316/276 mkdir/83/- mkdirat/258/34 rmdir/84/- creat/85/- link/86/- linkat/265/37
unlink/87/- unlinkat/263/35 symlink/88/- symlinkat/266/36 readlink/89/- readlinkat/267/78
chmod/90/- fchmod/91/52 fchmodat/268/53 fchmodat2/452/452 umask/95/166 utime/132/-
utimes/235/- utimensat/280/88 futimesat/261/- truncate/76/45 ftruncate/77/46 fallocate/285/47
fsync/74/82 fdatasync/75/83 flock/73/32 sendfile/40/71 copy_file_range/326/285
fadvise64/221/223 close_range/436/436 getxattr/191/8 lgetxattr/192/9 fgetxattr/193/10
listxattr/194/11 llistxattr/195/12 flistxattr/196/13

mprotect/10/226 munmap/11/215 brk/12/214 mremap/25/216 madvise/28/233
mincore/27/232 msync/26/227 membarrier/324/283

fork/57/- vfork/58/- execve/59/221 execveat/322/281 exit/60/93 exit_group/231/94 wait4/61/260
waitid/247/95 getpid/39/172 getppid/110/173 gettid/186/178 getuid/102/174 geteuid/107/175
getgid/104/176 getegid/108/177 getresuid/118/148 getresgid/120/150 getgroups/115/158
getpgrp/111/- getpgid/121/155 setpgid/109/154 getsid/124/156 setsid/112/157
set_tid_address/218/96 set_robust_list/273/99 get_robust_list/274/100 futex/202/98
arch_prctl/158/- rseq/334/293 prlimit64/302/261 getrlimit/97/163 setrlimit/160/164
getrusage/98/165 times/100/153 sysinfo/99/179 uname/63/160 sched_yield/24/124
sched_getaffinity/204/123 sched_getparam/143/121 sched_getscheduler/145/120
sched_get_priority_max/146/125 sched_get_priority_min/147/126 getpriority/140/141
getcpu/309/168 capget/125/90 pidfd_open/434/434 pidfd_send_signal/424/424

rt_sigaction/13/134 rt_sigprocmask/14/135 rt_sigreturn/15/139 rt_sigpending/127/136
rt_sigtimedwait/128/137 rt_sigsuspend/130/133 sigaltstack/131/132 kill/62/129 tkill/200/130
tgkill/234/131 pause/34/- alarm/37/- getitimer/36/102 setitimer/38/103 restart_syscall/219/128
signalfd4/289/74

nanosleep/35/101 clock_nanosleep/230/115 clock_gettime/228/113 clock_getres/229/114
gettimeofday/96/169 time/201/- timer_create/222/107 timer_settime/223/110
timer_gettime/224/108 timer_getoverrun/225/109 timer_delete/226/111 timerfd_create/283/85
timerfd_settime/286/86 timerfd_gettime/287/87 getrandom/318/278

epoll_create/213/- epoll_create1/291/20 epoll_ctl/233/21 epoll_wait/232/- epoll_pwait/281/22
epoll_pwait2/441/441 eventfd/284/- eventfd2/290/19

bind/49/200 connect/42/203 listen/50/201 accept/43/202 accept4/288/242 getsockname/51/204
getpeername/52/205 sendto/44/206 recvfrom/45/207 sendmsg/46/211 recvmsg/47/212 shutdown/48/210
getsockopt/55/209
"""

# Call, argument, condition, values; the constants are from sched.h, socket.h, asm/ioctls.h,
# fcntl.h, prctl.h, mman.h.
_NEW_NAMESPACES = (0x7E020080,)
_UNIX = (1,)  # a vsock reaches the machine's hypervisor, netlink the packet filter
_TERMINAL_SIZE_AND_FLAGS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_PIPE_SIZE = (1031,)
_THREAD_NAME = (15, 16)
_SHARED_ANONYMOUS = (0x21,)  # such memory may belong to no process's resident pages
_CHECKED: tuple[tuple[str, int, str, tuple[int, ...]], ...] = (
    ("clone/56/220", 0, "no bits of", _NEW_NAMESPACES),
    ("socket/41/198", 0, "one of", _UNIX),
    ("socketpair/53/199", 0, "one of", _UNIX),
    ("ioctl/16/29", 1, "one of", _TERMINAL_SIZE_AND_FLAGS),
    ("fcntl/72/25", 1, "none of", _PIPE_SIZE),
    ("prctl/157/167", 0, "one of", _THREAD_NAME),
    ("mmap/9/222", 3, "not all bits of", _SHARED_ANONYMOUS),
)

_MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column; linux/audit.h
_KEYCTL, _JOIN_SESSION_KEYRING = "keyctl/250/219", 1
_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
# Opcodes of linux/bpf_common.h: load a word, and with a constant, jump if equal or if bits are set.
_LOAD, _AND, _IF_EQUAL, _IF_BITS, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x06

Instruction = tuple[int, int, int, int]  # opcode, jump if true, jump if false, operand


def _number(call: str, column: int) -> int | None:
    number = call.split("/")[column]
    return None if number == "-" else int(number)


def _argument_check(argument: int, condition: str, values: tuple[int, ...]) -> list[Instruction]:
    opcode = _IF_BITS if condition == "no bits of" else _IF_EQUAL
    hit, miss = (_ALLOW, _FAIL | errno.EPERM)[:: 1 if condition == "one of" else -1]
    block: list[Instruction] = [(_LOAD, 0, 0, 16 + 8 * argument)]
    for value in values:
        block += [(_AND, 0, 0, value)] if condition == "not all bits of" else []
        block += [(opcode, 0, 1, value), (_RETURN, 0, 0, hit)]
    return [*block, (_RETURN, 0, 0, miss)]


def filter_program(machine: str) -> list[Instruction]:
    """The filter for a machine's calls. Raises ValueError for a machine without a table."""
    if machine not in _MACHINES:
        raise ValueError(f"no table of kernel calls for {machine}, only for {', '.join(_MACHINES)}")
    column, architecture = _MACHINES[machine]
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_IF_EQUAL, 1, 0, architecture),  # else 32-bit calls, whose numbers mean something else
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    for call, argument, condition, values in _CHECKED:
        block = _argument_check(argument, condition, values)
        program += [(_IF_EQUAL, 0, len(block), _number(call, column) or 0), *block]
    for call in _ALLOWED.split():
        if (number := _number(call, column)) is not None:
            program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    return [*program, (_RETURN, 0, 0, _FAIL | errno.ENOSYS)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def install_filter(libc: ctypes.CDLL) -> None:
    """Filter this process's calls and those of its descendants, for good.

    Needs "no new privileges". Raises OSError if the kernel has no seccomp filters, ValueError on a
    machine without a table.
    """
    program = filter_program(os.uname().machine)
    text = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    loaded = _Program(len(program), text)
    if libc.prctl(_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(loaded), 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_SECCOMP): {os.strerror(error)}")


def leave_session_keyring(libc: ctypes.CDLL) -> None:
    """Join a new, empty session keyring instead of the caller's.

    Errors are ignored: a kernel or container without keyrings needs none, and the filter denies
    every call that reaches one.
    """
    column = _MACHINES.get(os.uname().machine, (0, 0))[0]
    if column:
        libc.syscall(_number(_KEYCTL, column), ctypes.c_long(_JOIN_SESSION_KEYRING), None)
