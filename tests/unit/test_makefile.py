"""The Makefile's choice of an interpreter: the first that runs, not the first that exists."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def chosen(path: Path, *variables: str) -> str:
    environ = {"PATH": f"{path}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    command = ["make", "-s", "--eval=print: ; @echo '$(PYTHON)'", "print", *variables]
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    ).stdout.strip()


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_shim_that_fails_is_passed_over(tmp_path: Path) -> None:
    program(tmp_path / "python3.12", "echo 'version 3.12 is not active' >&2; exit 127")
    program(tmp_path / "python3.11", f'exec {sys.executable} "$@"')
    assert chosen(tmp_path) == "python3.11"


def test_help_is_the_head_of_the_makefile() -> None:
    command = ["make", "-s", "help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = [line.split()[1] for line in text.splitlines() if line.startswith("make ")]
    assert {"demo", "test", "lint", "clean", "venv", "help"} <= set(targets)
    assert "PIP_OPTIONS  options of pip" in text
    assert ".PHONY" not in text


def test_a_version_that_is_not_supported_is_passed_over(tmp_path: Path) -> None:
    for name in ("python3.12", "python3.11", "python3"):
        program(tmp_path / name, "exit 1")
    assert chosen(tmp_path) == ""
    assert chosen(tmp_path, "PYTHON=/opt/mine") == "/opt/mine"
