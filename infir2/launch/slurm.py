"""`infir2 launch slurm`: a batch job that saves before its time limit, is requeued, and resumes.

SLURM sends SIGTERM before the time limit (`--signal`) and on preemption. The ranks save and exit
with 75; the script then requeues the job, and the same command resumes from the newest checkpoint.
A canceled job is not requeued.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from infir2.errors import ConfigError
from infir2.launch.ranks import PREEMPTED, RANKS_DIR_VARIABLE
from infir2.launch.torchrun import Layout

SAVE_SECONDS = 300  # from SIGTERM to the time limit
# A job that was only signaled is still running.
_IS_CANCELLED = '! scontrol show job "$SLURM_JOB_ID" | grep -Eq "JobState=RUNNING|Reason=TimeLimit"'


def batch_script(layout: Layout, command: Sequence[str], options: Sequence[str] = ()) -> str:
    """The script that runs `infir2 COMMAND`.

    Args:
        layout: the processes.
        command: the verb and its arguments.
        options: further options of sbatch, such as `--partition=gpu`.
    """
    ranks_dir = f"${RANKS_DIR_VARIABLE}"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _sbatch_options(layout, command[0])),
        *(f"#SBATCH {option}" for option in options),
        "trap : TERM  # SLURM signals the ranks too, and this shell has to outlive them",
        'node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "head=$(scontrol show node \"$node\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
        f"export {RANKS_DIR_VARIABLE}="
        '"$PWD/.infir2-ranks-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        f"srun {_node_command(layout)} -- {shlex.join(command)}",
        f'{shlex.quote(sys.executable)} -m infir2.launch.ranks "{ranks_dir}"; code=$?; '
        f'rm -rf "{ranks_dir}"',
        'echo "infir2 launch: the worst rank ended with code $code"',
        f'[ $code != {PREEMPTED} ] || {_IS_CANCELLED} || scontrol requeue "$SLURM_JOB_ID"',
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def _sbatch_options(layout: Layout, verb: str) -> list[str]:
    cores = max(1, round(layout.cpus_per_rank * layout.ranks_per_node))
    gpus = layout.gpus_per_rank * layout.ranks_per_node
    return [
        f"--job-name=infir2-{verb}",
        f"--nodes={layout.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cores}",
        *([] if layout.cpu else [f"--gpus-per-node={gpus}"]),
        "--requeue",
        f"--signal=TERM@{SAVE_SECONDS}",
        "--open-mode=append",
        f"--output=infir2-{verb}-%j.log",
    ]


def _node_command(layout: Layout) -> str:
    """The launcher of each node, as shell text: the rendezvous uses variables of the script."""
    command = [
        *(sys.executable, "-m", "infir2", "launch", "torchrun"),
        *("--nodes", str(layout.nodes)),
        *("--gpus-per-node", str(layout.ranks_per_node)),
        *("--max-restarts", str(layout.max_restarts)),
        *(["--cpu"] if layout.cpu else []),
    ]
    endpoint = '"$head:$((20000 + SLURM_JOB_ID % 20000))"'
    rendezvous = f' --endpoint {endpoint} --run-id "$SLURM_JOB_ID"' if layout.nodes > 1 else ""
    return shlex.join(command) + rendezvous


def run_in_job(script: str) -> int:
    """Run the script in the job of this process instead; does not return."""
    os.execvp("bash", ["bash", "-c", script])


def nodes_of_job() -> int:
    """How many nodes the job of this process has. Raises ConfigError outside of one."""
    number = os.environ.get("SLURM_JOB_NUM_NODES", "")
    if not number.isdecimal() or "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("--in-job is for a command inside a job of SLURM: submit it by sbatch.")
    return int(number)


def submit(script: str, wait: bool) -> int:
    """Submit the script. With `wait`, return the job's exit code, else sbatch's.

    Raises ConfigError where sbatch is not installed.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        command = ["sbatch", *(["--wait"] if wait else []), file.name]
        try:
            return subprocess.run(command, env=os.environ, check=False).returncode
        except FileNotFoundError as error:
            raise ConfigError(
                "sbatch is not installed on this machine: "
                "run the command on a SLURM login node, or use infir2 launch torchrun."
            ) from error
