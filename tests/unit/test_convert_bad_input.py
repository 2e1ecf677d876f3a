"""Conversions that fail, run as commands.

Each prints one sentence, exits with the right code, and leaves no output.
"""

import errno
import json
import resource
import struct
import subprocess
import sys

import pytest
from test_convert_export import make_decoder, make_run  # noqa: F401 (a fixture)

from infir2.cli import main
from infir2.convert import export_hf, export_megatron
from infir2.errors import CheckpointError


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def escape(path):
    weights = {"model.norm.weight": "../secret.safetensors"}
    (path.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(cut, "safetensors"), (huge_header, "safetensors"), (escape, "../secret")],
)
@pytest.mark.parametrize("kind", ["fp8", "megatron"])
def test_bad_weights_are_exit_3(tmp_path, make_run, capsys, damage, sentence, kind):  # noqa: F811
    export_hf(make_run(make_decoder()), tmp_path / "hf")
    damage(tmp_path / "hf/model.safetensors")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["export", kind, str(tmp_path / "hf"), "--to", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("infir2: error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["hf", "fp8", "megatron"])
def test_a_full_disk_is_exit_3_and_leaves_nothing(tmp_path, make_run, kind):  # noqa: F811
    """A limit on the size of a file stands in for the disk."""
    run = make_run(make_decoder())
    export_hf(run, tmp_path / "bf16")
    source = tmp_path / "bf16" if kind == "fp8" else run
    before = sorted(path.name for path in tmp_path.iterdir())
    command = [
        sys.executable,
        "-m",
        "infir2",
        "export",
        kind,
        str(source),
        "--to",
        str(tmp_path / "out"),
        "--quiet",
    ]
    limit = (50_000, 50_000)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert done.returncode == 3, done.stderr
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_disk_is_named_behind_an_error_of_torchs_writer(tmp_path, make_run, monkeypatch):  # noqa: F811
    """On a full disk the writer fails once more as it closes, and says nothing of the disk."""

    def save(*_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")  # noqa: B904

    run = make_run(make_decoder())
    monkeypatch.setattr("torch.save", save)
    with pytest.raises(CheckpointError, match="No space left on device, errno 28 ENOSPC; name ano"):
        export_megatron(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
