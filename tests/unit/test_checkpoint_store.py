"""The checkpoint store: what goes in comes out bit for bit, retention, and which checkpoint is the newest good one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infir2.checkpoint import Store, open_checkpoint
from infir2.checkpoint.shards import LazyTensors, split_shards, write_shard
from infir2.checkpoint.store import published_steps
from infir2.errors import CheckpointCorruptError, CheckpointError


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"parameters/a": torch.randn(5, 7, generator=generator), "optimizer/a/exp_avg": torch.randn(5, 7, generator=generator)}


def save(store: Store, step: int) -> None:
    store.save(step, tensors_of(step), {"step": step})


def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path):
    wide = torch.randn(6, 8)
    tensors = {
        "f32": wide,
        "transposed": wide.t(),
        "strided": wide[:, ::2],
        "bf16": wide.to(torch.bfloat16),
        "f16": wide.half(),
        "f64": wide.double(),
        "fp8": wide.to(torch.float8_e4m3fn),
        "e8m0": torch.tensor([1.0, 2.0, 4.0]).to(torch.float8_e8m0fnu),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "i64": torch.arange(5),
        "i32": torch.arange(5, dtype=torch.int32),
        "u8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(wide),
    }
    state = {"step": 3, "rate": 0.1 + 0.2, "text": "ä\n", "none": None, "nested": [{"a": [1, 2]}]}
    path = Store(tmp_path).save(3, tensors, state)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path == path
    assert checkpoint.state == state
    read = checkpoint.tensors()
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape == read.shape(name)
        assert bits(read[name]) == bits(tensor.detach()), name
    assert set(load_file(path / "tensors-00000.safetensors")) == set(tensors)  # an independent reader agrees


def test_tensors_are_split_into_files_in_order(tmp_path):
    tensors = {str(index): torch.full((10,), float(index)) for index in range(5)}
    shards = list(split_shards(tensors, shard_bytes=80))
    assert [list(shard) for shard in shards] == [["0", "1"], ["2", "3"], ["4"]]
    assert [list(shard) for shard in split_shards(tensors, shard_bytes=1)] == [[name] for name in tensors]
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for path, shard in zip(paths, shards, strict=True):
        entry = write_shard(path, shard)
        assert entry.size == path.stat().st_size
    read = LazyTensors(paths)
    assert {name: read[name][0].item() for name in read} == {str(index): float(index) for index in range(5)}


def test_retention_keeps_the_newest(tmp_path):
    store = Store(tmp_path, keep=2)
    for step in (5, 10, 100, 20):  # by number, not by name
        save(store, step)
    assert published_steps(store.directory) == [20, 100]
    assert store.newest().step == 100
    assert sorted(entry.name for entry in store.directory.iterdir()) == ["step-100", "step-20"]


def test_saving_a_step_again_keeps_what_is_there(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    before = {entry.name: entry.stat().st_mtime_ns for entry in (store.directory / "step-1").iterdir()}
    store.save(1, tensors_of(2), {"step": 1})
    assert {entry.name: entry.stat().st_mtime_ns for entry in (store.directory / "step-1").iterdir()} == before


def test_a_damaged_step_is_moved_aside_when_saved_again_and_removed_when_old(tmp_path):
    warnings = []
    store = Store(tmp_path, keep=1, warn=warnings.append)
    save(store, 1)
    (store.directory / "step-1" / "state.json").write_text("{}")
    save(store, 1)
    assert store.newest().state == {"step": 1}
    assert len(list(store.directory.glob("corrupt-step-1-*"))) == 1
    assert "state.json" in warnings[0]
    save(store, 2)
    assert [entry.name for entry in store.directory.iterdir()] == ["step-2"]


def test_after_a_fallback_the_damaged_future_does_not_shadow_new_checkpoints(tmp_path):
    store = Store(tmp_path, keep=1)
    save(store, 10)
    store._keep = 3
    save(store, 20)
    (store.directory / "step-20" / "state.json").unlink()
    store = Store(tmp_path, keep=1)
    assert store.newest().step == 10
    save(store, 15)
    assert published_steps(store.directory) == [15]
    assert store.newest().step == 15


def test_a_fresh_run_directory_has_no_checkpoint(tmp_path):
    assert Store(tmp_path / "new" / "run").newest() is None
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        open_checkpoint(tmp_path / "new" / "run")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "checkpoints" / "step-7")


def test_open_by_run_and_by_step(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    save(store, 2)
    assert open_checkpoint(tmp_path).step == 2
    assert open_checkpoint(str(tmp_path / "checkpoints" / "step-1")).step == 1


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(TypeError):
        store.save(1, {}, {"generator": object()})
    assert list(store.directory.iterdir()) == []


def test_a_renamed_step_is_not_taken_for_another(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    (store.directory / "step-1").rename(store.directory / "step-9")
    with pytest.raises(CheckpointCorruptError, match="says step 1"):
        open_checkpoint(store.directory / "step-9")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", ""])
def test_a_manifest_cannot_point_outside_the_checkpoint(tmp_path, name):
    from infir2.checkpoint.manifest import FileEntry, encode_manifest

    path = tmp_path / "step-1"
    path.mkdir()
    (path / "manifest.json").write_bytes(encode_manifest(1, {name: FileEntry(0, "0" * 64)}))
    with pytest.raises(CheckpointCorruptError, match="not a file inside"):
        open_checkpoint(path)


def test_a_manifest_of_a_newer_format_is_named_as_such(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    manifest: Path = store.directory / "step-1" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="newer infir2"):
        open_checkpoint(tmp_path)
