"""Real SLURM, two virtual nodes: a preempted job saves, is queued again and goes on; codes and ranks cross nodes.

Needs root, unshare and the distribution's SLURM (Debian: apt-get install slurm-wlm munge); `make test-cluster`.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stages import assert_same_state, curve, options, run

NODES = Path(__file__).parent / "slurm_nodes.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
pytestmark = pytest.mark.skipif(
    os.environ.get("INFIR2_CLUSTER") != "1" or os.geteuid() != 0 or any(shutil.which(name) is None for name in NEEDED),
    reason=f"needs make test-cluster, root and {', '.join(NEEDED)}",
)
INFIR2 = f"{shlex.quote(sys.executable)} -m infir2"


def on_slurm(script: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """The shell script on two idle nodes, working in `directory`."""
    command = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "bash", str(NODES), "bash", "-c", script]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=500)


def test_a_preempted_job_is_queued_again_and_ends_as_if_it_had_not_been(world: Path, tmp_path: Path) -> None:
    def words(name: str) -> list[str]:
        return options(world, tmp_path / name, "cpt", schedule__total_steps=80, checkpoint__save_every=1000, train__validate_every=0)

    run(words("undisturbed"))
    script = f"""
    {INFIR2} launch slurm --cpu -- {shlex.join(words("run"))} & waiting=$!
    until [ "$(wc -l < run/metrics.jsonl 2>/dev/null || echo 0)" -gt 5 ]; do sleep 0.2; done
    job=$(squeue -h -o %i)
    scancel --signal=TERM "$job"  # what preemption and the time limit send
    until scontrol show job "$job" | grep -q Restarts=1; do sleep 0.5; done
    scontrol update jobid="$job" StartTime=now  # a requeued job would wait two minutes
    wait $waiting; echo "code $?"
    """
    result = on_slurm(script, tmp_path)
    log = "".join(path.read_text() for path in tmp_path.glob("infir2-cpt-*.log"))
    assert "code 0" in result.stdout, result.stdout + result.stderr + log
    assert "the worst rank ended with code 75" in log
    assert "resumed from" in log
    assert curve(tmp_path / "run", "loss", "gradient_norm") == curve(tmp_path / "undisturbed", "loss", "gradient_norm")
    assert_same_state(tmp_path / "run", tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".infir2-ranks-*"))


def test_ranks_of_two_nodes_meet_and_the_worst_code_comes_back(world: Path, tmp_path: Path) -> None:
    words = options(world, tmp_path / "run", "cpt", schedule__total_steps=4, checkpoint__save_every=2, train__validate_every=0)
    launch = f"{INFIR2} launch slurm --cpu --nodes 2 --gpus-per-node 1 --max-restarts 0 --"
    script = f"""
    {launch} {shlex.join(words)}; echo "code $?"
    {launch} {shlex.join([*words, "--run.sed=1"])}; echo "code $?"
    """
    result = on_slurm(script, tmp_path)
    log = "".join(path.read_text() for path in sorted(tmp_path.glob("infir2-cpt-*.log")))
    assert result.stdout.split("code ")[1:] == ["0\nSubmitted batch job 2\n", "2\n"], result.stdout + result.stderr + log
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == [1, 2, 3, 4]
    assert "did you mean run.seed" in log
