"""`make test-engines` names the environments of vLLM and SGLang; without them these tests skip."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import stages

# What vLLM's attention takes on a CPU: a head of 32, and a width that is heads x head.
SHAPE = {
    "hidden_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "ffn_size": 384,
}


@pytest.fixture(scope="session")
def environments() -> Path:
    if not os.environ.get("INFIR2_ENGINES"):
        pytest.skip("needs the environments of vLLM and SGLang: make test-engines")
    return Path(os.environ["INFIR2_ENGINES"])


@pytest.fixture(scope="session")
def start(
    environments: Path, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """What `make_guessing_start` writes, of a shape that servers take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "SHAPE", SHAPE)
        yield stages.make_guessing_start(world, tmp_path_factory.mktemp("start"))
