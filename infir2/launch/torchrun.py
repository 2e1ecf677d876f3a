"""`infir2 launch torchrun`: ranks on one node or many through torch's own launcher, with the worst rank's exit code."""

import glob
import os
import signal
import socket
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
VERBS = ("cpt", "sft", "rl", "eval")


@dataclass(frozen=True)
class Layout:
    """How many processes, where. Example: `Layout(nodes=4, ranks_per_node=8)`: 32 ranks, one per GPU."""

    nodes: int = 1
    ranks_per_node: int = 1
    cpu: bool = False  # ask for no GPUs
    cpus_per_rank: float = 1.0  # what SLURM and Ray are asked for
    engines: int = 0  # rollout engines of their own, beside the ranks (Ray)
    max_restarts: int = 3  # of all ranks, after one died
    endpoint: str = ""  # HOST:PORT where nodes meet
    run_id: str = "infir2"  # tells jobs with one endpoint apart
    local_address: str = ""  # what other nodes reach this one by, if not its host name


def default_ranks() -> int:
    """The GPUs of this machine that are visible, without asking torch; 1 without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([name for name in visible.split(",") if name.strip()]))
    return len(glob.glob("/dev/nvidia[0-9]*")) or 1


def default_endpoint() -> str:
    """MASTER_ADDR:MASTER_PORT of the environment; empty without MASTER_ADDR."""
    host = os.environ.get("MASTER_ADDR", "")
    return f"{host}:{os.environ.get('MASTER_PORT', PORT)}" if host else ""


def check_words(words: Sequence[str], layout: Layout) -> None:
    """Raises ConfigError for what cannot be launched."""
    if not words or words[0] not in VERBS:
        raise ConfigError(
            f"infir2 launch needs a verb after --: one of {', '.join(VERBS)}, then its words."
        )
    if words[0] == "eval" and layout.nodes * layout.ranks_per_node > 1:
        raise ConfigError(
            "infir2 eval runs in one process: launch it with --nodes 1 --gpus-per-node 1."
        )


def torchrun_command(layout: Layout, words: Sequence[str]) -> list[str]:
    """The words of torch's launcher. Raises ConfigError for several nodes without a place to meet."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    if layout.nodes == 1:
        command.append("--standalone")
    elif not layout.endpoint:
        raise ConfigError(
            "several nodes have to meet somewhere: set MASTER_ADDR, or --endpoint HOST:PORT with the first node's address."
        )
    else:
        command += [f"--nnodes={layout.nodes}", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={layout.endpoint}", f"--rdzv-id={layout.run_id}"]
        command += [f"--local-addr={layout.local_address}"] if layout.local_address else []
    command += [
        f"--nproc-per-node={layout.ranks_per_node}",
        f"--max-restarts={layout.max_restarts}",
    ]
    return [*command, "-m", "infir2", *words]


def run_torchrun(layout: Layout, words: Sequence[str]) -> int:
    """Run to the end. SIGTERM and Ctrl-C go to the ranks, which save; returns the worst code of this node's ranks."""
    with tempfile.TemporaryDirectory(prefix="infir2-ranks-") as temporary:
        place = (
            Path(os.environ.get(ranks.VARIABLE) or temporary)
            / f"{socket.gethostname()}-{os.getpid()}"
        )
        place.mkdir(parents=True)

        def forward(number: int, _frame: FrameType | None) -> None:
            ranks.signal_ranks(place, number)

        with ranks.stop_signals(forward):
            process = subprocess.Popen(
                torchrun_command(layout, words),
                env=os.environ | {ranks.VARIABLE: str(place), "PET_SIGNALS_TO_HANDLE": "SIGQUIT"},
                start_new_session=True,  # a Ctrl-C reaches the ranks once, through `forward`
                preexec_fn=_before_torchrun,
            )
            _wait(process, place)
        codes = ranks.last_codes(place)
        code = ranks.worst_code(codes.values())
        if code and len(codes) != 1:
            ended = ", ".join(
                f"rank {rank}: {'killed' if each == ranks.DIED else each}"
                for rank, each in codes.items()
            )
            log(ended or "no rank started", "infir2 launch")
        return code


def _before_torchrun() -> None:
    """SLURM signals every process of a step; torchrun would kill the ranks in the middle of a long save."""
    ranks.die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _wait(process: subprocess.Popen[bytes], place: Path) -> None:
    """Until torchrun ends. Ranks that wait for one that ended with an error of the user's are not waited for long."""
    given_up = float("inf")
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        causes = [
            code
            for code in ranks.last_codes(place).values()
            if code not in (0, ranks.PREEMPTED, ranks.INTERRUPTED, *ranks.RESTARTED)
        ]
        if causes and given_up == float("inf"):
            given_up = time.monotonic() + PEER_SECONDS
        if time.monotonic() > given_up:
            ranks.signal_ranks(place, signal.SIGKILL)
