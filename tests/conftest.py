"""Fixtures shared by all tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stages import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slice of the demo's world: tokenizer and data of every stage."""
    return make_world(tmp_path_factory.mktemp("world") / "world")
