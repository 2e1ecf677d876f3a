"""Fixtures shared by all tests."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stages import end_leftovers, make_world, of_today

from infir2.demo.tokenizer import write_tokenizer
from infir2.demo.world import build_vocabulary, every_phrase

# setuptools replaces distutils and asserts that nobody has imported the standard library's before:
# import it first, because megatron-core does so late (through torch.utils.cpp_extension).
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Half of the costly tests a day; `make test-faults` runs all of them."""
    costly = [item for item in items if item.get_closest_marker("costly")]
    for item in set(costly) - set(of_today(costly, -(-len(costly) // 2))):
        item.add_marker(pytest.mark.skip(reason="costly, on another day; make test-faults"))


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    yield
    end_leftovers()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small version of the demo's data: tokenizer and data of every stage."""
    return make_world(tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tokenizer alone; a test that changes it copies it first."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, build_vocabulary(every_phrase()))
    return directory
