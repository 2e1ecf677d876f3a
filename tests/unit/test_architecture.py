"""The house of docs/DESIGN.md, read from the imports: floors, no circles, small files, nothing of the place it was written in."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "infir2"
FLOORS = {
    "errors": 0,
    "faults": 0,
    "compat": 0,
    "numerics": 0,
    "model": 1,
    "verify": 1,
    "launch": 1,
    "config": 1,
    "checkpoint": 2,
    "parallel": 2,
    "data": 2,
    "train": 3,
    "rl": 4,
    "rollout": 4,
    "evaluate": 5,
    "report": 5,
    "demo": 6,
    "cli": 6,
    "__main__": 6,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file imports anywhere, lazily too, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (
                (alias.name, node.lineno)
                for alias in node.names
                if alias.name.split(".")[0] == "infir2"
            )
        elif isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail(
                f"{path.relative_to(ROOT)}:{node.lineno} imports relatively; name the whole module"
            )
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "infir2"
        ):
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (
                (name if name in MODULES else node.module, node.lineno) for name in submodules
            )


def floor(module: str) -> int:
    parts = module.split(".")
    return FLOORS[parts[1]] if len(parts) > 1 else 0


def test_every_part_of_the_package_has_a_floor() -> None:
    parts = {name.split(".")[1] for name in MODULES if "." in name}
    assert parts <= set(FLOORS), (
        f"give these a floor in docs/DESIGN.md and here: {sorted(parts - set(FLOORS))}"
    )


def test_no_import_points_to_a_higher_floor() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} (floor {floor(name)}) imports {target} (floor {floor(target)})"
        for name, path in MODULES.items()
        for target, line in imported_modules(path)
        if floor(target) > floor(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_of_the_package_exist() -> None:
    wrong = [
        f"{path.name}:{line} {target}"
        for path in FILES
        for target, line in imported_modules(path)
        if target not in MODULES
    ]
    assert not wrong


def test_no_circles_between_modules() -> None:
    graph = {
        name: {target for target, _ in imported_modules(path)} - {name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


LIGHT = (
    "infir2.config",
    "infir2.verify",
    "infir2.cli",
    "infir2.cli.train",
    "infir2.preflight.checks",
    "infir2.cli.launch",
)


@pytest.mark.parametrize("package", LIGHT)
def test_imports_without_torch(package: str) -> None:
    code = f"import sys, {package}; print(sorted({{'torch', 'transformers', 'pyarrow', 'tensorboard'}} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank ones, no comments, no docstrings."""
    source = path.read_text(encoding="utf-8")
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_size_of_package_files_and_functions() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    written = sum(code_lines(path) for path in FILES)
    assert written <= 12_680, (
        f"{written} lines of code: the package must stay small enough to read (about 12,000)"
    )
    long_files = [
        f"{path.relative_to(ROOT)}: {count} lines" for path, count in lines.items() if count > 450
    ]
    long_functions = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= 80
    ]
    assert not long_files + long_functions


def repository_texts() -> Iterator[tuple[Path, str]]:
    """Every text file of ours (not of .venv, .git, runs and caches)."""
    folders = [
        path
        for path in ROOT.iterdir()
        if path.is_dir()
        and path.name not in ("runs", "data", "build")
        and path.suffix != ".egg-info"
    ]
    files = [
        path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"
    ]  # a worktree has a file of that name
    for folder in folders:
        if not folder.name.startswith(".") or folder.name == ".ci":
            files += [
                path
                for path in folder.rglob("*")
                if path.is_file() and "__pycache__" not in path.parts
            ]
    for path in files:
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def test_no_paths_or_package_addresses_of_one_workplace() -> None:
    # Put together from pieces, so that this file does not match itself.
    pieces = [
        r"(^|[^A-Za-z0-9_.])/(wo" + "rk|fa" + "rm)/",
        "index" + "-url",
        "extra" + "-index",
        "find" + "-links",
        r"https?://[^ )\"]*/sim" + "ple",
    ]
    pattern = re.compile("|".join(pieces), re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT)}: {match.group()!r}"
        for path, text in repository_texts()
        for match in pattern.finditer(text)
    ]
    assert not found
