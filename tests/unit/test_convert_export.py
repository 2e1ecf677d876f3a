"""Exports and imports of weights: bytes, side files, errors, and that run and file agree."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infir2.checkpoint import Store, open_checkpoint
from infir2.config.schema import Fp8Section, ShapeSection
from infir2.convert import (
    export_fp8,
    export_hf,
    fp8,
    hf,
    import_fp8,
    selfcheck,
    verify_weights,
)
from infir2.convert.selfcheck import E4M3_VALUES, PlainReader
from infir2.errors import CheckFailedError, CheckpointError, ConfigError, OutputExistsError
from infir2.model import Decoder
from infir2.model.hf_names import exported_fp8_weights
from infir2.numerics import convert_to_fp8, quantize

SIDE_FILES = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "hi",
    "generation_config.json": "{}",
}
DOWN = "model.layers.0.mlp.down_proj.weight"


def make_decoder(
    architecture: str = "qwen2", hidden: int = 192, tied: bool = True, seed: int = 0
) -> Decoder:
    """Widths of 192 and 320: neither is a multiple of 128, so both have partial blocks."""
    sizes = {
        "hidden_size": hidden,
        "num_layers": 2,
        "num_heads": hidden // 64,
        "num_kv_heads": 1,
        "ffn_size": 320,
    }
    shape = ShapeSection(architecture=architecture, tie_embeddings=tied, **sizes)
    decoder = Decoder.from_shape(shape, vocab_size=96, seed=seed)
    with torch.no_grad():  # a bias of zeros or norms of ones would hide a mistake
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.2, 0.2, parameter.numel()))
    return decoder


@pytest.fixture(autouse=True)
def skip_logits(monkeypatch):
    """Skip the slow comparison with transformers, unless a test asks for `compare_logits`."""
    monkeypatch.setattr(selfcheck, "SMALL_MODEL_PARAMETERS", 0)


@pytest.fixture
def compare_logits(monkeypatch, skip_logits):
    monkeypatch.setattr(selfcheck, "SMALL_MODEL_PARAMETERS", 10**6)


@pytest.fixture
def make_run(tmp_path):
    def make(decoder: Decoder, name: str = "run", **fp8_section: object) -> Path:
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir(exist_ok=True)
        for file, text in SIDE_FILES.items():
            (tokenizer / file).write_text(text)
        tensors = {f"parameters/{key}": value for key, value in decoder.named_parameters()}
        tensors |= {
            f"optimizer/{key}/exp_avg": torch.zeros_like(value)
            for key, value in decoder.named_parameters()
        }
        state = {
            "model_config": decoder.config.to_hf(),
            "tokenizer_dir": str(tokenizer),
            "fp8": json.loads(Fp8Section(**fp8_section).model_dump_json()),
        }
        store = Store(tmp_path / name)
        store.save(1, tensors, state)
        store.close()
        return tmp_path / name

    return make


def read(directory: Path) -> dict[str, Tensor]:
    reader = PlainReader(directory)
    return {name: reader.read(name) for name in reader.names()}


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def bit_equal(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(as_bytes(left), as_bytes(right))
    )


@pytest.mark.usefixtures("compare_logits")
@pytest.mark.parametrize(
    ("architecture", "tied", "scale_format"),
    [("qwen2", True, "pow2"), ("qwen3", False, "fp32"), ("llama", False, "pow2")],
)
def test_run_to_bf16_to_fp8_holds_the_bytes_of_training(
    tmp_path, make_run, architecture, tied, scale_format
):
    decoder = make_decoder(architecture, tied=tied)
    run = make_run(decoder, scale_format=scale_format)
    export_hf(run, tmp_path / "bf16")
    findings = export_fp8(tmp_path / "bf16", tmp_path / "fp8", scale_format)
    trained = convert_to_fp8(decoder, scale_format)
    expected = dict(exported_fp8_weights(trained))
    written = read(tmp_path / "fp8")
    assert set(written) == set(expected)
    assert ("lm_head.weight" in written) is not tied
    for name, tensor in expected.items():
        assert bit_equal(written[name], tensor), name
    assert verify_weights(run, tmp_path / "fp8") == len(list(decoder.named_parameters()))
    assert any("greedy tokens equal" in finding for finding in findings)
    for name, text in SIDE_FILES.items():
        assert (tmp_path / "fp8" / name).read_text() == text


def test_config_of_an_fp8_export(tmp_path, make_run):
    export_hf(make_run(make_decoder()), tmp_path / "bf16")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8", skip_modules=("*.layers.0.mlp.*",))
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    section = config["quantization_config"]
    assert section.pop("modules_to_not_convert") == [
        f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")
    ] + ["lm_head"]
    assert section == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    written = read(tmp_path / "fp8")
    assert written[DOWN].dtype == torch.bfloat16
    assert written["model.layers.1.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.usefixtures("compare_logits")
def test_transformers_own_fp8_loader_reads_the_values(tmp_path, make_run):
    """At sizes that its CPU path can read; the self-check reports that it tried."""
    decoder = Decoder.from_shape(
        ShapeSection(hidden_size=128, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=256),
        vocab_size=64,
        seed=3,
    )
    export_hf(make_run(decoder), tmp_path / "bf16")
    findings = export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    assert any("own FP8 loader reads the same" in finding for finding in findings)


def test_several_files_have_one_consistent_index(tmp_path, make_run, monkeypatch):
    run = make_run(make_decoder())
    monkeypatch.setattr(hf, "SHARD_BYTES", 150_000)
    export_hf(run, tmp_path / "bf16")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    for kind in ("bf16", "fp8"):
        directory = tmp_path / kind
        index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        files = sorted(path.name for path in directory.glob("*.safetensors"))
        assert len(files) > 2
        assert index == {name: file for file in files for name in load_file(directory / file)}
    assert verify_weights(run, tmp_path / "fp8")


def test_a_zero_block_is_exported_and_read_back(tmp_path, make_run):
    decoder = make_decoder()
    with torch.no_grad():
        dict(decoder.named_parameters())[DOWN][128:, :128] = 0
    run = make_run(decoder)
    export_hf(run, tmp_path / "bf16")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    assert read(tmp_path / "fp8")[DOWN + "_scale_inv"][1, 0] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused_and_nothing_is_left(tmp_path, make_run, value):
    decoder = make_decoder()
    good = make_run(decoder, "good")
    export_hf(good, tmp_path / "bf16")
    with torch.no_grad():
        dict(decoder.named_parameters())[DOWN][3, 5] = value
    with pytest.raises(CheckpointError, match=DOWN):
        export_hf(make_run(decoder, "bad"), tmp_path / "out")
    path = tmp_path / "bf16" / "model.safetensors"
    tensors = load_file(path)
    tensors[DOWN][3, 5] = value
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=DOWN):
        export_fp8(tmp_path / "bf16", tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "bad",
        "bf16",
        "good",
        "tokenizer",
    ]


def test_a_master_beyond_bf16_is_refused(tmp_path, make_run):
    decoder = make_decoder()
    with torch.no_grad():
        dict(decoder.named_parameters())[DOWN][0, 0] = 3.4e38
    with pytest.raises(CheckpointError, match="beyond the range of BF16"):
        export_hf(make_run(decoder), tmp_path / "out")


def test_an_existing_output_is_refused_and_untouched(tmp_path, make_run):
    run = make_run(make_decoder())
    export_hf(run, tmp_path / "bf16")
    (tmp_path / "there").mkdir()
    for convert, source in ((export_hf, run), (export_fp8, tmp_path / "bf16")):
        with pytest.raises(OutputExistsError, match="there"):
            convert(source, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_missing_misshapen_and_unknown_tensors_are_named(tmp_path, make_run):
    export_hf(make_run(make_decoder()), tmp_path / "bf16")
    path = tmp_path / "bf16" / "model.safetensors"
    tensors = load_file(path)
    for change, message in (
        ({DOWN: None}, f"no tensor '{DOWN}'"),
        ({DOWN: tensors[DOWN][:, :64].contiguous()}, r"is \[192, 64\], not \[192, 320\]"),
        ({"model.layers.7.mlp.down_proj.weight": tensors[DOWN].clone()}, "layers.7"),
        ({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, "lm_head.weight"),
        (
            {DOWN: tensors[DOWN].to(torch.float8_e4m3fn)},
            "has no 'model.layers.0.mlp.down_proj.weight_scale_inv'",
        ),
    ):
        save_file(
            {name: tensor for name, tensor in (tensors | change).items() if tensor is not None},
            path,
        )
        with pytest.raises(CheckpointError, match=message):
            export_fp8(tmp_path / "bf16", tmp_path / "out")
    # A tied head that is stored twice describes the same model.
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    export_fp8(tmp_path / "bf16", tmp_path / "out")
    assert "lm_head.weight" not in read(tmp_path / "out")


def test_the_wrong_kind_of_directory_is_an_error(tmp_path, make_run):
    run = make_run(make_decoder())
    export_hf(run, tmp_path / "bf16")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    with pytest.raises(CheckpointError, match="not quantized yet"):
        export_fp8(tmp_path / "fp8", tmp_path / "out")
    with pytest.raises(CheckpointError, match="quant_method fp8"):
        import_fp8(tmp_path / "bf16", tmp_path / "out")
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        export_hf(tmp_path / "bf16", tmp_path / "out")
    with pytest.raises(ConfigError, match="nowhere"):
        export_fp8(tmp_path / "bf16", tmp_path / "out", skip_modules=("model.nowhere.*",))
    assert not (tmp_path / "out").exists()


def test_a_round_trip_through_bf16_changes_no_pow2_value(tmp_path, make_run):
    """The bytes come back too, except in blocks whose largest code is 224 = 448 / 2.

    Those halve their scale, once.
    """
    decoder = make_decoder()
    with torch.no_grad():
        block = dict(decoder.named_parameters())[DOWN][:128, :128]
        block.clamp_(-0.1, 0.1)[0, 0] = 228 / 512  # quantises to 224
    export_hf(make_run(decoder), tmp_path / "bf16")
    directories = [tmp_path / "fp8"]
    export_fp8(tmp_path / "bf16", directories[0])
    for index in range(2):
        import_fp8(directories[-1], tmp_path / f"bf16-{index}")
        # A tool that knows only weights would not keep the scales.
        (tmp_path / f"bf16-{index}/fp8_scales.st").unlink()
        directories.append(tmp_path / f"fp8-{index}")
        export_fp8(tmp_path / f"bf16-{index}", directories[-1])
    first, second, third = (PlainReader(directory) for directory in directories)
    assert first.names() == second.names() == third.names()
    for name in first.names():
        assert bit_equal(second.read(name), third.read(name)), (
            f"{name} changed in the second round trip"
        )
        if name.endswith("_scale_inv"):
            continue
        quantized = name + "_scale_inv" in first.names()
        assert torch.equal(first.values(name, quantized), second.values(name, quantized)), name
        if quantized:
            changed = first.read(name + "_scale_inv") != second.read(name + "_scale_inv")
            for row, column in changed.nonzero().tolist():
                block = first.read(name)[128 * row :, 128 * column :][:128, :128].float()
                assert block.abs().max() == 224.0
            assert name != DOWN or changed[0, 0]
    assert "quantization_config" not in json.loads(
        (tmp_path / "bf16-0" / "config.json").read_text()
    )


def test_import_fp8_then_export_gives_the_same_bytes(tmp_path, make_run):
    """Also for a block whose largest code is 224; a weight that has changed is quantized anew."""
    decoder = make_decoder()
    with torch.no_grad():
        dict(decoder.named_parameters())[DOWN][:128, :128].clamp_(-0.1, 0.1)[0, 0] = 228 / 512
    export_hf(make_run(decoder), tmp_path / "bf16")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    import_fp8(tmp_path / "fp8", tmp_path / "back")
    export_fp8(tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "fp8/model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "again/fp8_scales.st").exists()
    weights = load_file(tmp_path / "back/model.safetensors")
    weights[DOWN][0, 0] = 0.4463  # between two codes: no longer the imported value
    save_file(weights, tmp_path / "back/model.safetensors")
    export_fp8(tmp_path / "back", tmp_path / "changed")
    quantized = quantize(weights[DOWN], (128, 128), "pow2")
    assert bit_equal(read(tmp_path / "changed")[DOWN], quantized.codes)
    (tmp_path / "back/fp8_scales.st").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"fp8_scales\.st: is not readable"):
        export_fp8(tmp_path / "back", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def tamper(directory: Path, change: dict[str, Tensor]) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | change, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_import_fp8_reads_scales_of_16_bits(tmp_path, make_run, dtype):
    export_hf(make_run(make_decoder()), tmp_path / "bf16")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    scale = DOWN + "_scale_inv"
    tamper(tmp_path / "fp8", {scale: read(tmp_path / "fp8")[scale].to(dtype)})
    import_fp8(tmp_path / "fp8", tmp_path / "back")
    expected = PlainReader(tmp_path / "fp8").values(DOWN, True)
    assert torch.equal(read(tmp_path / "back")[DOWN].float(), expected)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_import_fp8_refuses_bad_scales_and_nan_codes_by_name(tmp_path, make_run, value):
    export_hf(make_run(make_decoder()), tmp_path / "bf16")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8", "fp32")
    good = read(tmp_path / "fp8")
    scale = good[DOWN + "_scale_inv"].clone()
    scale[1, 1] = value
    tamper(tmp_path / "fp8", {DOWN + "_scale_inv": scale})
    with pytest.raises(CheckpointError, match=f"{DOWN}_scale_inv has scales that are not finite"):
        import_fp8(tmp_path / "fp8", tmp_path / "back")
    codes = good[DOWN].view(torch.uint8).clone()
    codes[5, 5] = 0xFF
    tamper(tmp_path / "fp8", good | {DOWN: codes.view(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=f"{DOWN} has a NaN code"):
        import_fp8(tmp_path / "fp8", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_verify_weights_names_the_first_difference(tmp_path, make_run):
    decoder = make_decoder()
    run = make_run(decoder)
    export_hf(run, tmp_path / "bf16")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    good = load_file(tmp_path / "fp8" / "model.safetensors")
    checkpoint = open_checkpoint(run).path

    codes = good[DOWN].view(torch.uint8).clone()
    before = int(codes[130, 200])
    codes[130, 200] ^= 1
    tamper(tmp_path / "fp8", {DOWN: codes.view(torch.float8_e4m3fn)})
    with pytest.raises(CheckFailedError) as caught:
        verify_weights(checkpoint, tmp_path / "fp8")
    assert (
        f"'{DOWN}'[130, 200], block [1, 1]: byte 0x{before:02X} in the run"
        f" and 0x{before ^ 1:02X} in the file"
    ) in str(caught.value)
    assert caught.value.exit_code == 1

    scale = good[DOWN + "_scale_inv"].clone()
    scale[1, 2] *= 2
    tamper(tmp_path / "fp8", good | {DOWN + "_scale_inv": scale})
    with pytest.raises(CheckFailedError, match=r"scale of block \[1, 2\]"):
        verify_weights(run, tmp_path / "fp8")

    norm = good["model.norm.weight"].clone()
    norm[7] += 1
    tamper(tmp_path / "fp8", good | {"model.norm.weight": norm})
    with pytest.raises(CheckFailedError, match=r"model\.norm\.weight'\[7\]"):
        verify_weights(run, tmp_path / "fp8")

    tamper(tmp_path / "fp8", good)
    verify_weights(run, tmp_path / "fp8")


def test_verify_weights_compares_lists_and_formats(tmp_path, make_run):
    decoder = make_decoder()
    export_hf(make_run(decoder), tmp_path / "bf16")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    export_fp8(tmp_path / "bf16", tmp_path / "fp8-fp32", "fp32")
    other_list = make_run(decoder, "other-list", skip_modules=("model.layers.1.*",))
    with pytest.raises(
        CheckFailedError, match=r"model\.layers\.1\.\S+' is BF16 in the run and FP8 in"
    ):
        verify_weights(other_list, tmp_path / "fp8")
    with pytest.raises(CheckFailedError, match="declares fp32"):
        verify_weights(tmp_path / "run", tmp_path / "fp8-fp32")
    with pytest.raises(CheckFailedError, match="trains without FP8"):
        verify_weights(make_run(decoder, "plain", enabled=False), tmp_path / "fp8")
    with pytest.raises(CheckFailedError, match="in the run and"):
        verify_weights(make_run(make_decoder(seed=1), "other-weights"), tmp_path / "fp8")


def test_the_self_check_finds_a_wrong_code_and_sets_the_export_aside(
    tmp_path, make_run, monkeypatch
):
    export_hf(make_run(make_decoder()), tmp_path / "bf16")

    def faulty(x: Tensor, *arguments: object) -> object:
        result = quantize(x, *arguments)
        result.codes.view(torch.uint8)[1, 1] += 1
        return result

    monkeypatch.setattr(fp8, "quantize", faulty)
    with pytest.raises(CheckFailedError, match=r"\[1, 1\] reads back as"):
        export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    assert not (tmp_path / "fp8").exists()
    assert len(list(tmp_path.glob("fp8.failed-*"))) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), KeyboardInterrupt()])
def test_an_unforeseen_error_of_the_self_check_leaves_no_export(
    tmp_path, make_run, monkeypatch, error
):
    """The final name is given only after the check: neither an error nor a kill can forge it."""
    export_hf(make_run(make_decoder()), tmp_path / "bf16")

    def fail(*_: object) -> None:
        assert not (tmp_path / "fp8").exists()
        raise error

    monkeypatch.setattr(selfcheck, "_check_tensor", fail)
    with pytest.raises((CheckFailedError, KeyboardInterrupt)) as caught:
        export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    if isinstance(error, Exception):
        assert "ZeroDivisionError (by zero). The export is not usable" in str(caught.value)
    names = [path.name for path in tmp_path.iterdir() if path.name.startswith("fp8")]
    assert len(names) == 1
    assert names[0].startswith("fp8.failed-")


@pytest.mark.usefixtures("compare_logits")
def test_the_self_check_finds_a_config_of_another_model(tmp_path, make_run, monkeypatch):
    """Same tensors, another rotary base in config.json: transformers and our decoder disagree."""
    export_hf(make_run(make_decoder()), tmp_path / "bf16")
    real = selfcheck.read_json
    monkeypatch.setattr(
        selfcheck,
        "read_json",
        lambda path: real(path) | {"rope_theta": 100.0, "rope_parameters": None},
    )
    with pytest.raises(CheckFailedError, match="logits"):
        export_fp8(tmp_path / "bf16", tmp_path / "fp8")


def test_a_large_model_skips_the_comparison_of_logits_and_reports_it(tmp_path, make_run):
    export_hf(make_run(make_decoder()), tmp_path / "bf16")
    findings = export_fp8(tmp_path / "bf16", tmp_path / "fp8")
    assert any("not compared" in finding for finding in findings)


def test_the_value_table_of_the_self_check_is_the_format():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(
        torch.from_numpy(E4M3_VALUES).nan_to_num(nan=1e9), codes.double().nan_to_num(nan=1e9)
    )


def test_a_tokenizer_directory_that_is_gone_is_named(tmp_path, make_run):
    run = make_run(make_decoder())
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="tokenizer is gone"):
        export_hf(run, tmp_path / "out")
