"""README and docs/: links resolve, commands parse, code compiles, rows and keys are real."""

import argparse
import ast
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from infir2 import errors
from infir2.cli import INTERNAL_ERROR, VERBS
from infir2.cli.arguments import ACCEPT_CHANGES, RECIPE_CLASSES, Parser, split_recipe_arguments
from infir2.cli.rl import split_modes
from infir2.config.keys import Recipe, item_class, leaf_keys, lookup, section_class
from infir2.config.schema import EvalRecipe, RlRecipe, SourceSection
from infir2.data.rows import RowError, parse_conversation, parse_document, parse_prompt

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = ["README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES = sorted([*(ROOT / name for name in ROOT_PAGES), *ROOT.glob("docs/**/*.md")])
READERS = {"cpt": parse_document, "sft": parse_conversation, "rl": parse_prompt}
RUNS = "<!-- runs -->"  # before a Python block that a test runs


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=names)


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8"))


def inlines(page: Path) -> Iterator[Token]:
    for token in tokens(page):
        yield from token.children or []


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site make of the headings."""
    found: list[str] = []
    all_tokens = tokens(page)
    for heading, inline in pairwise(all_tokens):
        if heading.type == "heading_open":
            text = "".join(each.content for each in inline.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def links(page: Path) -> list[str]:
    found = [str(each.attrGet("href") or each.attrGet("src") or "") for each in inlines(page)]
    return [link for link in found if link and not re.match(r"[a-z]+:", link)]


@every_page
def test_links_and_anchors_resolve(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{link}: there is no such heading"


class Block(NamedTuple):
    kind: str  # "python", "toml", ...; "" for an indented block
    text: str
    before: str  # the HTML comment before it


def blocks(page: Path) -> list[Block]:
    found, comment = [], ""
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            found.append(Block(token.info.strip(), token.content, comment))
        comment = token.content.strip() if token.type == "html_block" else ""
    return found


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `infir2` of each command line, without variables before it."""
    for block in blocks(page):
        if block.kind not in ("", "bash", "console", "sh"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ )?(?:\w+=\S* )*infir2 (.+)", line.strip())
            if found:
                yield shlex.split(found[1].split(" | ")[0].split(" 2> ")[0], comments=True)


class Parsed(Exception):
    """Raised when the parser of a verb has accepted its arguments."""


