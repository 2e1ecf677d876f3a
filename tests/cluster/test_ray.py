"""Ray on CPU: the stages through `infir2 launch ray` and `ray job submit`.

Ranks, nodes and engines die or get stuck; runs are stopped; exit codes arrive. Needs root, unshare
and the `ray` program of the environment that INFIR2_RAY_BIN names (`make test-cluster` makes one).
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluations import assert_each_answer_once, evalscope_environment, write_questions
from stages import (
    assert_each_step_once,
    assert_same_state,
    curve,
    guessing,
    make_guessing_start,
    make_model,
    options,
    run,
)

RAY = Path(os.environ.get("INFIR2_RAY_BIN") or "/nonexistent") / "ray"
pytestmark = pytest.mark.skipif(
    os.environ.get("INFIR2_CLUSTER") != "1"
    or os.geteuid() != 0
    or not RAY.exists()
    or shutil.which("unshare") is None,
    reason="needs make test-cluster, root and unshare",
)
INFIR2 = f"{shlex.quote(str(RAY.with_name('python')))} -m infir2"
LAUNCH = f"{INFIR2} launch ray --cpu --cpus-per-rank 0.5 --gpus-per-node"


def on_ray(script: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """The shell script beside a Ray head, working in `directory`."""
    head = str(Path(__file__).parent / "ray_head.sh")
    command = [
        "unshare",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "bash",
        head,
        str(RAY),
        "bash",
        "-c",
        script,
    ]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_guessing_start(world, tmp_path_factory.mktemp("start"))


def rl_words(world: Path, start: Path, run_dir: Path, **values: object) -> list[str]:
    given = {
        "schedule__total_steps": 6,
        "checkpoint__save_every": 2,
        "rl__max_response_tokens": 24,
        "rl__overlong_buffer_tokens": 24,
    }
    return options(
        world,
        run_dir,
        "rl1",
        **(given | guessing(start) | values),
    )


@pytest.fixture(scope="module")
def undisturbed_rl(world: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process, without Ray."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run(rl_words(world, start, directory))
    return directory


def test_sft_and_rl_survive_a_dead_rank_and_a_dead_node(
    world: Path, start: Path, undisturbed_rl: Path, tmp_path: Path
) -> None:
    """RL on two ranks, each with an engine."""

    def sft(name: str) -> list[str]:
        return options(
            world,
            tmp_path / name,
            "sft1",
            schedule__total_steps=30,
            checkpoint__save_every=5,
            model__path=start / "cpt",
        )

    run(sft("sft-undisturbed"))
    script = f"""
    export INFIR2_FAULTS=train.step:18
    {LAUNCH} 1 --max-restarts 2 -- {shlex.join(sft("sft"))}; echo "code $?"
    unset INFIR2_FAULTS
    {LAUNCH} 2 -- {shlex.join(rl_words(world, start, tmp_path / "rl"))} & waiting=$!
    until grep -qs '"step": 3' rl/metrics.jsonl || ! kill -0 $waiting; do sleep 0.1; done
    kill -9 $(pgrep -f '^ray::Node')  # the node's actor, and by the kernel all that it started
    wait $waiting; echo "code $?"
    """
    began = time.monotonic()
    result = on_ray(script, tmp_path)
    said = result.stdout + result.stderr
    assert result.stdout.count("code 0") == 2, said
    assert said.count("restarts left, from the newest checkpoint") in (2, 3), (
        said
    )  # the 18th step of one life or two, as saves went
    assert "resumed from" in said  # the ranks' words reach the driver
    assert curve(tmp_path / "sft", "loss", "gradient_norm") == curve(
        tmp_path / "sft-undisturbed", "loss", "gradient_norm"
    )
    assert_same_state(tmp_path / "sft", tmp_path / "sft-undisturbed")
    close(tmp_path / "rl", undisturbed_rl)
    print(f"{time.monotonic() - began:.0f} s")


def close(found: Path, wanted: Path) -> None:
    """The same rewards, and losses to the bound of data parallelism (docs/parallel.md)."""
    assert curve(found, "reward", "response_tokens") == curve(wanted, "reward", "response_tokens")
    assert curve(found, "loss") == [pytest.approx(line, rel=1e-6) for line in curve(wanted, "loss")]


def kill_engines(times: int) -> str:
    """Shell: SIGKILL `times` times an engine that is generating, after the first step."""
    return f"""
    for _ in $(seq {times}); do
      until grep -qs '"step": 1' rl/metrics.jsonl &&
        pid=$(pgrep -f '^ray::EngineActor.generate' | head -n 1) && [ -n "$pid" ]; do
        sleep 0.05
      done
      kill -9 $pid; while kill -0 $pid 2>/dev/null; do sleep 0.05; done
    done &
    """


@pytest.mark.parametrize(("engines", "kills", "restarts"), [(2, 1, 3), (1, 2, 1)])
def test_engines_apart_die_in_a_step(
    world: Path,
    start: Path,
    undisturbed_rl: Path,
    tmp_path: Path,
    engines: int,
    kills: int,
    restarts: int,
) -> None:
    """One of two dies: the other does its work, and Ray restarts it.

    The only one dies twice, more often than allowed: the run restarts from the newest checkpoint.
    """
    words = shlex.join(rl_words(world, start, tmp_path / "rl"))
    launch = f"{LAUNCH} 1 --engines {engines} --max-restarts {restarts}"
    script = f'{kill_engines(kills)}\n{launch} -- {words}; echo "code $?"'
    result = on_ray(script, tmp_path)
    said = result.stdout + result.stderr
    assert "code 0" in result.stdout, said
    assert said.count("a rollout engine died") == kills, said
    assert ("every rollout engine has died" in said) == (kills > restarts), said
    assert said.count("restarts left, from the newest checkpoint") == (kills > restarts), said
    assert curve(tmp_path / "rl", "reward", "loss", "gradient_norm") == curve(
        undisturbed_rl, "reward", "loss", "gradient_norm"
    )
    assert_same_state(tmp_path / "rl", undisturbed_rl)


@pytest.mark.parametrize("call", ["generate", "load"])
def test_an_engine_that_makes_no_progress_is_ended(
    world: Path, start: Path, undisturbed_rl: Path, tmp_path: Path, call: str
) -> None:
    """SIGSTOP to one of two: it is killed after the timeout, and Ray restarts it."""
    words = shlex.join(rl_words(world, start, tmp_path / "rl", parallel__timeout_seconds=20))
    script = f"""
    until_trained() {{
      until [ {call} = generate ] || grep -qs '"step": 1,' rl/metrics.jsonl; do sleep 0.01; done
    }}
    stop() {{
      until pid=$(pgrep -f '^ray::EngineActor.{call}' | head -n 1) && [ -n "$pid" ]; do
        sleep 0.01
      done
      kill -STOP $pid
    }}
    ( until_trained; stop ) &
    {LAUNCH} 1 --engines 2 -- {words}; echo "code $?"
    """
    result = on_ray(script, tmp_path)
    said = result.stdout + result.stderr
    assert "code 0" in result.stdout, said
    assert said.count("a rollout engine made no progress in 20 s; killing it") == 1, said
    assert said.count("a rollout engine died") == (call == "generate"), said
    assert curve(tmp_path / "rl", "reward", "loss", "gradient_norm") == curve(
        undisturbed_rl, "reward", "loss", "gradient_norm"
    )
    assert_same_state(tmp_path / "rl", undisturbed_rl)


def kill_an_actor(name: str) -> str:
    """Shell: SIGKILL an actor of this class after the first step."""
    return f"""
    ( until grep -qs '"step": 1,' rl/metrics.jsonl; do sleep 0.05; done
      kill -9 $(pgrep -f '^ray::{name}' | head -n 1) ) &
    """


def test_servers_apart_are_started_by_actors(
    world: Path, start: Path, undisturbed_rl: Path, tmp_path: Path
) -> None:
    """`infir2 serve` in two bundles; an actor is killed, its server ends and starts again."""
    words = rl_words(world, start, tmp_path / "rl", rollout__engine="infir2")
    script = f"""
    {kill_an_actor("ServerActor")}
    {LAUNCH} 1 --engines 2 -- {shlex.join([*words, "--rollout.cache_gib=0.1"])}; echo "code $?"
    sleep 1; pgrep -fc '[i]nfir2 serve'
    """
    result = on_ray(script, tmp_path)
    said = result.stdout + result.stderr
    assert "code 0" in result.stdout, said
    assert result.stdout.split("code 0")[1].split() == ["0"], f"servers outlive the run: {said}"
    assert curve(tmp_path / "rl", "reward", "loss", "gradient_norm") == curve(
        undisturbed_rl, "reward", "loss", "gradient_norm"
    )
    restarts = [count for _, count in curve(tmp_path / "rl", "engine_restarts")]
    assert sum(restarts) == 1, said
    assert_same_state(tmp_path / "rl", undisturbed_rl)


def test_servers_beside_the_ranks_of_two_nodes(
    world: Path, start: Path, undisturbed_rl: Path, tmp_path: Path
) -> None:
    """One server in the bundle of each node; the weights lie in the run directory."""
    words = rl_words(world, start, tmp_path / "rl", rollout__engine="infir2", rollout__engines=2)
    script = f"""
    {shlex.quote(str(RAY))} start --address=$RAY_ADDRESS --node-ip-address=127.0.0.1 \
      --num-cpus=1 --disable-usage-stats
    {LAUNCH} 1 --nodes 2 -- {shlex.join([*words, "--rollout.cache_gib=0.1"])}; echo "code $?"
    """
    result = on_ray(script, tmp_path)
    said = result.stdout + result.stderr
    assert "code 0" in result.stdout, said
    assert "the servers read the weights from" in said
    assert {count for _, count in curve(tmp_path / "rl", "engines_serving")} == {2.0}
    close(tmp_path / "rl", undisturbed_rl)


def test_a_preempted_run_with_engines_apart_saves_and_goes_on(
    world: Path, start: Path, tmp_path: Path
) -> None:
    """SIGTERM to the launcher: code 75, the last step is saved; the resumed run ends the same."""

    def words(name: str) -> list[str]:
        return rl_words(
            world, start, tmp_path / name, schedule__total_steps=16, checkpoint__save_every=100
        )

    run(words("undisturbed"))
    launch = f"{LAUNCH} 1 --engines 1 -- {shlex.join(words('rl'))}"
    script = f"""
    {launch} & waiting=$!
    until grep -qs '"step": 2' rl/metrics.jsonl || ! kill -0 $waiting; do sleep 0.1; done
    kill -TERM $waiting; wait $waiting; echo "code $?"; ls rl/checkpoints
    {launch}; echo "code $?"
    """
    result = on_ray(script, tmp_path)
    said = result.stdout + result.stderr
    assert [word.split()[0] for word in result.stdout.split("code ")[1:]] == ["75", "0"], said
    assert "step-" in result.stdout.split("code ")[1], said
    assert "resumed from" in said
    assert curve(tmp_path / "rl", "reward", "loss", "gradient_norm") == curve(
        tmp_path / "undisturbed", "reward", "loss", "gradient_norm"
    )
    assert_same_state(tmp_path / "rl", tmp_path / "undisturbed")


def test_asynchronous_rl_outlives_an_engine_and_a_rank(
    world: Path, start: Path, tmp_path: Path
) -> None:
    """Two ranks train while two engines sample: an engine dies and, in another run, a rank."""

    def asynchronous(name: str) -> list[str]:
        return rl_words(
            world,
            start,
            tmp_path / name,
            rl__max_off_policy_steps=1,
            rl__mini_batches=1,
            schedule__total_steps=8,
        )

    run(asynchronous("undisturbed"))
    script = f"""
    {kill_engines(1)}
    {LAUNCH} 2 --engines 2 -- {shlex.join(asynchronous("rl"))}; echo "code $?"
    export INFIR2_FAULTS=train.step:5
    {LAUNCH} 1 --engines 1 -- {shlex.join(asynchronous("again"))}; echo "code $?"
    """
    result = on_ray(script, tmp_path)
    said = result.stdout + result.stderr
    assert result.stdout.count("code 0") == 2, said
    assert said.count("a rollout engine died") == 1, said
    assert "restarts left, from the newest checkpoint" in said, said
    assert curve(tmp_path / "rl", "staleness") == [(step, int(step > 1)) for step in range(1, 9)]
    close(tmp_path / "rl", tmp_path / "undisturbed")
    assert_each_step_once(tmp_path / "rl", 8)
    assert_each_step_once(tmp_path / "again", 8)


def test_two_nodes_go_on_when_a_dead_one_is_replaced(world: Path, tmp_path: Path) -> None:
    """Two raylets with a rank each: one is killed; another starts while the launcher waits."""
    words = options(
        world,
        tmp_path / "run",
        "cpt",
        schedule__total_steps=60,
        checkpoint__save_every=5,
        train__validate_every=0,
    )
    single_process = [
        sys.executable,
        "-m",
        "infir2",
        "launch",
        "torchrun",
        "--gpus-per-node",
        "2",
        "--",
        *words[:2],
    ]
    subprocess.run(
        [*single_process, *words[2:], f"--run.dir={tmp_path / 'undisturbed'}"],
        check=True,
        timeout=240,
    )
    script = f"""
    node() {{
      {shlex.quote(str(RAY))} start --address=$RAY_ADDRESS --node-ip-address=127.0.0.1 \
        --num-cpus=1 --disable-usage-stats
    }}
    head=$(pgrep -x raylet); node; second=$(pgrep -x raylet | grep -vx $head)
    {LAUNCH} 1 --nodes 2 -- {shlex.join(words)} > log 2>&1 & waiting=$!
    until grep -qs '"step": 12,' run/metrics.jsonl || ! kill -0 $waiting; do sleep 0.1; done
    kill -9 $second
    for _ in $(seq 300); do grep -q "waits up to 30 minutes" log && break; sleep 0.1; done
    node
    wait $waiting; echo "code $?"
    """
    result = on_ray(script, tmp_path)
    said = result.stdout + result.stderr + (tmp_path / "log").read_text()
    assert "code 0" in result.stdout, said
    assert said.count("restarts left, from the newest checkpoint") == 1, said
    assert "resumed from" in said
    assert curve(tmp_path / "run", "loss", "gradient_norm") == curve(
        tmp_path / "undisturbed", "loss", "gradient_norm"
    )
    assert_same_state(tmp_path / "run", tmp_path / "undisturbed")


def test_the_budget_of_restarts_is_the_whole_runs_and_a_stop_is_heard_without_room(
    world: Path, tmp_path: Path
) -> None:
    words = shlex.join(
        options(world, tmp_path / "run", "cpt", schedule__total_steps=5, train__validate_every=0)
    )
    script = f"""
    INFIR2_FAULTS=train.step:1 {LAUNCH} 1 --max-restarts 2 -- {words} 2> log; echo "code $?"
    {LAUNCH} 1 --cpus-per-rank 9 -- {words} & waiting=$!
    sleep 8; kill -TERM $waiting; wait $waiting; echo "code $?"
    """
    result = on_ray(script, tmp_path)
    log = (tmp_path / "log").read_text()
    assert [text.split()[0] for text in result.stdout.split("code ")[1:]] == ["71", "75"], (
        result.stdout + result.stderr + log
    )
    assert [f"a worker died; {left} restarts left" in log for left in (3, 2, 1, 0)] == [
        False,
        True,
        True,
        True,
    ], log
    assert log.count("a worker died") == 3


def test_ray_job_submit_runs_a_recipe_and_a_wrong_one_is_said(
    world: Path, start: Path, undisturbed_rl: Path, tmp_path: Path
) -> None:
    """CPT; RL on two ranks that share an engine apart."""
    words = options(
        world, tmp_path / "run", "cpt", schedule__total_steps=5, train__validate_every=0
    )
    (tmp_path / "empty").mkdir()
    submit = (
        f"env -u RAY_ADDRESS {shlex.quote(str(RAY))} job submit --working-dir empty -- {LAUNCH}"
    )
    script = f"""
    {submit} 1 -- {shlex.join(words)}; echo "code $?"
    {submit} 2 --engines 1 -- {shlex.join(rl_words(world, start, tmp_path / "rl"))}; echo "code $?"
    {submit} 1 -- {shlex.join([*words, "--run.sed=1"])}; echo "code $?"
    """
    result = on_ray(script, tmp_path)
    assert result.stdout.count("code 0") == 2, result.stdout + result.stderr
    assert "code 1" in result.stdout  # Ray's own code for a failed job
    assert "did you mean run.seed" in result.stdout + result.stderr
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5]
    close(tmp_path / "rl", undisturbed_rl)


def test_a_benchmark_uses_the_engines_of_two_nodes_and_goes_on_after_a_stop(
    world: Path, tmp_path: Path
) -> None:
    make_model(world, tmp_path / "model")
    write_questions(tmp_path / "data")
    script = f"""
    export INFIR2_EVALSCOPE={evalscope_environment(tmp_path)}
    {shlex.quote(str(RAY))} start --address=$RAY_ADDRESS --node-ip-address=127.0.0.1 \
      --num-cpus=1 --disable-usage-stats
    start() {{
      {LAUNCH} 1 --nodes 2 -- eval model --benchmarks aime24 --data data --run.dir run \
        --samples 8 --max-tokens 300 --parallel 4
    }}
    start & waiting=$!
    until [ "$(cat run/answers.jsonl 2>/dev/null | wc -l)" -gt 3 ] || ! kill -0 $waiting
    do sleep 0.2; done
    kill -TERM $(pgrep -P $waiting -f 'launch ray' || echo $waiting)
    wait $waiting; echo "code $?"
    start; echo "code $?"
    """
    result = on_ray(script, tmp_path)
    said = result.stdout + result.stderr
    assert [word.split()[0] for word in result.stdout.split("code ")[1:]] == ["75", "0"], said
    assert "of 24 answers" in said
    assert len(assert_each_answer_once(tmp_path / "run", 24)) == 4, said
