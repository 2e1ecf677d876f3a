"""Ray on CPU: SFT and RL through `infir2 launch ray` and `ray job submit`, a dead rank and a dead node, codes.

Needs root, unshare and the `ray` program of the environment named by INFIR2_RAY_BIN (`make test-cluster` makes one).
"""

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from stages import assert_same_state, curve, make_rl_start, options, run

RAY = Path(os.environ.get("INFIR2_RAY_BIN") or "/nonexistent") / "ray"
pytestmark = pytest.mark.skipif(
    os.environ.get("INFIR2_CLUSTER") != "1" or os.geteuid() != 0 or not RAY.exists() or shutil.which("unshare") is None,
    reason="needs make test-cluster, root and unshare",
)
INFIR2 = f"{shlex.quote(str(RAY.with_name('python')))} -m infir2"
LAUNCH = f"{INFIR2} launch ray --cpu --cpus-per-rank 0.5 --gpus-per-node 1"


def on_ray(script: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """The shell script beside a Ray head, working in `directory`."""
    head = str(Path(__file__).parent / "ray_head.sh")
    command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", head, str(RAY), "bash", "-c", script]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rl_start(world, tmp_path_factory.mktemp("start"))


def test_sft_and_rl_survive_a_dead_rank_and_a_dead_node(world: Path, start: Path, tmp_path: Path) -> None:
    def sft(name: str) -> list[str]:
        return options(world, tmp_path / name, "sft1", schedule__total_steps=30, checkpoint__save_every=5, model__path=start / "cpt")

    def rl(name: str) -> list[str]:
        words = options(world, tmp_path / name, "rl1", schedule__total_steps=6, checkpoint__save_every=2, rl__overlong_buffer_tokens=6)
        return [*words, f"--model.path={start / 'cpt'}", f"--rollout.model={start / 'fp8'}"]

    run(sft("sft-undisturbed"))
    run(rl("rl-undisturbed"))
    script = f"""
    INFIR2_FAULTS=train.step:18 {LAUNCH} --max-restarts 2 -- {shlex.join(sft("sft"))}; echo "code $?"
    {LAUNCH} -- {shlex.join(rl("rl"))} & waiting=$!
    until grep -qs '"step": 3' rl/metrics.jsonl || ! kill -0 $waiting; do sleep 0.1; done
    kill -9 $(pgrep -f '^ray::Node')  # the node's actor, and by the kernel all that it started
    wait $waiting; echo "code $?"
    """
    began = time.monotonic()
    result = on_ray(script, tmp_path)
    said = result.stdout + result.stderr
    assert result.stdout.count("code 0") == 2, said
    assert said.count("restarts left, from the newest checkpoint") in (2, 3), said  # the 18th step of one life or two, as saves went
    assert "resumed from" in said  # the ranks' words reach the driver
    for kind in ("sft", "rl"):
        assert curve(tmp_path / kind, "loss", "gradient_norm") == curve(tmp_path / f"{kind}-undisturbed", "loss", "gradient_norm")
        assert_same_state(tmp_path / kind, tmp_path / f"{kind}-undisturbed")
    print(f"{time.monotonic() - began:.0f} s")


def test_ray_job_submit_runs_a_recipe_and_a_wrong_one_is_said(world: Path, tmp_path: Path) -> None:
    words = options(world, tmp_path / "run", "cpt", schedule__total_steps=5, train__validate_every=0)
    (tmp_path / "empty").mkdir()
    submit = f"env -u RAY_ADDRESS {shlex.quote(str(RAY))} job submit --working-dir empty -- {LAUNCH}"
    script = f"""
    {submit} -- {shlex.join(words)}; echo "code $?"
    {submit} -- {shlex.join([*words, "--run.sed=1"])}; echo "code $?"
    """
    result = on_ray(script, tmp_path)
    assert "code 0" in result.stdout, result.stdout + result.stderr
    assert "code 1" in result.stdout  # Ray's own code for a failed job
    assert "did you mean run.seed" in result.stdout + result.stderr
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5]