@pytest.fixture
def parses_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Parser ends its verb after it has parsed; what it leaves must be keys of recipes."""
    parse = Parser.parse_known_args
    depth = 0

    def parse_and_end(self: Parser, args: Any = None, namespace: Any = None) -> Any:
        nonlocal depth
        depth += 1
        try:
            result: tuple[argparse.Namespace, list[str]] = parse(self, args, namespace)
        finally:
            depth -= 1
        if depth:  # the parser of a subcommand
            return result
        require_keys([word for word in result[1] if word.startswith("-")], RlRecipe)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_known_args", parse_and_end)


def require_keys(options: list[str] | tuple[str, ...], recipe_class: Recipe) -> None:
    for option in options:
        key = re.fullmatch(r"--([\w.]+)(=.*)?", option)
        assert key, f"{option} is no option"
        assert lookup(recipe_class, key[1]) is not None, f"{key[1]} is no key"


def require_command(words: list[str]) -> None:
    """Raise ConfigError or AssertionError for a command that infir2 would not accept."""
    words = [word for word in words if word not in ("--quiet", "--json")]
    verb, arguments = words[0], words[1:]
    assert verb in VERBS, f"infir2 has no verb {verb}"
    for word in arguments:
        if word.startswith("recipes/"):
            assert (ROOT / word).exists(), f"{word} does not exist"
    if verb == "launch" and "--" in arguments:
        require_command(arguments[arguments.index("--") + 1 :])
        arguments = arguments[: arguments.index("--")]
    if verb == "check":
        known = arguments[0] in RECIPE_CLASSES
        return require_command(arguments if known else ["rl", *arguments])
    if verb == "rl":
        arguments = split_modes(arguments)[0]
    own = verb == "eval" and not any(word.endswith(".toml") for word in arguments)
    if verb in RECIPE_CLASSES and not own and arguments != ["--help"]:
        arguments = [word for word in arguments if word != ACCEPT_CHANGES]
        return require_keys(split_recipe_arguments(arguments, verb)[1], RECIPE_CLASSES[verb])
    if arguments == ["--help"]:
        return None
    entry = VERBS[verb]
    with pytest.raises(Parsed):
        getattr(importlib.import_module(f"infir2.cli.{entry.module}"), entry.function)(arguments)


@every_page
@pytest.mark.usefixtures("parses_only")
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        require_command(words)


@pytest.mark.usefixtures("parses_only")
@pytest.mark.parametrize(
    "command",
    [
        "trian recipes/demo/cpt.toml",
        "cpt recipes/demo/none.toml",
        "cpt recipes/demo/cpt.toml --schedule.steps=3",
        "cpt recipes/demo/cpt.toml --rl.reward=math",
        "launch torchrun --gpus 8 -- sft recipes/demo/sft1.toml",
        "launch torchrun --gpus-per-node 8 -- sft recipes/demo/sft1.toml --model.pth=x",
        "export fp8 runs/a --into b",
        "plan recipes/demo/cpt.toml --gpu h100 --parallel.pp=2",
        "eval --benchmark aime24",
    ],
)
def test_the_test_of_commands_can_fail(command: str) -> None:
    with pytest.raises((AssertionError, errors.ConfigError)):
        require_command(shlex.split(command))


def test_the_pages_have_commands() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 80


@every_page
def test_targets_of_make_exist(page: Path) -> None:
    (line,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    code = [each.content for each in inlines(page) if each.type == "code_inline"]
    code += [line for block in blocks(page) for line in block.text.splitlines()]
    found = {match[1] for text in code if (match := re.match(r"(?:\$ )?make ([a-z-]+)\b", text))}
    assert found <= set(line.split()), "the Makefile has no such target"


def code_blocks(kind: str) -> list[Any]:
    found = [(page, each) for page in PAGES for each in blocks(page) if each.kind == kind]
    return [pytest.param(block, id=f"{names(page)}-{n}") for n, (page, block) in enumerate(found)]


@pytest.mark.parametrize("block", code_blocks("python"))
def test_python_compiles_and_runs(block: Block) -> None:
    code = compile(block.text, "block", "exec")
    if block.before == RUNS:
        exec(code, {"__name__": "block"})


def test_some_blocks_run() -> None:
    assert sum(each.before == RUNS for page in PAGES for each in blocks(page)) >= 2


def require_toml_keys(value: Any, annotation: Any, key: str) -> None:
    """Every key of a TOML value is in the schema."""
    if isinstance(value, list) and (item := item_class(annotation)):
        for element in value:
            require_toml_keys(element, item, key)
    elif isinstance(value, dict) and (section := section_class(annotation)):
        for name, inner in value.items():
            assert name in section.model_fields, f"{key}.{name} is no key"
            require_toml_keys(inner, section.model_fields[name].annotation, f"{key}.{name}")


@pytest.mark.parametrize("block", code_blocks("toml"))
def test_keys_of_toml_exist(block: Block) -> None:
    table = tomllib.loads(block.text)
    table.pop("extends", None)
    recipe_class = EvalRecipe if "benchmarks" in table else RlRecipe
    for name, value in table.items():
        assert name in recipe_class.model_fields, f"[{name}] is no section"
        require_toml_keys(value, recipe_class.model_fields[name].annotation, name)


@pytest.mark.parametrize("page", [each for each in PAGES if each.stem != "CHANGELOG"], ids=names)
def test_keys_that_the_text_names_exist(page: Path) -> None:
    """`section.key` in code, with or without a value, of the sections that recipes have."""
    known = {key.name for of in (RlRecipe, EvalRecipe) for key in leaf_keys(of)}
    known |= {key.rpartition(".")[0] for key in known} | {key.replace(".0.", ".") for key in known}
    sections = {key.partition(".")[0] for key in known}
    files = {"data.py", "train.py", "model.safetensors"}
    for each in inlines(page):
        match = re.match(r"(?:--)?([a-z]\w*)((?:\.\w+)+)(?=$| =|=)", each.content)
        if each.type != "code_inline" or not match or match[1] not in sections:
            continue
        name = re.sub(r"\.N\b", ".0", match[1] + match[2])
        assert name in known or name in files or lookup(RlRecipe, name), f"{name} is no key"


def example_rows() -> list[Any]:
    """Rows of docs/data.md, with the verb of their heading and the source's keys before them."""
    found: list[Any] = []
    verb, section = "", SourceSection(path="x")
    for token in tokens(ROOT / "docs/data.md"):
        if token.type == "inline" and (match := re.search(r"`infir2 (cpt|sft|rl)`", token.content)):
            verb, section = match[1], SourceSection(path="x")
        if token.type == "fence" and token.info == "toml":
            section = SourceSection(**tomllib.loads(token.content)["data"]["sources"][0])
        if token.type == "fence" and token.info == "json":
            found += [(verb, section, line) for line in token.content.splitlines()]
    return found


