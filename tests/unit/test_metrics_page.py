"""docs/metrics.md defines every metric that the code writes, and no other."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from infir2.evaluate.statistics import Evaluation
from infir2.numerics.observed import MEASURES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
DEFINED = set(re.findall(r"`([a-z]+(?:_?[a-zA-Z0-9]+)*)`", PAGE))
# Where lines of metrics.jsonl are made: (file, function). Each key of a dict in it is a metric.
MAKERS = [
    ("train/loop.py", "_timed_step"),
    ("rl/loop.py", "_one_step"),
    ("rl/step_metrics.py", "rollout_metrics"),
    ("rl/step_metrics.py", "_reward_metrics"),
    ("rl/mismatch.py", "mismatch_metrics"),
    ("rl/mismatch.py", "_means"),
    ("rl/policy_update.py", "__call__"),
    ("engines/remote.py", "metrics"),
    ("engines/pool.py", "metrics"),
]
KEY = re.compile(r"[a-z][a-z0-9_]*")


def functions(path: Path, name: str) -> list[ast.AST]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == name]


def keys_of(node: ast.AST) -> set[str]:
    """Constant keys of dicts; a formatted part of a key is NAME."""
    found: set[str] = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Dict):
            found |= {_key(key) for key in each.keys if key is not None}
        if isinstance(each, ast.DictComp):
            found.add(_key(each.key))
    return {key for key in found if key}


def _key(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [
            str(part.value) if isinstance(part, ast.Constant) else "NAME" for part in node.values
        ]
        return "".join(parts)
    return ""


@pytest.mark.parametrize(("file", "function"), MAKERS, ids=str)
def test_every_key_of_a_line_is_defined(file: str, function: str) -> None:
    found = functions(ROOT / "infir2" / file, function)
    assert found, f"{file} has no {function} anymore: say where its metrics went"
    keys = set().union(*map(keys_of, found)) - {"write"}  # a part, NAME of publish_NAME_seconds
    assert keys - DEFINED == set()


def test_names_with_the_endings_of_metrics_are_defined() -> None:
    """Metrics of rl and train by the endings of their names, wherever they are made."""
    pattern = re.compile(r'"([a-z0-9_]+_(?:seconds|fraction|failures|kl))"(?=\s*[:\]])')
    texts = [
        path.read_text(encoding="utf-8")
        for folder in ("rl", "train")
        for path in (ROOT / "infir2" / folder).glob("*.py")
    ]
    assert {name for text in texts for name in pattern.findall(text)} - DEFINED == set()


def test_events_are_listed() -> None:
    names = set()
    for path in (ROOT / "infir2").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_event = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("log.event")
            if is_event and isinstance(node.args[1], ast.Constant):
                names.add(node.args[1].value)
    assert len(names) >= 5
    assert names - DEFINED == set()


def test_scores_and_measures_are_defined() -> None:
    assert {field.name for field in fields(Evaluation)} - DEFINED == set()
    assert set(MEASURES) - DEFINED == set()
    assert {"validation_loss", "entropy", "capped_fraction", "clip_fraction"} <= DEFINED


def test_no_metric_is_defined_that_the_code_does_not_know() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "infir2").rglob("*.py"))
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    names = {name for line in rows for name in re.findall(r"`([a-z0-9_]+)`", line.split("|")[1])}
    assert len(names) > 50
    # Made of a prefix and an event or a part: publish_bytes and engine_restarts are written out.
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []
