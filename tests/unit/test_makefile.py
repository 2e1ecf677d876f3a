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


AUDITS = {
    "nothing known": ('echo "No known vulnerabilities found" | tee "$OUT"', 0, "No known"),
    "a vulnerability": ('echo "CVE-1" > "$OUT"; exit 1', 2, "CVE-1"),
    "no service": ("echo refused >&2; exit 1", 2, "nothing was audited"),
}


@pytest.mark.parametrize(("script", "code", "said"), AUDITS.values(), ids=AUDITS)
def test_an_audit_that_looked_nothing_up_does_not_pass(
    tmp_path: Path, script: str, code: int, said: str
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "audit/bin").mkdir(parents=True)
    program(tmp_path / "bin/python", f'exec {sys.executable} "$@"')
    out = 'for OUT; do :; done; case " $* " in *" --strict "*) ;; *) exit 9;; esac'
    program(tmp_path / "audit/bin/pip-audit", f"{out}\n{script}")
    for name in (".python", ".installed", "audit/.installed"):
        (tmp_path / name).touch()
    command = ["make", "-s", "audit", f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert (tmp_path / "audit/torch.txt").read_text().startswith("torch==2.")
