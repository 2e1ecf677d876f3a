"""Model directories: invalid files raise one-sentence errors; outputs are complete or absent."""

import json
import os
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from infir2.errors import CheckpointError, OutputExistsError
from infir2.model import HfWeights, write_hf
from infir2.model.safetensors_io import INDEX_FILE, SINGLE_FILE, has_nan_code, read_json

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.zeros(2, 2).to(torch.float8_e4m3fn),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.fixture
def parallel_model(tmp_path: Path) -> Path:
    save_file({"a": TENSORS["a"]}, tmp_path / "model-1.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        for _ in HfWeights(directory):
            pass
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_tensors_are_described_and_read(single: Path) -> None:
    weights = HfWeights(single)
    assert sorted(weights.names()) == ["a", "b", "c"]
    assert weights.shape("a") == (2, 3)
    for name, tensor in weights:
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor.float(), TENSORS[name].float())
    with pytest.raises(CheckpointError, match="no tensor d"):
        weights.read("d")


def test_a_missing_shard_is_named(parallel_model: Path) -> None:
    (parallel_model / "model-2.safetensors").unlink()
    assert "model-2.safetensors is missing" in refusal(parallel_model)


def test_a_tensor_that_the_index_only_promises_is_named(parallel_model: Path) -> None:
    write_index(parallel_model, {"a": "model-1.safetensors", "x": "model-2.safetensors"})
    assert "no tensor x" in refusal(parallel_model)


@pytest.mark.parametrize(
    "file_name",
    ["../model-1.safetensors", "/etc/passwd", "sub/model.safetensors", "model-1.bin", "..", 7],
)
def test_an_index_reaches_no_other_file(parallel_model: Path, file_name: object) -> None:
    save_file(TENSORS, parallel_model.parent / "model-1.safetensors")
    write_index(parallel_model, {"a": file_name})
    assert "is not a .safetensors file of this directory" in refusal(parallel_model)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', "\xff", "[" * 100_000])
def test_a_broken_index_is_refused(parallel_model: Path, content: str) -> None:
    (parallel_model / INDEX_FILE).write_bytes(content.encode("latin-1"))
    assert INDEX_FILE in refusal(parallel_model)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_refused(single: Path, keep: int) -> None:
    path = single / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:keep])
    assert "not a complete safetensors file" in refusal(single)


@pytest.mark.parametrize("header_bytes", [2**63, 2**40, 150_000_000])
def test_a_huge_header_is_refused_without_memory_for_it(single: Path, header_bytes: int) -> None:
    with open(single / SINGLE_FILE, "r+b") as file:
        file.write(struct.pack("<Q", header_bytes))
        file.truncate(200_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "not a complete safetensors file" in refusal(single)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert "neither" in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pickled" in refusal(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(
        b"\x80\x02 not safetensors at all, but long enough for a header"
    )
    assert "not a complete safetensors file" in refusal(tmp_path)


def test_shards_respect_their_size_and_read_back(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)} | {
        "large": torch.ones(1000)
    }
    write_hf(tmp_path / "out", iter(tensors.items()), {"model_type": "qwen2"}, max_shard_bytes=1000)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(sizes) == 4  # two, two, one, and the large one alone
    assert sizes[-2] < 1000 + 400
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 4 * 1500
    weights = HfWeights(tmp_path / "out")
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "qwen2"}


def test_writing_holds_one_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second shard's tensors are not asked for before the first shard is on disk."""
    on_disk_when_asked = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i in range(4):
            on_disk_when_asked.append(len(list(tmp_path.glob(".out.tmp-*/shard-*"))))
            yield f"t{i}", torch.ones(100)

    write_hf(tmp_path / "out", tensors(), {}, max_shard_bytes=400)
    assert on_disk_when_asked == [0, 0, 1, 2]


def test_several_writers_write_the_same_files(tmp_path: Path) -> None:
    tensors = [(f"t{i}", torch.full((64,), float(i))) for i in range(20)]
    for writers in (1, 4):
        write_hf(tmp_path / str(writers), iter(tensors), {}, None, 600, num_writers=writers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) > 9
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


@pytest.mark.parametrize("size", [1, 7, 8, 4096, 1_100_003])
def test_every_nan_code_is_found(size: int) -> None:
    finite = torch.arange(size, dtype=torch.int64).remainder(254).add(1).to(torch.uint8)
    finite[(finite & 0x7F) == 0x7F] = 0x7E  # the largest value
    assert not has_nan_code(finite.view(torch.float8_e4m3fn))
    for position in {0, size // 2, size - 1}:
        for code in (0x7F, 0xFF):
            codes = finite.clone()
            codes[position] = code
            assert has_nan_code(codes.view(torch.float8_e4m3fn))
            assert has_nan_code(codes[position:].view(torch.float8_e4m3fn))


def test_side_files_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "merges.txt",
        "tokenizer.model",
    ]
    for name in [*wanted, "config.json", "model.safetensors", "README.md"]:
        (source / name).write_text(f"content of {name}")
    write_hf(tmp_path / "out", TENSORS.items(), {}, side_files_from=source)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*wanted, "config.json", SINGLE_FILE]
    )
    assert (tmp_path / "out" / "merges.txt").read_text() == "content of merges.txt"


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        write_hf(tmp_path / "out", TENSORS.items(), {})
    assert not list((tmp_path / "out").iterdir())


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        yield from TENSORS.items()

    with pytest.raises(OutputExistsError):
        write_hf(tmp_path / "out", tensors(), {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


NAN_CODES = torch.tensor([[1, 0xFF]], dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor([float("-inf")], dtype=torch.bfloat16),
        NAN_CODES,
    ],
)
def test_a_non_finite_weight_leaves_nothing_behind(tmp_path: Path, bad: Tensor) -> None:
    with pytest.raises(CheckpointError, match="tensor bad has values that are not finite"):
        write_hf(tmp_path / "out", [("a", torch.ones(100)), ("bad", bad)], {}, max_shard_bytes=100)
    assert not list(tmp_path.iterdir())


def test_a_failing_source_or_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(100)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_hf(tmp_path / "out", tensors(), {})
    with pytest.raises(CheckpointError, match="occurs twice"):
        write_hf(tmp_path / "out", [("a", torch.ones(2)), ("a", torch.ones(2))], {})
    with pytest.raises(CheckpointError, match="no weights"):
        write_hf(tmp_path / "out", [], {})
    assert not list(tmp_path.iterdir())


def test_only_a_regular_file_of_a_bounded_size_is_read_as_json(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"")
    os.truncate(tmp_path / "large", 65 << 20)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "fifo", tmp_path / "large", tmp_path / "loop", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_json(path)


@pytest.mark.parametrize("data", [rb'{"a": "\uDb00"}', b'{"a": "\xed\xa0\x80"}', rb'{"\ud83d": 1}'])
def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path, data: bytes) -> None:
    """It could be written to no file again, nor given to a tokenizer."""
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json(path)
    for good in (rb'{"a": "\ud83d\ude00"}', '{"a": "\U0001f600"}'.encode("utf-16")):
        path.write_bytes(good)
        assert read_json(path) == {"a": "\U0001f600"}
