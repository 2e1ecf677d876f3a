"""RL on programs: a small model that writes the right one by chance learns to write it."""

import json
from pathlib import Path

import pytest
from stages import lines, options, run

from infir2.demo.tokenizer import build_vocabulary, write_tokenizer

RIGHT, WRONG = "print(input())", "print(0)"
TESTS = [{"input": "5\n", "output": "5"}, {"input": "7\n", "output": "7"}]


def rows(path: Path, values: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.costly
def test_the_pass_rate_of_a_small_model_rises(world: Path, tmp_path: Path) -> None:
    """The jails of the reward run what the model writes; nothing else tells it what is right."""
    guesses = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": f"```\n{RIGHT if n % 4 == 0 else WRONG}\n```"},
            ]
        }
        for n in range(64)
    ]
    chat = [row.read_text() for row in world.glob("*.jsonl")]
    write_tokenizer(tmp_path / "words", build_vocabulary([*chat, f"```{RIGHT}{WRONG}"]))
    words = {"data__tokenizer": tmp_path / "words"}
    run(options(world, tmp_path / "cpt", "cpt", schedule__total_steps=4, **words))
    sft = words | {
        "data__sources__0__path": rows(tmp_path / "guesses.jsonl", guesses),
        "model__path": tmp_path / "cpt",
        "schedule__learning_rate": 1e-2,
        "schedule__final_learning_rate": 1e-2,
        "schedule__total_steps": 40,
        "train__validate_every": 0,
    }
    run(options(world, tmp_path / "sft", "sft1", **sft))
    run(["export", "hf", str(tmp_path / "sft"), "--to", str(tmp_path / "hf")])
    run(["export", "fp8", str(tmp_path / "hf"), "--to", str(tmp_path / "fp8")])
    problems = [{"prompt": f"{n}?", "label": TESTS} for n in range(24)]
    rl = words | {
        "data__sources__0__path": rows(tmp_path / "problems.jsonl", problems),
        "model__path": tmp_path / "sft",
        "rollout__model": tmp_path / "fp8",
        "rl__reward": "code",
        "rl__max_response_tokens": 24,
        "rl__group_size": 8,
        "schedule__learning_rate": 1e-3,
        "schedule__total_steps": 10,
    }
    run(options(world, tmp_path / "rl", "rl1", **rl))
    passed = [line["accuracy"] for line in lines(tmp_path / "rl", "train")]
    assert 0.1 < passed[0] < 0.9, "by chance"
    assert sum(passed[-2:]) / 2 > passed[0] + 0.2, passed
