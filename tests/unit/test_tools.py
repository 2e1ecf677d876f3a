"""The reference's two converters by their own names and options."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_convert_export import make_decoder, make_run  # noqa: F401 (a fixture)

from infir2.convert import export_fp8, export_hf, export_megatron

TOOLS = Path(__file__).parents[2] / "tools"


def run_tool(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / name), *map(str, words)], capture_output=True, text=True
    )


@pytest.mark.costly
def test_both_tools_convert_and_false_means_false(tmp_path, make_run):  # noqa: F811
    run = make_run(make_decoder())
    export_hf(run, tmp_path / "hf")
    export_megatron(run, tmp_path / "torch_dist")
    origin = ("--origin-hf-dir", tmp_path / "hf")
    done = run_tool(
        "convert_torch_dist_to_hf.py",
        "--input-dir",
        tmp_path / "torch_dist",
        "--output-dir",
        tmp_path / "back",
        *origin,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back/model.safetensors").read_bytes() == (
        tmp_path / "hf/model.safetensors"
    ).read_bytes()
    for word, scale_format in (("False", "fp32"), ("True", "pow2")):
        paths = ("--input-bf16-hf-path", tmp_path / "back", "--output-fp8-hf-path", tmp_path / word)
        done = run_tool("bf16_cast_fp8.py", *paths, "--force-pow-2-scale", word)
        assert done.returncode == 0, done.stderr
        export_fp8(tmp_path / "hf", tmp_path / scale_format, scale_format)
        tool, ours = (
            load_file(tmp_path / name / "model.safetensors") for name in (word, scale_format)
        )
        assert tool.keys() == ours.keys()
        section = json.loads((tmp_path / word / "config.json").read_text())["quantization_config"]
        assert section["scale_fmt"] == {"fp32": "float", "pow2": "ue8m0"}[scale_format]
        assert (tmp_path / word / "model.safetensors").read_bytes() == (
            tmp_path / scale_format / "model.safetensors"
        ).read_bytes()
    again = run_tool("bf16_cast_fp8.py", *paths)
    assert again.returncode == 0, again.stderr
    assert "is there already" in again.stdout
    again = run_tool("bf16_cast_fp8.py", *paths, "--force-pow-2-scale", "False")
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize("name", ["convert_torch_dist_to_hf.py", "bf16_cast_fp8.py"])
def test_a_python_without_infir2_gets_one_sentence(name):
    command = [sys.executable, "-S", "-E", str(TOOLS / name), "--help"]  # no site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{sys.executable} cannot import infir2" in done.stderr


@pytest.mark.parametrize("name", ["convert_torch_dist_to_hf.py", "bf16_cast_fp8.py"])
def test_the_tools_stay_thin(name):
    assert len((TOOLS / name).read_text().splitlines()) <= 15
