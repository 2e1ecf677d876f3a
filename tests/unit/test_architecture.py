"""The architecture of docs/DESIGN.md: floors, no import circles, short files and functions."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "infir2"
# From the ground up: a folder imports only from its own floor and from lower ones.
FLOORS = (
    ("errors", "directories", "files", "pickles", "terminal", "processes", "faults"),
    ("config", "verify", "templates", "launch"),
    ("numerics",),
    ("model",),
    ("data",),
    ("parallel",),
    ("checkpoint",),
    ("engines",),
    ("convert",),
    ("train",),
    ("evaluate",),
    ("preflight",),
    ("planner", "doctor", "starter"),
    ("report",),
    ("rl",),
    ("demo",),
    ("cli", "__main__"),
)
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}
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
    return FLOOR_OF[parts[1]] if len(parts) > 1 else 0


def test_every_part_of_the_package_has_a_floor() -> None:
    parts = {name.split(".")[1] for name in MODULES if "." in name}
    assert parts <= set(FLOOR_OF), (
        f"give these a floor in docs/DESIGN.md and here: {sorted(parts - set(FLOOR_OF))}"
    )


def test_no_import_points_to_a_higher_floor() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} (floor {floor(name)}) imports "
        f"{target} (floor {floor(target)})"
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
    "infir2.templates.environment",
    "infir2.cli",
    "infir2.cli.train",
    "infir2.cli.rl",
    "infir2.cli.eval",
    "infir2.cli.convert",
    "infir2.cli.preflight",
    "infir2.cli.plan",
    "infir2.cli.doctor",
    "infir2.cli.data",
    "infir2.preflight.checks",
    "infir2.cli.launch",
    "infir2.cli.serve",
)


@pytest.mark.parametrize("package", LIGHT)
def test_imports_without_torch(package: str) -> None:
    code = f"import sys, {package}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    heavy = {"torch", "transformers", "pyarrow", "tensorboard"}
    assert heavy & set(result.stdout.split()) == set()


def test_only_the_terminal_module_prints() -> None:
    """No exception: the separate programs verify/jail.py and verify/worker.py print nothing."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if path != PACKAGE / "terminal.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not wrong, f"print through infir2/terminal.py: {wrong}"


def function_lengths() -> dict[str, int]:
    """Lines of every function of the package, by where it stands."""
    return {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }


def test_files_stay_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long_files = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lines.items() if n > 400]
    assert not long_files


def test_functions_stay_short() -> None:
    lengths = function_lengths()
    assert not {name: length for name, length in lengths.items() if length > 50}
    ordered = sorted(lengths.values())
    assert ordered[len(ordered) * 9 // 10] <= 25, "the 90th percentile of function lengths, lines"


def test_folders_form_no_circles() -> None:
    """Two folders of one floor may not import each other either."""
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        parts = name.split(".")
        folder = parts[1] if len(parts) > 1 else ""
        targets = {target.split(".")[1] for target, _ in imported_modules(path) if "." in target}
        graph.setdefault(folder, set()).update(targets - {folder})
    order = [part for parts in FLOORS for part in parts]
    while free := [part for part in order if part in graph and not graph[part] & graph.keys()]:
        for part in free:
            del graph[part]
    graph.pop("", None)
    assert not graph, f"these folders import each other: {graph}"


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


def test_pytest_and_ruff_skip_no_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """Both pass over folders of some names, such as dist, without a word."""
    skipped = [*pytestconfig.getini("norecursedirs"), "site-packages", "buck-out"]
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert not [folder for folder in folders if any(folder.match(name) for name in skipped)]
