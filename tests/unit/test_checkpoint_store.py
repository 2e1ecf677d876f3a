"""The checkpoint store: tensors bit for bit, retention, and the newest good checkpoint."""

import collections
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from infir2.checkpoint import Store, dcp, open_checkpoint, reader
from infir2.checkpoint.manifest import FileEntry, encode_manifest, read_manifest, verify_directory
from infir2.checkpoint.reader import published_steps, read_state
from infir2.errors import CheckpointCorruptError, CheckpointError
from infir2.parallel.shard_spec import ShardSpec, unsharded


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "parameters/a": torch.randn(5, 7, generator=generator),
        "optimizer/a/exp_avg": torch.randn(5, 7, generator=generator),
    }


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
    read_by_torch = {name: torch.full_like(tensor.detach(), 0) for name, tensor in tensors.items()}
    torch_dcp.load(read_by_torch, storage_reader=torch_dcp.FileSystemReader(path), no_dist=True)
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    converted = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name, tensor in tensors.items():
        assert bits(read_by_torch[name]) == bits(converted[name]) == bits(tensor.detach()), name


def test_a_shard_is_read_from_the_pieces_that_overlap_it_only(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp, "PIECE_BYTES", 100)
    monkeypatch.setattr(dcp, "FILE_BYTES", 200)
    wide = torch.arange(40.0).view(10, 4)
    tensors = {
        "a": wide,
        "b": wide.t(),
        "row": torch.arange(100.0).view(1, 100),
        "c": torch.arange(60.0),
    }
    path = Store(tmp_path).save(1, tensors, {})
    files = sorted(path.glob("*.distcp"))
    assert [file.name for file in files] == [f"__0_{number}.distcp" for number in range(len(files))]
    assert len(files) == 5, (
        "bytes: a, b 160 each in 6 + 4 and 2 + 2 rows; row 400 in one piece; c 240 in 100, 100, 40"
    )
    read = open_checkpoint(tmp_path).tensors()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    for spec in (
        ShardSpec((10, 4), (5, 1), (3, 2)),
        ShardSpec((10, 4), (0, 3), (10, 1)),
        ShardSpec((10, 4), (9, 0), (0, 4)),
    ):
        rows, columns = (
            slice(start, start + size)
            for start, size in zip(spec.offset, spec.local_shape, strict=True)
        )
        assert torch.equal(read.read_shard("a", spec), wide[rows, columns])
    by_torch = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    torch_dcp.load(by_torch, storage_reader=torch_dcp.FileSystemReader(path), no_dist=True)
    assert all(torch.equal(by_torch[name], tensor) for name, tensor in tensors.items())
    for file in files[1:]:
        file.unlink()
    assert torch.equal(read.read_shard("a", ShardSpec((10, 4), (7, 0), (3, 4))), wide[7:]), (
        "of the first file alone"
    )
    with pytest.raises(CheckpointError, match=r"'c' cannot be read .*No such file"):
        read["c"]


