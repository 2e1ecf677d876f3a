"""Shell completion: what follows, and the script in a real bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infir2.cli import VERBS, main
from infir2.cli.completion import completions

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("re", ["report"]),
        ("--ver", ["--version"]),
        ("sft --schedule.learn", ["--schedule.learning_rate="]),
        ("cpt x.toml --fp8.enabled=", ["--fp8.enabled=false", "--fp8.enabled=true"]),
        ("sft --model.recompute=s", ["--model.recompute=selective"]),
        ("cpt rec", []),
        ("cpt --rl.", []),
        ("eval --acc", []),
        ("eval --be", ["--benchmarks", "--benchmarks.data=", "--benchmarks.names="]),
        ("eval --set", ["--setup"]),
        ("check sft --js", ["--json"]),
        ("check s", ["sft"]),
        ("plan --gpu", ["--gpu", "--gpus"]),
        ("plan x.toml --fp8.en", ["--fp8.enabled="]),
        ("data ", ["demo", "inspect"]),
        ("data inspect --tok", ["--tokenizer"]),
        ("data inspect x --kind ", ["documents", "messages", "prompts"]),
        ("init d --task ", ["cpt", "rl", "sft"]),
        ("init d --task r", ["rl"]),
        ("init d --data ", []),
        ("launch ", ["ray", "slurm", "torchrun"]),
        ("launch ray --gpus-per-n", ["--gpus-per-node"]),
        ("export f", ["fp8"]),
        ("chat m --be", ["--beside"]),
        ("serve --engine v", ["vllm"]),
        ("nonsense ", []),
    ],
)
def test_what_may_follow(line: str, found: list[str]) -> None:
    words = line.split(" ")
    assert completions(words) == found


def test_every_verb_and_no_other_first_word() -> None:
    assert set(completions([""])) == {*VERBS, "--help", "--version"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_options(verb: str) -> None:
    assert "--help" in completions([verb, "--"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_completes_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    program = tmp_path / "infir2"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m infir2 "$@"\n')
    program.chmod(0o755)
    asks = 'COMP_POINT=${#COMP_LINE}; COMPREPLY=(); _infir2; echo "${COMPREPLY[@]}"\n'
    lines = ("infir2 rep", "infir2 cpt x.toml --fp8.enabled=t", "infir2 data inspect --tok")
    script = script.replace("compopt -o nospace", "true")
    script += "\n" + "".join(f"COMP_LINE='{line}'; {asks}" for line in lines)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environ, check=False
    )
    assert result.stdout.splitlines() == ["report", "true", "--tokenizer"], result.stderr


def test_nothing_to_complete_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty line is a match for bash, which then completes no file name."""
    assert main(["completion", "words", "--", "cpt", "rec"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["completion", "words", "--", "rl", "x", "--rollout-o"]) == 0
    assert capsys.readouterr().out == "--rollout-only\n"


def test_a_wrong_shell_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bsh"]) == 2
    assert "did you mean bash?" in capsys.readouterr().err
