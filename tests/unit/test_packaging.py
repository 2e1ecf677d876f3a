"""The wheel: it holds every file that the package reads, and the demo runs from it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(find_spec("setuptools") is None, reason="needs setuptools to build a wheel"),
    pytest.mark.skipif(find_spec("pip") is None, reason="needs pip to build a wheel"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy: setuptools writes build/ and *.egg-info beside the sources."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "recipes", source / "recipes")
    shutil.copytree(ROOT / "infir2", source / "infir2", ignore=no_caches)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(directory), str(source)]
    subprocess.run(command, check=True)
    (path,) = directory.glob("infir2-*.whl")
    return path


def infir2(wheel: Path, directory: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of the wheel's `infir2` in a directory, without the checkout."""
    site = wheel.parent / "site"
    if not site.exists():
        zipfile.ZipFile(wheel).extractall(site)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-m", "infir2", *arguments],
        cwd=directory,
        env=environ | {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "infir2").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("infir2/")}
    assert packed == files
    assert {
        "infir2/py.typed",
        "infir2/report/style.css",
        "infir2/report/filters.js",
        "infir2/report/charts.js",
        "infir2/report/page.js",
        "infir2/demo/recipes/cpt.toml",
    } <= packed


def test_the_wheel_carries_recipes_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name.partition("/share/infir2/")[2] for name in names if "/share/infir2/" in name}
    recipes = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "recipes").rglob("*.toml")
        if path.parent.name != "demo"
    }
    assert packed == recipes
    (licence,) = (name for name in names if name.endswith("licenses/LICENSE"))
    assert b"Apache License" in zipfile.ZipFile(wheel).read(licence)


def test_pip_installs_the_wheel_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The libraries are this environment's; infir2 itself is the wheel's."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)]
    # With PYTHONPATH pip would see the *.egg-info of a checkout, and install nothing.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(pip, check=True, env=environ)
    site = next(environment.glob("lib/python*/site-packages"))
    here = Path(sysconfig.get_path("purelib"))
    (site / "libraries.pth").write_text(f"{here}\n")  # after site, so that the wheel is first
    empty = tmp_path / "empty"
    empty.mkdir()

    def infir2(*arguments: str) -> str:
        command = [str(environment / "bin" / "infir2"), *arguments]
        result = subprocess.run(command, cwd=empty, env=environ, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "usage: infir2 demo" in infir2("demo", "--help")
    where = "import infir2; print(infir2.__file__)"
    found = subprocess.run([str(python), "-c", where], cwd=empty, env=environ, capture_output=True)
    assert str(site) in found.stdout.decode()
    recipe = environment / "share/infir2/recipes/qwen2.5-7b/cpt.toml"
    assert "how sure" in infir2("plan", str(recipe), "--gpu=h100", "--gpus=8")
    assert not list(empty.iterdir())


def test_recipes_demo_is_the_packages(tmp_path: Path) -> None:
    assert (ROOT / "recipes/demo").resolve() == ROOT / "infir2/demo/recipes"


def test_the_demo_runs_from_a_wheel_in_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    """Its data stage, and the start of its first training stage, which SIGTERM ends."""
    code, output = infir2(wheel, tmp_path, "demo", "demo", INFIR2_FAULTS="train.step:2:term")
    assert code == 75, output
    assert "stage cpt ended with code 75" in output
    assert (tmp_path / "demo/world/cpt.jsonl").exists()
    assert (tmp_path / "demo/cpt/recipe.toml").exists()
    site = (wheel.parent / "site").resolve()
    assert (
        f"file:{site}/infir2/demo/recipes/cpt.toml"
        in (tmp_path / "demo/cpt/recipe.toml").read_text()
    )


def documents() -> list[Path]:
    names = ("README.md", "Dockerfile", "Makefile", "environment.yml", "SECURITY.md")
    folders = (ROOT / "docs", ROOT / "infir2", ROOT / "bench", ROOT / "recipes")
    files = [path for folder in folders for path in folder.rglob("*")]
    texts = [path for path in files if path.suffix in (".md", ".py", ".toml")]
    return [ROOT / name for name in names] + texts


def test_extras_that_documents_and_messages_name_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].keys()
    named = {
        (path.name, extra)
        for path in documents()
        for match in re.findall(r"(?:infir2|\.|-e \S*)\[([a-z0-9_,]+)\]", path.read_text("utf-8"))
        for extra in match.split(",")
        if re.search(r"(pip install|- -e) [^\n]*\[" + match + r"\]", path.read_text("utf-8"))
    }
    assert named, "the documents name extras"
    assert {pair for pair in named if pair[1] not in extras} == set()
    assert {extra for _, extra in named} == extras, "each extra is in a document or a message"
