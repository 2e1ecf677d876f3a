"""The report of run directories that someone else wrote: no text becomes markup, no value fails."""

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import demo_recipe

from infir2.errors import DataError
from infir2.report import write_report

MARK = "zq"  # of every tag and attribute that a text tries to become
HOSTILE = (
    f'<{MARK} on{MARK}="x()">',
    f'"><{MARK}><script>{MARK}()</script>',
    f"' on{MARK}='x()' '",
    f'" on{MARK}="x()" "',
    f"</pre></title></style></script><{MARK}>",
    f"</textarea><!-- --><{MARK}/><![CDATA[ ]]>",
    f"&lt;{MARK}&gt;&#60;{MARK}>",
    f"<td><{MARK}></td>",
    f"javascript:{MARK}()",
    f"\ud800<{MARK}>\x00\x1b[31m",
    f"<{MARK}" * 3_000,
)
ABSURD: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**400, -(10**30), 1e308, -1e308, 5e-324, float("nan"), float("inf")),
    *([], {}, [[]], {"a": []}, "", "x", ["x", 1, None], {"": None}, 2**63, "9" * 5_000),
)


class Markup(HTMLParser):
    """Tags with their attributes' names, and everything that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attributes)
        targets = [value for name, value in attributes if name in ("href", "src", "style")]
        assert not any(MARK in str(value) for value in targets)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def mutate(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` applied to its leaves, and to the names of its own tables' keys."""
    if isinstance(value, dict):
        return {key: mutate(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [mutate(item, change) for item in value]
    return change(value)


def rewrite(root: Path, change: Callable[[Any], Any]) -> None:
    """Change the values in every file of every run; a recipe keeps its form."""
    for path in (*root.rglob("*.jsonl"), *root.rglob("*.json")):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        changed = [json.dumps(mutate(json.loads(line), change)) for line in lines]
        path.write_text("\n".join(changed) + "\n")


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    """Of recipes, environments, states, events, samples, evaluations, names of runs."""
    root, draw = demo_recipe(tmp_path / "runs"), random.Random(7)
    plain = Markup(write_report([root], tmp_path / "plain.html").read_text())

    def change(value: Any) -> Any:
        return draw.choice(HOSTILE) if isinstance(value, str) and value not in KINDS else value

    rewrite(root, change)
    for number, path in enumerate(sorted(root.iterdir())):
        metrics = path / "metrics.jsonl"
        event = {"kind": "event", "step": HOSTILE[2], "event": HOSTILE[0], "detail": HOSTILE[1]}
        levels = {text: 0.5 for text in HOSTILE}
        scores = {"kind": "evaluation", "step": 999, "avg_at_k": 0.5, "by_difficulty": levels}
        metrics.write_text(metrics.read_text() + f"{json.dumps(event)}\n{json.dumps(scores)}\n")
        environment = path / "environment.json"
        if environment.exists():
            values = json.loads(environment.read_text())
            environment.write_text(json.dumps(values | dict.fromkeys(HOSTILE, "x")))
        recipe = path / "recipe.toml"
        texts = "".join(f"# {text.splitlines()[0]}\n" for text in HOSTILE if text.isprintable())
        base = json.dumps(HOSTILE[number % 8])
        changed = re.sub(
            r'"pow2"|(?<=path = )"[^"]*"', base.replace("\\", r"\\"), recipe.read_text()
        )
        recipe.write_text(texts + changed)
        path.rename(root / f"{number} {HOSTILE[number % 4].replace('/', '∕')}")
    (root / os.fsdecode(b"\xff" + f"<{MARK}>".encode())).mkdir()
    (root / os.fsdecode(b"\xff" + f"<{MARK}>".encode()) / "metrics.jsonl").touch()
    page = Markup(write_report([root], tmp_path / "hostile.html").read_text())
    assert {tag for tag in page.tags if MARK in tag} == set()
    assert {name for name in page.attributes if MARK in name} == set()
    assert page.tags.keys() <= plain.tags.keys() | {"i", "p"}
    assert page.tags["script"] == plain.tags["script"] == 1
    shown = "".join(page.text)
    for text in HOSTILE[:4]:
        assert text in shown, "shown as it is"


KINDS = ("train", "validation", "evaluation", "event")


@pytest.mark.parametrize("seed", range(12))
def test_no_value_of_a_run_ends_the_report(tmp_path: Path, seed: int) -> None:
    """Absurd values of every type in one of twenty places."""
    root, draw = demo_recipe(tmp_path / "runs"), random.Random(seed)

    def change(value: Any) -> Any:
        return draw.choice(ABSURD) if draw.random() < 0.05 else value

    rewrite(root, change)
    recipe = root / "rl1" / "recipe.toml"
    recipe.write_text(
        draw.choice(
            ("fp8 = 7\n", "checkpoint = []\n", "[fp8.enabled]\nx = 1\n", "a = " + "[" * 5000)
        )
        + recipe.read_text().replace("[fp8]", "[fp9]")
    )
    write_report([root], tmp_path / "page.html")


def test_a_recipe_that_no_run_reads_does_not_keep_the_report(tmp_path: Path) -> None:
    """tomllib would need hours for this key."""
    root = demo_recipe(tmp_path / "runs")
    (root / "cpt" / "recipe.toml").write_text("a." * 60_000 + "b = 1")
    page = write_report([root], tmp_path / "page.html").read_text()
    assert "recipe.toml cannot be parsed (a key has more than 16 parts" in page


@pytest.mark.parametrize("name", ["recipe.toml", "samples.jsonl", "environment.json"])
def test_a_link_out_of_a_run_shows_nothing(tmp_path: Path, name: str) -> None:
    root = demo_recipe(tmp_path / "runs")
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"step": 1, "reward": 1, "prompt": "topsecret", "a": "topsecret"}))
    (root / "rl1" / name).unlink()
    (root / "rl1" / name).symlink_to(secret)
    page = write_report([root / "rl1"], tmp_path / "page.html").read_text()
    assert "topsecret" not in page
    assert f"{name} cannot be read (it is a symbolic link, not a regular file)" in page


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["recipe.toml", "samples.jsonl", "metrics.jsonl"])
def test_a_fifo_in_a_run_does_not_block_the_report(tmp_path: Path, name: str) -> None:
    root = demo_recipe(tmp_path / "runs")
    (root / "rl1" / name).unlink()
    os.mkfifo(root / "rl1" / name)
    write_report([root / "rl1"], tmp_path / "page.html")
    (root / "rl1" / "recipe.toml").unlink()
    if name == "metrics.jsonl":
        with pytest.raises(DataError, match="holds no run"):
            write_report([root / "rl1"], tmp_path / "page.html")
