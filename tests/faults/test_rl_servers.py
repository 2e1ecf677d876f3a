"""RL through servers of ours: the same bits as in process, whatever happens to the servers."""

import os
import signal
from pathlib import Path

import pytest
from stages import assert_same_state, curve, gone, lines, make_guessing_start, options, run

import infir2.engines.servers
from infir2.engines.process_guard import descendants
from infir2.rl.dynamic_sampling import GroupGenerator

pytest.importorskip("fastapi")
NAMES = ("loss", "reward", "gradient_norm", "response_tokens", "groups_sampled", "accuracy")


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_guessing_start(world, tmp_path_factory.mktemp("start"))


def words(world: Path, start: Path, name: Path, **values: object) -> list[str]:
    given = {
        **{"schedule__total_steps": 3, "checkpoint__save_every": 3, "rl__mini_batches": 1},
        **{"rl__prompts_per_step": 6, "rl__over_sample_prompts": 12, "rl__group_size": 4},
        **{"rl__max_response_tokens": 24, "schedule__learning_rate": 1e-3},
        **{"model__path": start / "sft", "rollout__model": start / "fp8"},
        "data__sources__0__path": start / "problems.jsonl",
    }
    return options(world, name, "rl1", **given | values)


def server_pids() -> list[int]:
    """The `infir2 serve` processes below this one."""
    found = []
    for pid in descendants(os.getpid()):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"serve" in words and b"-S" not in words:
            found.append(pid)
    return sorted(found)


@pytest.mark.costly
def test_one_server_killed_and_one_stopped_in_a_batch(
    world: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(words(world, start, tmp_path / "a"))
    monkeypatch.setattr(infir2.engines.servers, "SILENCE_SECONDS", 3.0)
    real, harmed = GroupGenerator._finish, list[int]()

    def finish(self, *arguments):  # type: ignore[no-untyped-def]
        if not harmed:
            harmed.extend(server_pids())
            assert len(harmed) == 2
            os.kill(harmed[0], signal.SIGKILL)
            os.kill(harmed[1], signal.SIGSTOP)
        return real(self, *arguments)

    monkeypatch.setattr(GroupGenerator, "_finish", finish)
    servers = {"rollout__engine": "infir2", "rollout__engines": 2, "rollout__cache_gib": 0.1}
    run(words(world, start, tmp_path / "b", rollout__max_running_requests=4, **servers))
    assert harmed
    assert gone(harmed)
    assert not server_pids(), "servers outlive the run"
    assert curve(tmp_path / "b", *NAMES) == curve(tmp_path / "a", *NAMES)
    assert_same_state(tmp_path / "b", tmp_path / "a")
    trained = lines(tmp_path / "b", "train")
    assert max(line["mismatch_max"] for line in trained) <= 1e-4
    assert sum(line["engine_restarts"] for line in trained) == 2
    assert all(line["publish_bytes"] > 0 and line["publish_load_seconds"] > 0 for line in trained)
