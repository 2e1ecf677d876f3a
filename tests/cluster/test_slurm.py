"""Real SLURM on two virtual nodes: preemption, cancellation, exit codes and ranks of both nodes.

Needs root, unshare and the distribution's SLURM (Debian: apt-get install slurm-wlm munge);
`make test-cluster`.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from evaluations import EVALSCOPE, assert_each_answer_once, evalscope_environment, write_questions
from stages import RECIPES, assert_same_state, curve, lines, make_model, options, run

NODES = Path(__file__).parent / "slurm_nodes.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
pytestmark = pytest.mark.skipif(
    os.environ.get("INFIR2_CLUSTER") != "1"
    or os.geteuid() != 0
    or any(shutil.which(name) is None for name in NEEDED),
    reason=f"needs make test-cluster, root and {', '.join(NEEDED)}",
)
INFIR2 = f"{shlex.quote(sys.executable)} -m infir2"
LAUNCH = f"{INFIR2} launch slurm --cpu --gpus-per-node 1 --"

# Wait until the job has been requeued, and start it at once instead of after two minutes.
REQUEUED = """
    until scontrol show job "$job" | grep -q Restarts=1 && [ -z "$(squeue -h -t completing)" ]
    do sleep 0.5; done
    sleep 1; scontrol update jobid="$job" StartTime=now
