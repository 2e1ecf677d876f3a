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
def vllm_python(environments: Path) -> str:
    """vLLM's interpreter."""
    return str(environments / "vllm" / "bin" / "python")


@pytest.fixture(scope="session")
def sglang_python(environments: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SGLang's interpreter, which runs `sglang_server.py` in the place of `-m launch_server`."""
    path = tmp_path_factory.mktemp("sglang") / "python"
    python = environments / "sglang" / "bin" / "python"
    path.write_text(
        '#!/bin/sh\n[ "$1 $2" = "-m sglang.launch_server" ] || exit 9\nshift 2\n'
        f'TRITON_INTERPRET=1 exec {python} -O {Path(__file__).parent}/sglang_server.py "$@" '
        "--device=cpu\n"
    )
    path.chmod(0o700)
    return str(path)


@pytest.fixture(scope="session")
def start(
    environments: Path, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """What `make_guessing_start` writes, of a shape that servers take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "SHAPE", SHAPE)
        yield stages.make_guessing_start(world, tmp_path_factory.mktemp("start"))
