"""`infir2 launch torchrun`: torch's own launcher on one node or on each of several nodes.

The launcher's exit code is the worst code of this node's ranks.
"""

import difflib
import glob
import itertools
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from infir2.errors import ConfigError
from infir2.launch import ranks
from infir2.terminal import log

PORT = 29400
POLL_SECONDS = 0.2
PEER_SECONDS = 20.0
PROBE_SECONDS = 3.0
# TCPStoreBackend.hpp: VALIDATE (0) with its magic number, PING (13) with any number.
_STORE_PING = struct.pack("<BIBI", 0, 0x3C85F7CE, 13, 7)
VERBS = ("cpt", "sft", "rl", "eval")
_PROGRAMS = ("--", "infir2", "python", "python3", "-m")  # written before a verb by habit
# The ranks of one node listen on loopback only. torchrun would open a store for them on all
# interfaces; they make their own (`parallel.ranks`).
_LOOPBACK = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@dataclass(frozen=True)
class Layout:
    """How many processes run, and where.

    Example: `Layout(nodes=4, ranks_per_node=8)`: 32 ranks, one per GPU.

    Attributes:
        cpu: Request no GPUs.
        cpus_per_rank: Cores to request of SLURM or Ray.
        gpus_per_rank: GPUs to request of SLURM or Ray.
        engines: Rollout engines in processes of their own (Ray).
        gpus_per_engine: GPUs of each of them.
        max_restarts: Restarts of all ranks after one died.
        endpoint: HOST:PORT of the rendezvous of several nodes.
        run_id: Distinguishes jobs with the same endpoint.
        local_address: Address of this node for the others, if it is not the host name.
    """

    nodes: int = 1
    ranks_per_node: int = 1
    cpu: bool = False
    cpus_per_rank: float = 1.0
    gpus_per_rank: int = 1
    engines: int = 0
    gpus_per_engine: int = 1
    max_restarts: int = 3
    endpoint: str = ""
    run_id: str = "infir2"
    local_address: str = ""


def default_ranks() -> int:
    """The number of visible GPUs of this machine; 1 if there is none."""
    return num_gpus() or 1


def num_gpus() -> int:
    """Visible GPUs of this machine, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def check_machine(layout: Layout) -> None:
    """Raise ConfigError if this machine is too small for its ranks, or the port is in use."""
    gpus, cores, ranks_here = num_gpus(), os.cpu_count() or 1, layout.ranks_per_node
    if gpus and ranks_here > gpus and not layout.cpu:
        raise ConfigError(
            f"--gpus-per-node {ranks_here}, and this machine has {gpus} GPU{'s' * (gpus > 1)} "
            f"that can be used: set --gpus-per-node {gpus}, or --cpu to run on its CPU."
        )
    if not gpus and ranks_here > cores and not layout.cpu:
        raise ConfigError(
            f"--gpus-per-node {ranks_here}, and this machine has no GPU and {cores} cores: start "
            f"at most {cores} processes, or set --cpu to start {ranks_here} all the same."
        )
    if layout.nodes > 1:
        _check_endpoint(layout.endpoint)


def _check_endpoint(endpoint: str) -> None:
    """Raise ConfigError for an endpoint that is not HOST:PORT, or whose port another program uses.

    The first node of a job listens there. A port that answers like torch's store belongs to a
    launcher of this job that has started earlier.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"--endpoint {endpoint}: write HOST:PORT, such as node1:{PORT} (from MASTER_ADDR and "
            "MASTER_PORT without the option)."
        )
    try:
        connection = socket.create_connection((host, int(port)), timeout=PROBE_SECONDS)
    except socket.gaierror as error:
        raise ConfigError(
            f"--endpoint {endpoint}: {host} is not a known host ({error.strerror}); name the first "
            "node."
        ) from error
    except OSError:
        return  # nobody listens yet
    with connection:
        if not _is_torch_store(connection):
            raise ConfigError(
                f"--endpoint {endpoint}: another program uses this port; choose a free one with "
                "--endpoint HOST:PORT or MASTER_PORT, the same on all nodes."
            )


def _is_torch_store(connection: socket.socket) -> bool:
    """Whether the peer is a store of torch: it answers a ping with the ping's number.

    torch's own client does not return from a peer that is not a store.
    """
    connection.settimeout(PROBE_SECONDS)
    try:
        connection.sendall(_STORE_PING)
        return connection.recv(4) == _STORE_PING[-4:]
    except OSError:
        return False


def default_endpoint() -> str:
    """$MASTER_ADDR:$MASTER_PORT; empty without MASTER_ADDR."""
    host = os.environ.get("MASTER_ADDR", "")
    return f"{host}:{os.environ.get('MASTER_PORT', PORT)}" if host else ""


