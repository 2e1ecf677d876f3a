"""Promises name tests that exist; versions, sums and the image are pinned."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("document", "least"), [("SECURITY.md", 21), ("docs/reliability.md", 11)])
def test_every_promise_names_a_test_that_exists(document: str, least: int) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= least
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, f"{row} names no test"
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert not name or name in functions, f"{file} has no {name}"


def pins(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(
        re.findall(r"^([\w.-]+)==([^\s;\\]+)", text.replace("_", "-").lower(), re.MULTILINE)
    )


def test_every_pinned_version_has_sums() -> None:
    """`make hashes` writes hashes.txt."""
    assert pins("hashes.txt") == pins("constraints.txt")
    entries = (ROOT / "hashes.txt").read_text(encoding="utf-8").split("==")[1:]
    assert all("--hash=sha256:" in entry for entry in entries)


def test_the_image_has_a_digest() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE=python:3\.12-slim@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
