"""The Dockerfile, read: its stages, and what they name in the rest of the tree."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "USER", "COPY", "ENV", "ENTRYPOINT", "CMD"}


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def stages() -> dict[str, list[tuple[str, str]]]:
    """(instruction, arguments) of each stage, those of the stage that it begins with included."""
    lines = [line for line in read("Dockerfile").splitlines() if not line.startswith("#")]
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for text in filter(None, "\n".join(lines).replace("\\\n", " ").splitlines()):
        word, _, rest = text.partition(" ")
        assert word in INSTRUCTIONS, text
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            found[name] = list(found.get(parent, []))
        found[name].append((word, rest))
    return found


def test_the_stages() -> None:
    found = stages()
    assert list(found) == ["", "base", "gpu", "cpu"], "the last one is built without --target"
    for name in ("gpu", "cpu"):
        last = dict(found[name])
        assert last["USER"] == "infir2"
        assert last["ENTRYPOINT"] == '["infir2"]'
        assert "/app/.venv/bin" in dict(found["base"])["ENV"]
        assert ("COPY", "--chown=infir2:infir2 . .") in found[name]


def test_a_stage_declares_the_variables_that_it_uses() -> None:
    for name in ("base", "gpu", "cpu"):
        instructions = stages()[name]
        declared = {rest.partition("=")[0] for word, rest in instructions if word == "ARG"}
        runs = " ".join(rest for word, rest in instructions if word == "RUN")
        assert set(re.findall(r"\$(\w+)", runs)) == declared, name


def test_what_the_stages_name_exists() -> None:
    runs = " ".join(rest for each in stages().values() for word, rest in each if word == "RUN")
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert set(re.findall(r"'\.\[(\w+)\]'", runs)) == {"gpu"}
    assert "gpu" in project["optional-dependencies"]
    assert set(re.findall(r" -c (\S+)", runs)) == {"constraints.txt"}
    assert (ROOT / "constraints.txt").exists()
    for target in re.findall(r"\bmake (\w+)", runs.replace("recommends make", "")):
        assert re.search(rf"^{target}:", read("Makefile"), re.MULTILINE)
    for variable in ("PIP_OPTIONS", "HASHES"):
        assert re.search(rf"^{variable} \?=", read("Makefile"), re.MULTILINE)


def test_targets_that_documents_name_are_stages() -> None:
    text = read("Dockerfile") + read("docs/install.md") + read("README.md")
    targets = set(re.findall(r"docker build [^\n`]*--target (\w+)", text))
    assert targets == {"gpu"}
    assert targets <= stages().keys()
