"""`infir2 launch slurm`: a batch job that saves when it is told to go, is queued again, and goes on.

SLURM sends SIGTERM before the time limit (`--signal`) and on preemption; the ranks save and end with 75; the script then asks
for the job to be queued again, and the same command resumes from the newest checkpoint. A job that scancel has cancelled, and an
evaluation, which would begin anew, end.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from infir2.errors import ConfigError
from infir2.launch.ranks import PREEMPTED, VARIABLE
from infir2.launch.torchrun import Layout

SAVE_SECONDS = 300  # SIGTERM comes so long before the time limit
_IS_CANCELLED = '! scontrol show job "$SLURM_JOB_ID" | grep -Eq "JobState=RUNNING|Reason=TimeLimit"'  # one that was signalled still runs


def batch_script(layout: Layout, words: Sequence[str], options: Sequence[str] = ()) -> str:
    """The script; `options` are further ones of sbatch, such as `--partition=gpu`."""
    cores = max(1, round(layout.cpus_per_rank * layout.ranks_per_node))
    gpus = [] if layout.cpu else [f"--gpus-per-node={layout.ranks_per_node}"]
    asked = [
        f"--job-name=infir2-{words[0]}",
        f"--nodes={layout.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cores}",
        *gpus,
    ]
    requeue = words[0] != "eval"
    asked += ["--requeue" if requeue else "--no-requeue", f"--signal=TERM@{SAVE_SECONDS}"]
    asked += ["--open-mode=append", f"--output=infir2-{words[0]}-%j.log", *options]
    launch = [sys.executable, "-m", "infir2", "launch", "torchrun", "--nodes", str(layout.nodes)]
    launch += [
        "--gpus-per-node",
        str(layout.ranks_per_node),
        "--max-restarts",
        str(layout.max_restarts),
    ]
    meet = (
        '--endpoint "$head:$((20000 + SLURM_JOB_ID % 20000))" --run-id "$SLURM_JOB_ID"'
        if layout.nodes > 1
        else ""
    )
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in asked),
        "trap : TERM  # the ranks get it too, and this shell has to outlive them",
        'node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "head=$(scontrol show node \"$node\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
        f'export {VARIABLE}="$PWD/.infir2-ranks-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"',
        f"srun {shlex.join(launch)} {meet} -- {shlex.join(words)}",
        f'{shlex.quote(sys.executable)} -m infir2.launch.ranks "${VARIABLE}"; code=$?; rm -rf "${VARIABLE}"',
        'echo "infir2 launch: the worst rank ended with code $code"',
        *(
            [f'[ $code != {PREEMPTED} ] || {_IS_CANCELLED} || scontrol requeue "$SLURM_JOB_ID"']
            if requeue
            else []
        ),
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def submit(script: str, wait: bool) -> int:
    """Hand the script to sbatch; with `wait`, stay until the job has ended for good and return its code."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            return subprocess.run(
                ["sbatch", *(["--wait"] if wait else []), file.name], env=os.environ, check=False
            ).returncode
        except FileNotFoundError as error:
            raise ConfigError(
                "sbatch is not on this machine: run this where SLURM is, or use infir2 launch torchrun."
            ) from error