@pytest.mark.parametrize(("verb", "section", "line"), example_rows())
def test_an_example_row_is_taken(verb: str, section: SourceSection, line: str) -> None:
    taken = READERS[verb](json.loads(line), section)
    turns = taken[0] if isinstance(taken, tuple) else taken
    assert turns


FORMS = re.findall(
    r"^    (\{.*?\})(?: \| (.*))?$",
    (ROOT / "docs/formats.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize(("row", "keys"), FORMS)
def test_a_form_of_the_page_of_formats_is_taken(row: str, keys: str) -> None:
    section = SourceSection(path="x", **tomllib.loads(keys.replace(", ", "\n")))
    is_prompt = {"label", "reward_model"} & json.loads(row).keys()
    assert READERS["rl" if is_prompt else "sft"](json.loads(row), section)


REFUSED = re.findall(
    r"^\| (cpt|sft|rl) \| `(\{.*?\})` \| (.*) \|$",
    (ROOT / "docs/data.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize(("verb", "row", "sentence"), REFUSED)
def test_a_refused_row_has_this_sentence(verb: str, row: str, sentence: str) -> None:
    with pytest.raises(RowError) as error:
        READERS[verb](json.loads(row), SourceSection(path="x"))
    assert str(error.value) == sentence


def test_data_has_rows_of_each_kind() -> None:
    assert {verb for verb, _, _ in example_rows()} == set(READERS) == {each[0] for each in REFUSED}
    assert len(FORMS) >= 8


@pytest.mark.parametrize("name", ["docs/troubleshooting.md", "docs/DESIGN.md"])
def test_exit_codes_are_those_of_the_code(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8").partition("| code | meaning |")[2]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    codes = {each.exit_code for each in classes if issubclass(each, errors.UserError)}
    assert listed == codes | {0, INTERNAL_ERROR}


def navigation() -> dict[str, list[str]]:
    tree = ast.parse((ROOT / "docs/conf.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    (value,) = [each.value for each in assigned if ast.unparse(each.targets[0]) == "NAVIGATION"]
    found: dict[str, list[str]] = ast.literal_eval(value)
    return found


def test_the_navigation_has_every_page() -> None:
    listed = [page for pages in navigation().values() for page in pages]
    pages = [path.stem for path in ROOT.glob("docs/*.md") if path.stem != "index"]
    roots = [f"/{Path(name).stem}" for name in ROOT_PAGES if name != "README.md"]
    assert sorted(listed) == sorted([*pages, *roots, "results/index"])


def test_the_page_of_results_has_every_result() -> None:
    linked = set(links(ROOT / "docs/results/index.md"))
    assert {path.name for path in ROOT.glob("docs/results/*.md")} - {"index.md"} <= linked


def test_the_api_page_names_what_exists() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)
    assert len(listed) > 10
    for name in listed:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, f"{name} has no text"
