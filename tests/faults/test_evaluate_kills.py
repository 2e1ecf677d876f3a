"""Evaluations that are killed or stopped: what was answered is never asked for again."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_evalscope
from gateways import ask, open_gateway
from scripted_server import Script, serving

from infir2.evaluate.journal import ANSWERS as JOURNAL

KILLS = 20 if os.environ.get("INFIR2_ALL_CASES") else 6
ANSWERS = 16 * KILLS  # a life answers a few before it is killed


def ask_everything(directory: Path, url: str) -> None:
    """All samples of all prompts, 6 at a time, as evalscope asks them."""
    os.setsid()
    with open_gateway(directory, [url]) as gateway, ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda i: ask(gateway, f"q{i % (ANSWERS // 4)}"), range(ANSWERS)))


def answered(directory: Path) -> dict[int, str]:
    """The text of each seed in the journal; a torn line is none."""
    path = directory / JOURNAL
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["seed"]: row["response"]["choices"][0]["message"]["content"] for row in rows}


def test_kills_cost_only_what_was_in_flight(tmp_path: Path) -> None:
    """Requests to the engines are the answers and those that were in flight at a kill."""
    script, kills, lost = Script(latency=0.03), 0, 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["infir2.evaluate.gateway"])
    draw = random.Random(0)
    with serving(script) as server:
        for _ in range(3 * KILLS):
            process = context.Process(target=ask_everything, args=(tmp_path, server.url))
            known, first = answered(tmp_path), len(script.requests)
            process.start()
            while process.is_alive() and len(script.requests) < first + draw.randrange(1, 5):
                time.sleep(0.002)
            if kills < KILLS and process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join()
            while server.running:  # requests that were on their way
                time.sleep(0.01)
            time.sleep(0.1)
            asked = [request["seed"] for request in script.requests[first:]]
            assert not set(asked) & known.keys(), "an answer on the disk was asked for again"
            assert len(set(asked)) == len(asked)
            new = len(answered(tmp_path)) - len(known)
            assert 0 <= len(asked) - new <= 6, "answers and those in flight"
            lost += len(asked) - new
            if process.exitcode == 0:
                break
    assert kills == KILLS
    assert process.exitcode == 0
    assert len(answered(tmp_path)) == ANSWERS
    assert len(script.requests) == ANSWERS + lost


def test_sigterm_ends_a_benchmark_tidily_and_the_next_command_goes_on(tmp_path: Path) -> None:
    script, run = Script(latency=0.2), tmp_path / "run"
    rows = [{"problem": f"How much is {i}+1?", "answer": i + 1} for i in range(4)]
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {
        "INFIR2_EVALSCOPE": str(fake_evalscope.make_environment(tmp_path / "es"))
    }
    with serving(script) as server:
        command = [
            *(sys.executable, "-m", "infir2", "eval", server.url, "--benchmarks", "aime24"),
            *("--data", str(tmp_path / "aime24.jsonl"), "--run.dir", str(run)),
            *("--samples", "8", "--parallel", "2"),
        ]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(script.requests) < 6:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert "the responses so far are kept" in errors
        assert "Traceback" not in errors
        assert subprocess.run(["pgrep", "-f", str(tmp_path / "es")]).returncode == 1
        kept = len(answered(run))
        assert kept >= 4
        again = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert f"resumed after {kept} of 32 answers" in again.stderr
    asked = [request["seed"] for request in script.requests]
    assert len(answered(run)) == len(set(asked)) == 32
    assert len(asked) <= 32 + 2