def check_command(command: Sequence[str], layout: Layout) -> None:
    """Raise ConfigError if `infir2 COMMAND` cannot be launched with this layout."""
    if not command or command[0] not in VERBS:
        found = f", not {command[0]}" if command else ""
        raise ConfigError(
            f"infir2 launch needs a verb after --: one of {', '.join(VERBS)}{found}, and its "
            f"arguments.{_command_advice(command)}"
        )
    is_recipe = command[0] == "eval" and not runs_benchmarks(command)
    if is_recipe and layout.nodes * layout.ranks_per_node > 1:
        raise ConfigError(
            "infir2 eval RECIPE runs in one process: launch it with --nodes 1 --gpus-per-node 1."
        )


def _command_advice(command: Sequence[str]) -> str:
    """What the words after `--` may have meant, with a space before it."""
    words = list(itertools.dropwhile(lambda word: word in _PROGRAMS, command))
    if words and words[0].endswith(".toml"):
        words = ["sft", *words]
    if words and words[0] in VERBS:
        return f" Such as -- {shlex.join(words)}"
    near = difflib.get_close_matches(words[0], VERBS, 1) if words else []
    return f" Did you mean {near[0]}?" if near else ""


def runs_benchmarks(command: Sequence[str]) -> bool:
    """Whether it is `infir2 eval MODEL|URL --benchmarks`: one process on each node."""
    return command[:1] == ["eval"] and any(
        word.partition("=")[0] == "--benchmarks" for word in command
    )


def torchrun_command(
    layout: Layout, command: Sequence[str], rendezvous_file: str | Path = "FILE"
) -> list[str]:
    """The command line of torch's launcher for `infir2 COMMAND`.

    The launcher of one node meets no other: its rendezvous is a new file.
    Raises ConfigError for several nodes without an endpoint.
    """
    if layout.nodes == 1:
        rendezvous = [
            *("--rdzv-backend=c10d", "--rdzv-conf=store_type=file"),
            f"--rdzv-endpoint={rendezvous_file}",
        ]
    elif not layout.endpoint:
        raise ConfigError(
            "several nodes need a rendezvous: set MASTER_ADDR, "
            "or --endpoint HOST:PORT with the first node's address."
        )
    else:
        rendezvous = [
            f"--nnodes={layout.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={layout.endpoint}",
            f"--rdzv-id={layout.run_id}",
        ]
        if layout.local_address:
            rendezvous.append(f"--local-addr={layout.local_address}")
    return [
        *(sys.executable, "-m", "torch.distributed.run", *rendezvous),
        f"--nproc-per-node={layout.ranks_per_node}",
        f"--max-restarts={layout.max_restarts}",
        *("-m", "infir2", *command),
    ]


def run_torchrun(layout: Layout, command: Sequence[str]) -> int:
    """Run `infir2 COMMAND` on this node's ranks and return their worst exit code.

    SIGTERM and SIGINT are forwarded to the ranks, which save.
    """
    with tempfile.TemporaryDirectory(prefix="infir2-ranks-") as temporary:
        ranks_dir = Path(os.environ.get(ranks.RANKS_DIR_VARIABLE) or temporary)
        launcher_dir = ranks_dir / f"{socket.gethostname()}-{os.getpid()}"
        launcher_dir.mkdir(parents=True)

        def forward(number: int, _frame: FrameType | None) -> None:
            ranks.signal_ranks(launcher_dir, number)

        with ranks.handle_stop_signals(forward):
            process = subprocess.Popen(
                torchrun_command(layout, command, Path(temporary, "rendezvous")),
                env=(_LOOPBACK if layout.nodes == 1 else {})
                | os.environ
                | {
                    ranks.RANKS_DIR_VARIABLE: str(launcher_dir),
                    "PET_SIGNALS_TO_HANDLE": "SIGQUIT",
                }
                | ({"CUDA_VISIBLE_DEVICES": ""} if layout.cpu else {}),
                start_new_session=True,  # Ctrl-C reaches the ranks once, through `forward`
                preexec_fn=_before_torchrun,
            )
            _wait(process, launcher_dir)
        return _report(ranks.latest_exit_codes(launcher_dir))


def _report(codes: dict[int, int]) -> int:
    """Return the worst code, and log all of them if several ranks ran and one failed."""
    worst = ranks.worst_code(codes.values())
    if worst and len(codes) != 1:
        ended = ", ".join(
            f"rank {rank}: {'killed' if code == ranks.DIED else code}"
            for rank, code in codes.items()
        )
        log(ended or "no rank started", "infir2 launch")
    return worst


def _before_torchrun() -> None:
    """SLURM signals every process of a step, and torchrun would kill ranks during a long save."""
    ranks.die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _wait(process: subprocess.Popen[bytes], launcher_dir: Path) -> None:
    """Wait until torchrun exits.

    A rank that ends with a user's error exits with 0 for torchrun, so the others may wait for it in
    a collective: they are killed after PEER_SECONDS.
    """
    no_cause = (0, ranks.PREEMPTED, ranks.INTERRUPTED, *ranks.RESTARTABLE)
    deadline = float("inf")
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        codes = ranks.latest_exit_codes(launcher_dir).values()
        if deadline == float("inf") and any(code not in no_cause for code in codes):
            deadline = time.monotonic() + PEER_SECONDS
        if time.monotonic() > deadline:
            ranks.signal_ranks(launcher_dir, signal.SIGKILL)