@pytest.mark.parametrize(
    ("name", "out", "message"),
    [
        ("a", torch.zeros(4), r"'a' is \[3\] torch.float32, and \[4\] torch.float32 is needed"),
        ("a", torch.zeros(3, dtype=torch.bfloat16), "bfloat16 is needed"),
        ("b", torch.zeros(3), "has no tensor 'b'"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path, name, out, message):
    Store(tmp_path).save(1, {"a": torch.ones(3)}, {})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path).tensors().read_into(name, unsharded(out.shape), out)


class Attack:
    """Unpickling this with `pickle.load` makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.sentinel),)


def replace_file(path: Path, data: bytes) -> None:
    """As an attacker who knows the manifest's format."""
    step, files = read_manifest(path.parent)
    path.write_bytes(data)
    files[path.name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    (path.parent / "manifest.json").write_bytes(encode_manifest(step, files))


def test_a_hostile_metadata_is_refused_even_if_the_manifest_matches_it(tmp_path):
    sentinel = tmp_path / "sentinel"
    path = Store(tmp_path / "run").save(1, {"a": torch.ones(3)}, {}) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(Attack(sentinel)))
    with pytest.raises(CheckpointCorruptError, match=r"\.metadata: has \d+ bytes instead of"):
        open_checkpoint(path.parent)
    for attack, named in (
        (Attack(sentinel), "posix.mkdir"),
        (collections.OrderedDict(), "collections.OrderedDict"),
        (os.system, "posix.system"),
    ):
        metadata.planner_data = attack
        replace_file(path, pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=rf"\.metadata: asks for '{named}'"):
            open_checkpoint(path.parent).tensors()
    assert not sentinel.exists()


def test_a_metadata_cannot_lead_out_of_what_the_manifest_lists(tmp_path):
    path = Store(tmp_path / "run").save(1, {"a": torch.ones(3)}, {}) / ".metadata"
    for name, message in (
        ("../other", "outside the checkpoint"),
        ("unlisted.distcp", "which the manifest does not list"),
    ):
        metadata = pickle.loads(path.read_bytes())
        next(iter(metadata.storage_data.values())).relative_path = name
        replace_file(path, pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path.parent).tensors()


def test_a_hostile_payload_is_not_unpickled_and_a_missing_part_is_not_made_up(tmp_path):
    sentinel = tmp_path / "sentinel"
    path = Store(tmp_path / "run").save(1, {"a": torch.ones(3)}, {})
    torch.save({"x": Attack(sentinel)}, tmp_path / "attack.pt")
    payload = (tmp_path / "attack.pt").read_bytes()
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (info,) = metadata.storage_data.values()
    info.length = len(payload)
    replace_file(path / "__0_0.distcp", payload)
    replace_file(path / ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="'a' cannot be read"):
        open_checkpoint(path).tensors()["a"]
    assert not sentinel.exists()
    metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size((2,))
    replace_file(path / ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="2 of the 3 values"):
        open_checkpoint(path).tensors()["a"]


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
    before = {
        entry.name: entry.stat().st_mtime_ns for entry in (store.directory / "step-1").iterdir()
    }
    store.save(1, tensors_of(2), {"step": 1})
    assert {
        entry.name: entry.stat().st_mtime_ns for entry in (store.directory / "step-1").iterdir()
    } == before


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


def test_a_checkpoint_that_its_run_removed_while_it_was_read_is_not_called_damaged(tmp_path):
    store = Store(tmp_path, keep=1)
    save(store, 1)
    checkpoint = open_checkpoint(tmp_path)
    tensors = checkpoint.tensors()
    save(store, 2)
    for read in (
        lambda: checkpoint.state,
        lambda: tensors[next(iter(tensors))],
        checkpoint.tensors,
    ):
        with pytest.raises(
            CheckpointError, match=r"step-1: was removed by its run.*open the newest"
        ):
            read()


def test_sizes_only_reads_no_tensor(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    save(store, 2)
    shard = store.directory / "step-2" / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert open_checkpoint(tmp_path, sizes_only=True).step == 2
    assert read_state(tmp_path) == open_checkpoint(tmp_path, sizes_only=True).state
    assert open_checkpoint(tmp_path, warn=lambda _: None).step == 1
    shard.write_bytes(b"")
    assert open_checkpoint(tmp_path, warn=lambda _: None, sizes_only=True).step == 1


def test_a_search_begins_again_when_the_run_publishes_and_removes_meanwhile(tmp_path, monkeypatch):
    store = Store(tmp_path, keep=1)
    save(store, 1)
    real = reader.load_checkpoint

    def load(path: Path, sizes_only: bool = False):
        if path.name == "step-1":
            monkeypatch.undo()
            save(store, 2)
        return real(path, sizes_only)

    monkeypatch.setattr(reader, "load_checkpoint", load)
    assert open_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "../a", ".."])
def test_a_manifest_lists_only_names_that_a_file_can_have(tmp_path, name):
    (tmp_path / "manifest.json").write_bytes(encode_manifest(1, {name: FileEntry(1, "0")}))
    with pytest.raises(CheckpointCorruptError, match="is not a file inside the checkpoint"):
        verify_directory(tmp_path)
