"""What a recipe says of RL's responses: how they begin, how they end, what the template writes."""

import json
from pathlib import Path

import pytest
from stages import curve, guessing, make_guessing_start, options, run

from infir2.cli import main

VALUES = {
    "schedule__total_steps": 1,
    "rl__over_sample_prompts": 3,
    "rl__mini_batches": 1,
    "rl__evaluate_every": 0,
    "rl__max_response_tokens": 24,
}


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_guessing_start(world, tmp_path_factory.mktemp("start"))


def words(world: Path, start: Path, run_dir: Path, **values: object) -> list[str]:
    return options(world, run_dir, "rl1", **(VALUES | guessing(start) | values))


def texts(run_dir: Path) -> list[str]:
    rows = (run_dir / "rollouts" / "step-1-0.jsonl").read_text().splitlines()
    groups = [json.loads(row).get("responses", []) for row in rows]
    return [response["text"] for group in groups for response in group]


def test_a_stop_text_ends_a_response_with_every_engine(
    world: Path, start: Path, tmp_path: Path
) -> None:
    """It may lie across the boundary of two chunks, and a server may not know of it."""
    stop = {"rl__stop": "['k>\\b']"}
    server = {"rollout__engine": "infir2", "rollout__cache_gib": 0.1}
    cases = {"native": {}, "chunks": {"rl__chunk_tokens": 3}, "server": server}
    for name, values in cases.items():
        run(words(world, start, tmp_path / name, **stop, **values))
        cut = [text for text in texts(tmp_path / name) if "k>\\b" in text]
        assert len(cut) > 3
        # The token that completes it is the last, and may say more.
        longest = max((text[text.index("k>\\b") :] for text in cut), key=len)
        assert len(longest) <= len("k>\\boxed{"), (name, longest)
    names = ("reward", "response_tokens", "truncated_fraction")
    assert curve(tmp_path / "chunks", *names) == curve(tmp_path / "native", *names)
    assert curve(tmp_path / "server", *names) == curve(tmp_path / "native", *names)


def test_a_prefix_begins_every_response_and_is_not_trained(
    world: Path, start: Path, tmp_path: Path
) -> None:
    run(words(world, start, tmp_path / "run", rl__response_prefix="<think>;"))
    assert all(text.startswith("<think>;") for text in texts(tmp_path / "run"))
    rows = (tmp_path / "run" / "rollouts" / "step-1-0.jsonl").read_text().splitlines()
    first = json.loads(rows[0])["responses"][0]
    assert first["text"] != "<think>;"
    assert len(first["completion"]["token_ids"]) == len(first["completion"]["rollout_logprobs"])


def test_an_option_that_the_template_does_not_read_is_named(
    world: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(world, start, tmp_path / "run")
    assert main([*arguments, "--rl.template_options=['enable_thinking=false']"]) == 2
    assert "has no option enable_thinking; remove it" in capsys.readouterr().err
