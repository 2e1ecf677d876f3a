"""Every layout against a single process on the same data.

Compares losses, gradients and the bytes of FP8 weights, and counts collectives.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from stages import torchrun

HERE = Path(__file__).parent
TWO = {
    "fsdp": "1,2,1,1",
    "fsdp-recompute": "1,2,1,1",
    "fsdp-gathered": "1,2,1,1",
    "copies": "2,1,1,1",
    "tp": "1,1,1,2",
    "cp": "1,1,2,1",
    "tp-repeated": "1,1,1,2",
}
FOUR = {"hsdp": "2,2,1,1", "tp-fsdp": "1,2,1,2", "tp-cp": "1,1,2,2"}
FOUR |= {
    "qwen3-dp-cp": "1,2,2,1",
    "qwen3-copies-tp": "2,1,1,2",
    "tp-pairs": "1,1,1,4",
}  # pairs of ranks have one key head
Found = dict[str, list[dict[str, Any]]]


def run(directory: Path, num_processes: int, layouts: dict[str, str], **variables: str) -> Found:
    out = directory / "found.json"
    words = [f"{name}={sizes}" for name, sizes in layouts.items()]
    command = [str(HERE / "layouts.py"), str(out), *words]
    code, said = torchrun(num_processes, *command, timeout=540, **variables)
    assert code == 0, said[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run(tmp_path_factory.mktemp("two"), 2, TWO) | run(
        tmp_path_factory.mktemp("four"), 4, FOUR
    )


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_without_fp8_loss_and_gradients_are_those_of_one_process(found: Found, name: str) -> None:
    for rank in found[name]:
        assert rank["tokens"]
        assert rank["loss"] < 1e-5
        assert rank["norm"] < 1e-5
        assert rank["gradient"] < 1e-5


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_with_fp8_the_weights_are_the_same_bytes_and_the_step_the_same(
    found: Found, name: str
) -> None:
    splits_tokens = "tp" in name or "cp" in name
    for rank in found[f"{name}-fp8"]:
        assert rank["codes"]
        assert rank["exported"], "an engine receives the bytes that a single process exports"
        assert rank["quantized"] == [1], (
            "a weight is quantized once per step, not once per micro-batch"
        )
        assert rank["tokens"]
        assert rank["loss"] < (1e-5 if splits_tokens else 1e-6)
        assert rank["decibels"] > (45 if splits_tokens else 100)
        assert rank["worst"] > (40 if splits_tokens else 100), "of a single parameter"
        assert rank["validation"] == found[f"{name}-fp8"][0]["validation"]


@pytest.mark.parametrize("name", ["fsdp", "tp", "cp"])
def test_with_bf16_weights_travel_as_bf16_and_the_step_is_the_same(found: Found, name: str) -> None:
    for rank in found[f"{name}-bf16"]:
        assert rank["loss"] < 1e-5
        assert rank["worst"] > (100 if name == "fsdp" else 45)


def test_number_of_collectives_in_a_step(found: Found) -> None:
    """Two micro-batches per rank.

    Each gathers root and two blocks, and the blocks again in the backward, and reduces three
    gradients. All-reduces: number of tokens, metrics and, with FP8, the blocks' magnitudes.
    """
    for name, all_reduces in (("fsdp", 2), ("fsdp-fp8", 3)):
        assert sorted(found[name][0]["collectives"].values()) == sorted(
            [all_reduces, 2 * (3 + 2), 2 * 3]
        )
    together = sorted(found["fsdp-gathered-fp8"][0]["collectives"].values())
    assert together == sorted([3, 2 * (1 + 1), 2 * (1 + 1)]), (
        "two blocks are one gather, which lasts until their backward"
    )
    assert found["copies-fp8"][0]["collectives"] == {"all_reduce": 2, "all_reduce_coalesced": 1}, (
        "whole replicas exchange all gradients at once, after the last micro-batch"
    )


def test_a_block_is_gathered_before_the_one_before_it_computes(found: Found) -> None:
    """On GPUs the gather overlaps with the computation of the block before, in both directions."""
    forward = ["gather 0", "gather 1", "compute 0", "gather 2", "compute 1", "compute 2"]
    for rank in found["order"]:
        assert rank["none"] == [
            *forward,
            "gather 2",
            "gather 1",
            "backward 2",
            "gather 0",
            "backward 1",
            "backward 0",
        ]
        again = [
            "gather 2",
            "gather 1",
            "backward 2",
            "compute 2",
            "gather 0",
            "backward 1",
            "compute 1",
            "backward 0",
            "compute 0",
        ]
        assert rank["full"] == [*forward, *again], (
            "a block begins its backward by computing its forward again"
        )


def test_the_codes_of_all_shards_take_a_gpu_few_launches(found: Found) -> None:
    """The first gather of a step waits for all codes; a launch costs as much as a small matrix."""
    for few, many in found["launches"]:
        assert many == few < 20, "magnitudes and codes are one kernel each for all weights"


@pytest.mark.parametrize("name", ["transformers", "transformers-bf16", "transformers-fully_shard"])
def test_any_module_with_fp8_layers_can_be_sharded(found: Found, name: str) -> None:
    """By `shard_module` or torch's `fully_shard`, with any optimizer."""
    for rank in found[name]:
        assert rank["losses"][1] < rank["losses"][0] - 0.1
        assert rank["read"]
        assert not any(rank["stale"]), "the second step read the first one's weights"
        assert max(rank["loss"]) < 1e-5
        assert min(rank["hidden"]) > 100
        assert min(rank["gradient"]) > 100
        assert name == "transformers-fully_shard" or rank["quantized"] == [3]


@pytest.mark.costly
@pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install 'infir2[gpu]')"
)
def test_the_operations_of_a_gpu_take_gathered_weights(tmp_path: Path) -> None:
    """Kernels read gathered codes and BF16 values; tensor-parallel ranks add partial sums."""
    for name, ranks in run(
        tmp_path, 2, {name: TWO[name] for name in ("fsdp", "tp")}, TRITON_INTERPRET="1"
    ).items():
        for rank in ranks:
            assert rank["codes"]
            assert rank["quantized"] == ([1] if name.endswith("-fp8") else [])
            assert rank["loss"] < 1e-5
            assert rank["worst"] > (100 if "fsdp" in name else 35)