"""


def on_slurm(script: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """The shell script on two idle nodes, working in `directory`."""
    command = [
        "unshare",
        "--net",
        "--pid",
        "--mount",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "bash",
        str(NODES),
        "bash",
        "-c",
        script,
    ]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=500
    )


def test_a_preempted_job_is_queued_again_and_ends_as_if_it_had_not_been(
    world: Path, tmp_path: Path
) -> None:
    def words(name: str) -> list[str]:
        return options(
            world,
            tmp_path / name,
            "cpt",
            schedule__total_steps=80,
            checkpoint__save_every=1000,
            train__validate_every=0,
        )

    run(words("undisturbed"))
    script = f"""
    {LAUNCH} {shlex.join(words("run"))} & waiting=$!
    until [ "$(wc -l < run/metrics.jsonl 2>/dev/null || echo 0)" -gt 5 ]; do sleep 0.2; done
    job=$(squeue -h -o %i)
    scancel --signal=TERM "$job"  # what preemption and the time limit send
    {REQUEUED}
    wait $waiting; echo "code $?"
    """
    result = on_slurm(script, tmp_path)
    log = "".join(path.read_text() for path in tmp_path.glob("infir2-cpt-*.log"))
    assert "code 0" in result.stdout, result.stdout + result.stderr + log
    assert "the worst rank ended with code 75" in log
    assert "resumed from" in log
    assert curve(tmp_path / "run", "loss", "gradient_norm") == curve(
        tmp_path / "undisturbed", "loss", "gradient_norm"
    )
    assert_same_state(tmp_path / "run", tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".infir2-ranks-*"))


def test_the_time_limit_queues_a_job_again_and_scancel_ends_it(world: Path, tmp_path: Path) -> None:
    words = options(
        world,
        tmp_path / "run",
        "cpt",
        schedule__total_steps=100000,
        checkpoint__save_every=100000,
        train__validate_every=0,
    )
    limit = "--sbatch=--time=1 --sbatch=--signal=TERM@45"
    script = f"""
    lines() {{ wc -l < run/metrics.jsonl 2>/dev/null || echo 0; }}
    {LAUNCH.removesuffix("--")} {limit} -- {shlex.join(words)} & waiting=$!
    until job=$(squeue -h -o %i) && [ -n "$job" ]; do sleep 0.2; done
    {REQUEUED}
    scontrol update jobid="$job" TimeLimit=10
    before=$(lines)
    until [ "$(lines)" -gt $((before + 5)) ] || ! kill -0 $waiting; do sleep 0.2; done
    scancel "$job"
    wait $waiting; echo "code $?"; sleep 3
    scontrol show job "$job" | grep -oE 'JobState=[A-Z]*|Restarts=[0-9]*'
    """
    result = on_slurm(script, tmp_path)
    log = "".join(path.read_text() for path in tmp_path.glob("infir2-cpt-*.log"))
    assert "JobState=CANCELLED\nRestarts=1" in result.stdout, result.stdout + result.stderr + log
    assert log.count("the worst rank ended with code 75") == 2, log  # it saved both times
    assert "resumed from" in log


def test_sft_and_an_evaluation_are_jobs_too(world: Path, tmp_path: Path) -> None:
    run(options(world, tmp_path / "cpt", "cpt", schedule__total_steps=4))
    sft = options(
        world, tmp_path / "sft", "sft1", schedule__total_steps=6, model__path=tmp_path / "cpt"
    )
    score = [
        "eval",
        str(RECIPES / "eval.toml"),
        f"--model.path={tmp_path / 'sft'}",
        f"--run.dir={tmp_path / 'eval'}",
        "--run.threads=1",
    ]
    score += [
        f"--evaluate.problems.0.path={world / 'heldout.jsonl'}",
        "--evaluate.max_response_tokens=16",
    ]
    long = [*score, "--evaluate.samples=100", f"--run.dir={tmp_path / 'stopped'}"]
    script = f"""
    {LAUNCH} {shlex.join(sft)}; echo "code $?"
    {LAUNCH} {shlex.join(score)}; echo "code $?"
    {LAUNCH} {shlex.join(long)} & waiting=$!
    until squeue -h -t running -o %i | grep -qx 3 && pgrep -f samples=100 > /dev/null
    do sleep 0.2; done
    sleep 6; scancel --signal=TERM 3; wait $waiting; echo "code $?"
    scontrol show job 3 | grep -o 'Requeue=.*Restarts=[0-9]*'
    """
    result = on_slurm(script, tmp_path)
    log = "".join(path.read_text() for path in sorted(tmp_path.glob("infir2-*.log")))
    codes = [text.split()[0] for text in result.stdout.split("code ")[1:]]
    assert codes == ["0", "0", "0"], result.stdout + result.stderr + log
    assert "Requeue=1 Restarts=1" in result.stdout
    assert "Stopped; the responses so far are kept" in log
    assert len(curve(tmp_path / "sft", "loss")) == 6
    assert lines(tmp_path / "eval", "evaluation")[0]["num_problems"] == 12


def test_ranks_of_two_nodes_meet_and_the_worst_code_comes_back(world: Path, tmp_path: Path) -> None:
    words = options(
        world,
        tmp_path / "run",
        "cpt",
        schedule__total_steps=4,
        checkpoint__save_every=2,
        train__validate_every=0,
    )
    launch = f"{INFIR2} launch slurm --cpu --nodes 2 --gpus-per-node 1 --max-restarts 0 --"
    script = f"""
    {launch} {shlex.join(words)}; echo "code $?"
    {launch} {shlex.join([*words, "--run.seed=1"])}; echo "code $?"
    """
    result = on_slurm(script, tmp_path)
    log = "".join(path.read_text() for path in sorted(tmp_path.glob("infir2-cpt-*.log")))
    assert result.stdout.split("code ")[1:] == ["0\nSubmitted batch job 2\n", "2\n"], (
        result.stdout + result.stderr + log
    )
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == [1, 2, 3, 4]
    assert "this run was started with run.seed" in log


@pytest.fixture
def evaluation(world: Path, tmp_path: Path) -> str:
    """Shell: the variables of eval/*.sh, and `eval` beside the submitted script."""
    make_model(world, tmp_path / "model")
    write_questions(tmp_path / "data")
    (tmp_path / "eval").symlink_to(Path(__file__).resolve().parents[2] / "eval")
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin/infir2"
    tool.write_text(f'#!/bin/sh\nexec {INFIR2} "$@"\n')
    tool.chmod(0o755)
    return f"""
    export PATH={tmp_path}/bin:$PATH INFIR2_EVALSCOPE={evalscope_environment(tmp_path)}
    export MODEL_PATH=model DATASET_LOCAL=data EVAL_WORK_DIR=out ENGINE=native GENERATED_NUM=8
    answers() {{ cat out/$1/answers.jsonl 2>/dev/null | wc -l; }}
    """


def test_a_benchmark_uses_the_engines_of_two_nodes_and_goes_on_after_a_requeue(
    evaluation: str, tmp_path: Path
) -> None:
    """`sbatch --nodes=2 eval/aime24_eval.sh`, preempted in the middle."""
    script = f"""{evaluation}
    export MAX_NEW_TOKENS=300 EVAL_BATCH=4
    sbatch --nodes=2 --wait eval/aime24_eval.sh & waiting=$!
    until [ "$(answers aime24)" -gt 3 ] || ! kill -0 $waiting; do sleep 0.2; done
    job=$(squeue -h -o %i)
    scancel --signal=TERM "$job"
    {REQUEUED}
    echo "kept $(answers aime24)"
    wait $waiting; echo "code $?"
    pgrep -f 'infir2 [s]erve' || echo "no engine is left"
    """
    result = on_slurm(script, tmp_path)
    log = "".join(path.read_text() for path in tmp_path.glob("infir2-aime24-*.log"))
    said = result.stdout + result.stderr + log
    assert "code 0" in result.stdout, said
    assert "the worst rank ended with code 75" in log
    assert "no engine is left" in result.stdout
    kept = int(result.stdout.split("kept ")[1].split()[0])
    assert 3 < kept < 24, said
    assert f"resumed after {kept} of 24 answers" in log
    engines = assert_each_answer_once(tmp_path / "out/aime24", 24)
    assert len(engines) == 3, "the first node's own port, the other one before and after"
    assert not list(tmp_path.glob(".infir2-ranks-*"))


@pytest.mark.skipif(not EVALSCOPE, reason="needs evalscope: infir2 eval --setup")
def test_its_siblings_run_by_sbatch_too(evaluation: str, tmp_path: Path) -> None:
    names = {
        "aime25": "aime25", "gpqa": "gpqa_diamond", "livecodebenchv5": "live_code_bench"
    }  # fmt: skip
    script = f"{evaluation}\nexport MAX_NEW_TOKENS=5 GENERATED_NUM=2\n" + "\n".join(
        f'sbatch --wait eval/{name}_eval.sh; echo "code $?"' for name in names
    )
    result = on_slurm(script, tmp_path)
    log = "".join(path.read_text() for path in tmp_path.glob("infir2-*.log"))
    said = result.stdout + result.stderr + log
    assert [text.split()[0] for text in result.stdout.split("code ")[1:]] == ["0"] * 3, said
    for name in names.values():
        assert json.loads((tmp_path / "out" / name / "result.json").read_text())["complete"]


def test_launch_slurm_starts_benchmarks_and_a_refused_one_ends_on_all_nodes(
    evaluation: str, tmp_path: Path
) -> None:
    launch = f"{INFIR2} launch slurm --cpu --nodes 2 -- eval model --benchmarks aime24"
    script = f"""{evaluation}
    {launch} --data data --run.dir run --samples 2 --max-tokens 5; echo "code $?"
    {launch} --data none --run.dir other --samples 2; echo "code $?"
    """
    result = on_slurm(script, tmp_path)
    log = "".join(path.read_text() for path in sorted(tmp_path.glob("infir2-eval-*.log")))
    said = result.stdout + result.stderr + log
    assert [text.split()[0] for text in result.stdout.split("code ")[1:]] == ["0", "4"], said
    assert len(assert_each_answer_once(tmp_path / "run", 6)) == 2, said
    assert "none does not exist" in log
