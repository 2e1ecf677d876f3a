"""The GEMM backends where there is no FP8 hardware: emulation, choices, refusals, layouts."""

import pytest
import torch

from infir2.errors import ConfigError
from infir2.numerics import dequantize, quantize
from infir2.numerics import gemm_scaled as gemm_backends
from infir2.numerics.formats import ROW_BLOCK, TILE_BLOCK
from infir2.numerics.gemm_scaled import Operand, gemm_nt


def operand(rows: int, columns: int, block_rows: int) -> Operand:
    t = quantize(torch.randn(rows, columns).bfloat16(), (block_rows, 128))
    return Operand(t.codes, t.scale, block_rows)


@pytest.mark.parametrize(
    "blocks",
    [
        (ROW_BLOCK, TILE_BLOCK),
        (TILE_BLOCK, ROW_BLOCK),
        (ROW_BLOCK, ROW_BLOCK),
        (TILE_BLOCK, TILE_BLOCK),
    ],
)
@pytest.mark.parametrize("shape", [(5, 7, 200), (130, 140, 128), (0, 4, 16), (4, 0, 16)])
def test_emulation_multiplies_dequantized_values(blocks, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = quantize(torch.randn(m, k), blocks[0]), quantize(torch.randn(n, k), blocks[1])
    out = gemm_nt(a.codes, a.scale, b.codes, b.scale, a.block, b.block, torch.float32)
    torch.testing.assert_close(out, dequantize(a) @ dequantize(b).t())


def test_backend_without_hardware_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    a = quantize(torch.randn(4, 128))
    arguments = (a.codes, a.scale, a.codes, a.scale, a.block, a.block)
    with pytest.raises(ConfigError, match=r"asks for the cublas GEMM.* cpu has no FP8 hardware"):
        gemm_nt(*arguments, backend="cublas")
    monkeypatch.setenv("INFIR2_GEMM", "cutlass")
    with pytest.raises(
        ConfigError, match="INFIR2_GEMM is 'cutlass'; use one of cublas, deepgemm, emulation"
    ):
        gemm_nt(*arguments)
    with pytest.raises(ValueError, match="same number of columns"):
        gemm_nt(a.codes, a.scale, a.codes[:, :64], a.scale, a.block, a.block)


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("shape", [(100, 72), (7, 3), (16, 576), (256, 1000)])
def test_padding_changes_no_value(block_rows: int, shape: tuple[int, int]) -> None:
    plain = operand(*shape, block_rows)
    padded = plain.padded()
    assert [size % 16 for size in padded.codes.shape] == [0, 0]
    values = padded.values()
    assert torch.equal(values[: shape[0], : shape[1]], plain.values())
    assert values[shape[0] :].abs().sum() + values[:, shape[1] :].abs().sum() == 0


def test_scales_reach_cublas_in_its_layout_whatever_their_strides() -> None:
    rows, tiles = operand(48, 640, 1), operand(300, 640, 128)
    assert gemm_backends._cublas_scale(rows).stride() == (1, 48)
    wide = torch.full((3, 8), 9.0)
    wide[:, :5] = tiles.scale
    for scale in (tiles.scale, wide[:, :5], tiles.scale.t().contiguous().t()):
        passed = gemm_backends._cublas_scale(Operand(tiles.codes, scale, 128))
        assert passed.stride() == (1, 8)
        assert torch.equal(passed[:5].t(), tiles.scale)
    assert (
        gemm_backends._cublas_scale(Operand(tiles.codes, wide[:, :5], 128)).data_ptr()
        == wide.data_ptr()
    )


def test_fastest_backend_is_taken_and_a_failing_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_backends, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    times = {"cublas": 2.0, "deepgemm": 1.0}
    monkeypatch.setattr(gemm_backends, "_milliseconds", lambda name, a, b, dtype: times[name])
    a, b = operand(2048, 128, 1), operand(16, 128, 128)
    assert gemm_backends._fastest(a, b, torch.bfloat16, ("cublas", "deepgemm")) == "deepgemm"
    times["deepgemm"] = 3.0
    assert (
        gemm_backends._fastest(a, b, torch.bfloat16, ("cublas", "deepgemm")) == "deepgemm"
    )  # not measured again
    assert (
        gemm_backends._fastest(operand(1921, 128, 1), b, torch.bfloat16, ("cublas", "deepgemm"))
        == "deepgemm"
    ), "nor one of similar size"
    assert (
        gemm_backends._fastest(operand(2049, 128, 1), b, torch.bfloat16, ("cublas", "deepgemm"))
        == "cublas"
    )
    times["deepgemm"] = float("inf")
    assert gemm_backends._fastest(a, b, torch.float32, ("cublas", "deepgemm")) == "cublas"
    assert gemm_backends._fastest(a, b, torch.bfloat16, ("cublas",)) == "cublas"
    torch.use_deterministic_algorithms(True)
    try:
        assert gemm_backends._fastest(a, b, torch.bfloat16, ("cublas", "deepgemm")) == "cublas"
    finally:
        torch.use_deterministic_algorithms(False)


class Event:
    """torch.cuda.Event where there is no GPU."""

    def __init__(self, **_: bool) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, _: "Event") -> float:
        return 1.0


@pytest.mark.parametrize("factor", [1.0, 1.1, float("nan")])
def test_a_backend_with_another_product_is_not_used(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulation = gemm_backends._emulation
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setitem(gemm_backends._RUN, "cublas", emulation)
    monkeypatch.setitem(gemm_backends._RUN, "deepgemm", lambda *all_: emulation(*all_) * factor)
    arguments = (operand(600, 128, 1), operand(64, 128, 128), torch.bfloat16)
    assert gemm_backends._milliseconds("cublas", *arguments) == 1.0
    if factor == 1.0:
        assert gemm_backends._milliseconds("deepgemm", *arguments) == 1.0
        return
    with pytest.warns(UserWarning, match="is not used: its product deviates from cuBLAS's by"):
        assert gemm_backends._milliseconds("deepgemm", *arguments) == float("inf")
