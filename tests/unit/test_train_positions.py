"""Sequences beyond the model's positions are refused by every verb and by check."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from stages import make_rl_start, options

from infir2.cli import main

POSITIONS = 64


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 positions."""
    return make_rl_start(
        world,
        tmp_path_factory.mktemp("start"),
        model__shape__max_positions=POSITIONS,
        data__sequence_tokens=POSITIONS,
    )


def arguments(world: Path, start: Path, tmp_path: Path, verb: str) -> list[str]:
    """A run of the verb with one token more than the model has positions."""
    longest = tmp_path / "longest.jsonl"
    longest.write_text(json.dumps({"prompt": "1+1=? " * 4, "label": "2"}) + "\n")
    too_long: dict[str, Any] = {"data__sequence_tokens": POSITIONS + 1}
    if verb == "cpt":
        return options(
            world, tmp_path / "run", "cpt", model__shape__max_positions=POSITIONS, **too_long
        )
    if verb == "sft":
        return options(world, tmp_path / "run", "sft1", model__path=start / "cpt", **too_long)
    if verb == "rl":
        values = {"model__path": start / "cpt", "rollout__model": start / "fp8"}
        values |= {"data__sources__0__path": longest, "rl__max_response_tokens": POSITIONS - 10}
        return options(world, tmp_path / "run", "rl1", **values)
    path = tmp_path / "eval.toml"
    path.write_text(f'[[evaluate.problems]]\npath = "{longest}"\n')
    limit = f"--evaluate.max_response_tokens={POSITIONS - 10}"
    return ["eval", str(path), f"--run.dir={tmp_path}/run", f"--model.path={start / 'hf'}", limit]


@pytest.mark.parametrize("verb", ["cpt", "sft", "rl", "eval"])
def test_refused_before_the_first_step_and_by_check(
    world: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    words = arguments(world, start, tmp_path, verb)
    assert main(words) == 2
    error = capsys.readouterr().err
    sentence = (
        rf"(data\.sequence|{verb[:2]}\w*\.max_response)_tokens = \d+ (after a prompt of \d+ tokens "
        r")?exceeds the model's 64 positions .*set it to at most (\d+)"
    )
    match = re.search(sentence, error)
    assert match, error
    assert "Traceback" not in error
    assert main(["check", *words]) == 1
    assert re.search(rf"FAIL  model .*{re.escape(match[0])}", capsys.readouterr().out)
    key = f"{match[1]}_tokens"
    main(["check", *words, f"--{key}={match[3]}"])
    assert re.search(r"^ok    model", capsys.readouterr().out, re.MULTILINE)
    if verb in ("cpt", "sft"):
        assert main([*words, f"--{key}={match[3]}", "--train.stop_after_step=1"]) == 0
