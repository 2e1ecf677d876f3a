"""Kernels and GEMMs on a GPU: bit-equality, every backend against emulation, torch.compile."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="triton is not installed (pip install 'infir2[gpu]')")
import kernel_cases as cases

from infir2.config.schema import OptimizerSection
from infir2.numerics import gemm_scaled as gemm_backends
from infir2.numerics.error import relative_error
from infir2.numerics.formats import ROW_BLOCK, TILE_BLOCK, Fp8Tensor
from infir2.numerics.kernels import api as kernels
from infir2.numerics.kernels import usable
from infir2.numerics.quantize_reference import quantize as quantize_reference
from infir2.train.optimizer import make_optimizer, update

converts = torch.cuda.is_available() and usable(torch.device("cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not converts, reason="needs an NVIDIA GPU from sm_89 on"),
]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available()
    or gemm_backends.missing_block_scaling(torch.device("cuda")) is not None,
    reason="block-scaled FP8 GEMMs need a Hopper GPU",
)
FORMATS = ("pow2", "fp32")
PAIRS = [(ROW_BLOCK, TILE_BLOCK), (TILE_BLOCK, ROW_BLOCK), (ROW_BLOCK, ROW_BLOCK)]


@pytest.mark.parametrize("name", cases.CONVERSIONS)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (0, 130), (131, 1000), (257, 576), (1024, 1536)])
@pytest.mark.parametrize("make", [cases.gaussian, cases.hostile])
def test_conversions_are_bit_equal_to_the_reference(
    make, name: str, scale_format: str, shape: tuple[int, int]
) -> None:
    kernel, reference = cases.CONVERSIONS[name]
    x = make(*shape)
    for actual, expected in zip(
        kernel(x.cuda(), scale_format), reference(x, scale_format), strict=True
    ):
        assert cases.mismatches(actual, expected) == 0


@pytest.mark.parametrize("tokens", [156, 1000])
def test_a_row_of_the_head_depends_on_no_other(tokens: int) -> None:
    hidden, weight = (torch.randn(n, 512, device="cuda").bfloat16() for n in (300, tokens))
    whole = kernels.head_product(hidden, weight)
    for count in (1, 7, 64, 129):
        assert torch.equal(kernels.head_product(hidden[:count], weight), whole[:count])
        assert torch.equal(kernels.head_product(hidden[100:][:count], weight), whole[100:][:count])


@pytest.mark.parametrize("name", cases.FUSED)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 128), (131, 640), (512, 3584)])
def test_fused_quantizers_equal_quantizing_the_bf16_result(
    name: str, scale_format: str, shape: tuple[int, int]
) -> None:
    kernel, reference = cases.FUSED[name]
    x = cases.gaussian(*shape).cuda()
    for actual, expected in zip(kernel(x, scale_format), reference(x, scale_format), strict=True):
        assert cases.mismatches(actual, expected) == 0


@pytest.mark.parametrize("columns", [576, 1536, 8192])
def test_producers_round_the_fp64_definition_up_to_its_last_bit(columns: int) -> None:
    for name, (actual, expected) in cases.producer_results(
        cases.gaussian(300, columns).cuda()
    ).items():
        actual = actual.cpu()
        assert relative_error(expected, actual) < (
            1e-5 if actual.dtype == torch.float32 else 3e-4
        ), name
        if actual.dtype == torch.bfloat16:
            assert (actual != expected).double().mean() < 0.01, name


@pytest.mark.parametrize("shape", [(5, 3, 1, 32), (300, 12, 2, 128), (70, 4, 2, 48)])
def test_rope_equals_the_reference_after_a_rounded_bias(shape: tuple[int, int, int, int]) -> None:
    for name, (actual, expected) in cases.rope_results(*shape, "cuda").items():
        # A fused multiply-add rounds a tie the other way.
        assert relative_error(expected.float(), actual.float()) < 1e-4, name


@pytest.mark.parametrize(("shape", "temperature"), [((300, 1000), 1.0), ((64, 151936), 0.7)])
def test_softmax_of_the_head_agrees_with_fp64(shape: tuple[int, int], temperature: float) -> None:
    for name, (actual, expected) in cases.softmax_results(*shape, temperature, "cuda").items():
        assert relative_error(expected, actual.double()) < (
            3e-3 if actual.dtype == torch.bfloat16 else 1e-4
        ), name


def random_operand(
    rows: int, columns: int, block: tuple[int, int], scale_format: str = "pow2"
) -> Fp8Tensor:
    t = quantize_reference(cases.gaussian(rows, columns), block, scale_format)
    return Fp8Tensor(t.codes.cuda(), t.scale.cuda(), block, scale_format)


@needs_hopper
@pytest.mark.parametrize("blocks", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(256, 512, 1024), (100, 200, 576), (33, 48, 72), (7, 5, 3), (64, 1536, 8960)]
)
def test_every_gemm_backend_agrees_with_emulation(
    blocks, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    a, b = random_operand(m, k, blocks[0]), random_operand(n, k, blocks[1])
    arguments = (a.codes, a.scale, b.codes, b.scale, a.block, b.block)
    expected = gemm_backends.gemm_nt(*arguments, torch.float32, backend="emulation")
    operands = (
        gemm_backends.Operand(a.codes, a.scale, a.block[0]),
        gemm_backends.Operand(b.codes, b.scale, b.block[0]),
    )
    for backend in gemm_backends.candidates(*operands, dtype):
        actual = gemm_backends.gemm_nt(*arguments, dtype, backend=backend)
        assert actual.dtype == dtype
        # Hopper's FP8 tensor cores keep about 14 bits of a partial sum between promotions to FP32
        # (measured 1e-4 to 6e-4).
        assert relative_error(expected, actual) < (3e-3 if dtype == torch.bfloat16 else 1e-3), (
            backend
        )


@needs_hopper
def test_gemm_ignores_the_padding_of_tile_scales() -> None:
    a, b = random_operand(128, 640, ROW_BLOCK), random_operand(256, 640, TILE_BLOCK)
    wide = torch.full((2, 8), torch.nan, device="cuda")
    wide[:, :5] = b.scale
    expected = gemm_backends.gemm_nt(
        a.codes, a.scale, b.codes, b.scale, a.block, b.block, torch.float32
    )
    actual = gemm_backends.gemm_nt(
        a.codes, a.scale, b.codes, wide[:, :5], a.block, b.block, torch.float32
    )
    assert torch.equal(expected, actual)


@needs_hopper
def test_backends_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_backends, "_chosen", {})
    monkeypatch.setattr(gemm_backends, "candidates", lambda a, b, dtype: ("cublas", "emulation"))
    a, b = random_operand(256, 512, ROW_BLOCK), random_operand(256, 512, TILE_BLOCK)
    gemm_backends.gemm_nt(a.codes, a.scale, b.codes, b.scale, a.block, b.block)
    monkeypatch.setattr(gemm_backends, "_milliseconds", lambda *_: pytest.fail("measured again"))
    gemm_backends.gemm_nt(a.codes, a.scale, b.codes, b.scale, a.block, b.block)


@needs_hopper
def test_compiled_linear_is_one_graph_with_the_same_bits() -> None:
    from infir2.numerics.kernels import quantizers

    weight = random_operand(256, 512, TILE_BLOCK)

    def linear(x: torch.Tensor) -> torch.Tensor:
        codes, scale = quantizers.quantize_rows(x * 2, True)
        return (
            gemm_backends.gemm_nt(
                codes,
                scale,
                weight.codes,
                weight.scale,
                ROW_BLOCK,
                TILE_BLOCK,
                torch.bfloat16,
                "cublas",
            )
            + 1
        )

    x = cases.gaussian(384, 512).cuda()
    assert torch.equal(torch.compile(linear, fullgraph=True)(x), linear(x))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("moment_dtype", ["fp32", "bf16", "fp8"])
def test_adamw_on_the_gpu_equals_the_reference(moment_dtype: str, offload: bool) -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layers = nn.ModuleList(
            [nn.Linear(300, 257), nn.Linear(128, 64, bias=False), nn.Linear(3, 5)]
        ).to(device)
        # The default on a CPU is torch's AdamW; `offload` selects ours without changing the math.
        optimizer = make_optimizer(
            layers,
            OptimizerSection(
                moment_dtype=moment_dtype, offload=offload or device == "cpu", weight_decay=0.1
            ),
        )
        for step in range(6):
            gradients = []
            for parameter in layers.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                parameter.grad = noise.to(device)
                gradients.append(parameter.grad)
            update(optimizer, gradients, 1e-2, torch.tensor(0.3, device=device))
        results.append([parameter.detach().cpu() for parameter in layers.parameters()])
    for expected, actual in zip(*results, strict=True):
        # The last bit of a moment may round to another BF16 value or FP8 code.
        torch.testing.assert_close(
            actual, expected, rtol=0, atol={"fp32": 1e-6, "bf16": 2e-3, "fp8": 2e-2}[moment_dtype]
        )
