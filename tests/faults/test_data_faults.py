"""Faults F12, F15, F16 through the command line.

F12: unusable rows. F15: nothing to train on. F16: values that FP8 cannot represent.
"""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stages import SHAPE, curve, lines, options, run

from infir2.cli import main
from infir2.data.rows import Quarantine
from infir2.data.sources import Source
from infir2.data.types import RowError
from infir2.numerics import Fp8Linear
from infir2.numerics.quantize import nonfinite_blocks

ASKED = {"role": "user", "content": "2+3=?"}
ANSWERED = {"role": "assistant", "content": "5"}
DEEP = b'{"a": ' + b"[" * 200_000


def line(*messages: object) -> bytes:
    return json.dumps({"messages": messages}).encode()


POISON: list[tuple[bytes, str]] = [
    (line(), "empty"),
    (line(ASKED), "no_trained_tokens"),
    (line(ASKED, {"role": "assistant", "content": "9" * 4000}), "too_long"),
    (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "bad_utf8"),
    (line(ASKED, {"role": "assistant", "content": "\ud800"}), "bad_utf8"),
    (b'{"messages": [', "bad_json"),
    (DEEP, "bad_json"),
    (b'{"messages": null}', "null_field"),
    (line(ASKED, {"role": "assistant", "content": None}), "null_field"),
    (line(ASKED, {"role": "assistant", "content": "a\0b"}), "nul_byte"),
    (json.dumps({"text": "another kind of row"}).encode(), "missing_field"),
    (line({"role": "tool", "content": "x"}, ANSWERED), "bad_role"),
    (b'{"messages": "a text"}', "bad_field"),
]


def sft(world: Path, run_dir: Path, rows: list[bytes], **values: object) -> list[str]:
    """One epoch of SFT of a new model on these rows."""
    path = run_dir.parent / f"{run_dir.name}.jsonl"
    path.write_bytes(b"\n".join(rows) + b"\n")
    arguments = options(
        world, run_dir, "sft1", train__epochs=1.0, train__validate_every=0, **values
    )
    arguments += [f"--data.sources.0.path={path}", "--model.path="]
    return arguments + [f"--model.shape.{name}={value}" for name, value in SHAPE.items()]


