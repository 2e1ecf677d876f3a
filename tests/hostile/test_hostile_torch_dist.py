"""A hostile torch_dist directory is imported or refused in one sentence; it writes nothing else."""

import itertools
import shutil
from pathlib import Path

import cases
import pytest
import torch
from mutate_torch_dist import bombs, mutants, overlaps
from readers import megatron_export


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return megatron_export(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("seed", range(2))
def test_mutants_end_in_a_model_or_a_sentence(tmp_path, good, capsys, seed):
    files = {path.name: path.read_bytes() for path in (good / "torch_dist/release").iterdir()}
    source, out = tmp_path / "a/b/source", tmp_path / "a/b/out"
    for number, (name, mutant) in enumerate(itertools.islice(mutants(files, seed), 60)):
        source.mkdir(parents=True)
        for file, data in mutant.items():
            (source / file).write_bytes(data)
        before = cases.files_below(tmp_path)
        like = ["--like", str(good / "hf")] if number % 3 == 0 else []
        command = ["import", "megatron", str(source), "--to", str(out), *like]
        code = cases.check_command(command, capsys, name)
        assert out.exists() == (code == 0), name
        shutil.rmtree(out, ignore_errors=True)
        assert cases.files_below(tmp_path) == before, name
        shutil.rmtree(source)


def test_a_billion_layers_are_refused_at_once(tmp_path, good, capsys):
    """Also a shape that overflows; and a file that is not one."""
    shutil.copytree(good / "torch_dist/release", tmp_path / "source")
    common = torch.load(tmp_path / "source/common.pt", weights_only=False)  # our own export
    command = ["import", "megatron", str(tmp_path / "source"), "--to", str(tmp_path / "out")]
    for name, value, code in (
        ("num_layers", 900, 3),
        ("num_layers", 10**9, 2),
        ("hidden_size", 2**31, 3),
    ):
        changed = vars(common["args"]) | {name: value}
        torch.save({"args": type(common["args"])(**changed)}, tmp_path / "source/common.pt")
        assert cases.check_command(command, capsys, name) == code
    (tmp_path / "source/common.pt").unlink()
    (tmp_path / "source/common.pt").symlink_to("/dev/zero")
    assert cases.check_command(command, capsys, "device") == 2


def test_pieces_that_unpack_to_more_than_their_file_or_overlap_are_refused(tmp_path, good, capsys):
    files = {path.name: path.read_bytes() for path in (good / "torch_dist/release").iterdir()}
    (tmp_path / "source").mkdir()
    command = ["import", "megatron", str(tmp_path / "source"), "--to", str(tmp_path / "out")]
    for label, mutant in (*bombs(files), *overlaps(files)):
        for file, data in mutant.items():
            (tmp_path / "source" / file).write_bytes(data)
        assert cases.check_command(command, capsys, label) == 3