def test_f12_unusable_rows_are_quarantined_and_no_neighbor_is_lost(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of as many samples as there are usable rows trains each of them.

    The rows are unusable in thirteen ways, each between two usable rows.
    """
    good = (world / "sft1.jsonl").read_bytes().splitlines()[: 2 * len(POISON)]
    mixed = [
        row
        for index, (bad, _) in enumerate(POISON)
        for row in (good[2 * index], bad, good[2 * index + 1])
    ]
    arguments = sft(
        world,
        tmp_path / "run",
        mixed,
        data__max_quarantined_fraction=0.5,
        data__batch_samples=len(good),
    )
    run(arguments)
    listed = [
        json.loads(text)
        for text in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    ]
    wanted = {
        f"{tmp_path}/run.jsonl:{3 * index + 2}": reason for index, (_, reason) in enumerate(POISON)
    }
    assert {row["origin"]: row["reason"] for row in listed} == wanted
    assert len(listed) == len(POISON)
    (detail,) = [
        event["detail"]
        for event in lines(tmp_path / "run", "event")
        if event["event"] == "quarantined_rows"
    ]
    assert all(
        f"'{reason}': {count}" in detail for reason, count in Counter(wanted.values()).items()
    )
    run(sft(world, tmp_path / "clean", good, data__batch_samples=len(good)))
    first, clean = (curve(tmp_path / name, "trained_tokens")[0] for name in ("run", "clean"))
    assert first == clean
    assert (
        main([*sft(world, tmp_path / "strict", mixed), "--data.max_quarantined_fraction=0.01"]) == 4
    )
    assert "raise data.max_quarantined_fraction" in capsys.readouterr().err


def test_f15_a_file_in_which_nothing_can_be_trained_ends_the_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = sft(world, tmp_path / "run", [line(ASKED)] * 5, data__max_quarantined_fraction=1.0)
    assert main(arguments) == 4
    assert "no row of data.sources can be used" in capsys.readouterr().err


@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
@pytest.mark.parametrize(
    "value", [0.0, 1e-40, 1e-30, 1e30], ids=["zero", "subnormal", "tiny", "large"]
)
def test_f16_blocks_at_the_ends_of_the_range_stay_finite(value: float, scale_format: str) -> None:
    """One group of a token and one block of the weight have extreme values.

    The rows are not a multiple of 128 long.
    """
    torch.manual_seed(0)
    layer, x = Fp8Linear(200, 136, bias=False, scale_format=scale_format), torch.randn(5, 200)
    with torch.no_grad():
        layer.weight[128:, 128:] = 0.0
        x[2, 128:] = value * (1 + torch.rand(72)) / 2
    x.requires_grad_()
    out = layer(x)
    out[:2].sum().backward()
    assert all(torch.isfinite(y).all() for y in (out, x.grad, layer.weight.grad))
    sizes = x.abs().double() @ layer.weight.abs().double().t()
    largest = x.abs().amax(1, keepdim=True).double() @ layer.weight.abs().double().sum(1)[None]
    # Each operand is rounded to half a step of three bits, or half the smallest code of its block.
    assert (
        (out - x.double() @ layer.weight.double().t()).abs() <= sizes * 0.14 + largest * 2.0**-16
    ).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_f16_nonfinite_values_are_counted_and_never_exported(
    world: Path, tmp_path: Path, bad: float, capsys: pytest.CaptureFixture[str]
) -> None:
    layer, x = Fp8Linear(200, 136), torch.randn(5, 200)
    x[2, 150] = bad
    nonfinite_blocks.take(torch.device("cpu"))
    assert torch.isfinite(layer(x)).all(dim=1).tolist() == [True, True, False, True, True]
    assert nonfinite_blocks.take(torch.device("cpu")) == 1

    run(options(world, tmp_path / "run", "cpt", schedule__total_steps=4, train__validate_every=0))
    run(["export", "hf", str(tmp_path / "run"), "--to", str(tmp_path / "hf")])
    path, name = tmp_path / "hf" / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name][5, 7] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    assert main(["export", "fp8", str(tmp_path / "hf"), "--to", str(tmp_path / "fp8")]) == 3
    assert name in capsys.readouterr().err
    assert not (tmp_path / "fp8").exists()
    tensors[name][:] = 0.0
    save_file(tensors, path, metadata={"format": "pt"})
    run(["export", "fp8", str(tmp_path / "hf"), "--to", str(tmp_path / "fp8")])
    assert not torch.isnan(
        load_file(tmp_path / "fp8" / "model.safetensors")[f"{name}_scale_inv"]
    ).any()


def test_f12_a_damaged_quarantine_file_stops_no_run(world: Path, tmp_path: Path) -> None:
    """One line is corrupt and one is truncated: these rows are listed again on new lines."""
    good = (world / "sft1.jsonl").read_bytes().splitlines()[:8]
    arguments = sft(
        world,
        tmp_path / "run",
        [*good, b'{"messages": null}', b'{"messages": ['],
        data__max_quarantined_fraction=0.5,
    )
    run([*arguments, "--train.stop_after_step=1"])
    path = tmp_path / "run" / "quarantine.jsonl"
    path.write_bytes(b'{"origin": "lost\xff\n{}}\n"x"\n' + path.read_bytes()[:-5])
    run(arguments)
    listed = [line for line in path.read_bytes().splitlines() if line.startswith(b'{"origin": "/')]
    assert len(listed) == len({json.loads(line)["origin"] for line in listed})
    assert {json.loads(line)["reason"] for line in listed} <= {"null_field", "bad_json"}


def test_f12_a_full_disk_loses_a_line_of_the_quarantine_file_and_not_the_run(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n" * 4)
    source, path = Source(str(tmp_path / "rows.jsonl")), tmp_path / "full" / "quarantine.jsonl"
    (tmp_path / "full").write_text("a file where the directory would be")
    quarantine = Quarantine(0.9, path)
    quarantine.add(source, 0, RowError("empty", "nothing"))
    (tmp_path / "full").unlink()
    quarantine.add(source, 0, RowError("empty", "nothing"))
    assert len(path.read_text().splitlines()) == 1
    assert quarantine.counts == {str(source.path): {"empty": 2}}
