"""The kernels on CPU tensors; test_kernels_interpreter.py runs this file under the interpreter."""

from typing import Literal

import kernel_cases as cases
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs

from infir2.config.schema import ShapeSection
from infir2.data import Batch
from infir2.engines.sampling import sample
from infir2.model import Decoder
from infir2.numerics import SavedActivations, convert_to_fp8, ops, token_logprobs
from infir2.numerics import adamw_reference as adamw
from infir2.numerics.error import relative_error
from infir2.numerics.formats import Fp8Tensor
from infir2.numerics.kernels import adamw as adamw_kernels
from infir2.numerics.kernels import api as operations
from infir2.numerics.kernels import conversions, head, norm, rope, sampling, softmax, swiglu
from infir2.numerics.kernels import quantizers as matrix
from infir2.numerics.kernels.api import quantize, swiglu_backward_quantize, transpose
from infir2.numerics.quantize_reference import block_scale
from infir2.numerics.quantize_reference import quantize as quantize_reference
from infir2.numerics.quantize_reference import transpose as transpose_reference
from infir2.train.observer import observe

FORMATS = ("pow2", "fp32")
SHAPES = [(1, 1), (0, 130), (131, 200), (128, 256)]
pytestmark = pytest.mark.skipif(not knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("name", cases.CONVERSIONS)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_conversions_have_the_reference_s_bits(
    name: str, scale_format: str, shape: tuple[int, int]
) -> None:
    kernel, reference = cases.CONVERSIONS[name]
    x = cases.hostile(*shape)
    for found, expected in zip(kernel(x, scale_format), reference(x, scale_format), strict=True):
        assert cases.mismatches(found, expected) == 0


@pytest.mark.parametrize("name", cases.FUSED)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 576), (131, 128), (0, 128)])
def test_fused_quantisers_have_the_bits_of_quantising_the_bf16_result(
    name: str, scale_format: str, shape: tuple[int, int]
) -> None:
    if name == "swiglu backward" and shape[1] % 128:
        pytest.skip("the halves of a fused gradient share a block grid only where 128 divides F")
    kernel, reference = cases.FUSED[name]
    x = cases.gaussian(*shape)
    for found, expected in zip(kernel(x, scale_format), reference(x, scale_format), strict=True):
        assert cases.mismatches(found, expected) == 0


def test_producers_round_the_fp64_definition_up_to_its_last_bit() -> None:
    for name, (found, expected) in cases.producer_results(cases.gaussian(70, 576)).items():
        assert found.dtype == expected.dtype, name
        # An FP32 sum near a tie can move a BF16 result by one ulp, 2**-8, but rarely does.
        differing = (found != expected).double().mean().item()
        assert relative_error(expected, found) < (1e-5 if found.dtype == torch.float32 else 2e-4), (
            name
        )
        assert found.dtype == torch.float32 or differing < 0.01, (name, differing)


@pytest.mark.parametrize("shape", [(5, 3, 1, 32), (70, 4, 2, 48)])
def test_rope_is_the_reference_s_after_a_rounded_bias(shape: tuple[int, int, int, int]) -> None:
    for name, (found, expected) in cases.rope_results(*shape, "cpu").items():
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(("shape", "temperature"), [((3, 100), 1.0), ((5, 9000), 0.7)])
def test_softmax_of_the_head_agrees_with_fp64(shape: tuple[int, int], temperature: float) -> None:
    for name, (found, expected) in cases.softmax_results(*shape, temperature, "cpu").items():
        assert relative_error(expected, found.double()) < (
            3e-3 if found.dtype == torch.bfloat16 else 1e-5
        ), name


@pytest.mark.parametrize("states", ["fp32", "bf16", "fp8"])
def test_adamw_s_kernel_is_the_reference(states: str) -> None:
    results = []
    shapes, clip = [(37, 53), (6, 128), (1, 3)], torch.tensor(0.7)
    for update in (adamw.adamw_, adamw_kernels.adamw_):
        parameters = [cases.gaussian(*shape).float() for shape in shapes]
        moments = [
            adamw.Moments(m, v, *scales)
            for p in parameters
            for m, v, *scales in [new_moments(p, states)]
        ]
        generator = torch.Generator().manual_seed(1)
        for step in range(1, 5):
            gradients = [
                torch.randn(p.shape, generator=generator)
                * torch.exp(2 * torch.randn((), generator=generator))
                for p in parameters
            ]
            update(
                parameters, gradients, moments, adamw.Hyper(step, 1e-2, 0.9, 0.95, 1e-8, 0.1), clip
            )
        results.append(
            [*parameters, *(t for state in moments for t in vars(state).values() if t is not None)]
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def new_moments(p: torch.Tensor, states: str) -> list[torch.Tensor | None]:
    (m, m_scale), (v, v_scale) = (
        adamw.new_moment(p, states, "cpu"),
        adamw.new_moment(p, states, "cpu"),
    )
    return [m, v, m_scale, v_scale]


def decoder_results(
    on_kernels: bool,
    scale_format: str,
    saved: SavedActivations,
    monkeypatch: pytest.MonkeyPatch,
    **sizes: int,
) -> list[torch.Tensor]:
    """Hidden states and all gradients of a small decoder, by `ops_cuda` or by `ops_reference`."""
    monkeypatch.setattr(
        ops,
        "runs_on_kernels",
        lambda x, dtype=None: on_kernels and (dtype or x.dtype) == torch.bfloat16,
    )
    default = {"hidden_size": 128, "ffn_size": 256, "num_heads": 4, "num_kv_heads": 2}
    shape = ShapeSection(**(default | sizes), head_dim=64, num_layers=1)
    model = Decoder.from_shape(shape, vocab_size=50, seed=1)
    model.saved_activations = saved
    if scale_format:
        convert_to_fp8(model, scale_format)
    ids = torch.randint(0, 50, (100,), generator=torch.Generator().manual_seed(2))
    hidden = model.hidden_states(ids, torch.arange(100), torch.tensor([0, 100]))
    logprobs, _ = token_logprobs(
        hidden, model.head_weight, ids, chunk_tokens=64, uniform_gradient=True
    )
    (-logprobs.mean()).backward()
    return [hidden.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("scale_format", ["", "pow2", "fp32"])
def test_fused_operations_are_their_definitions(
    scale_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decoder_results(False, scale_format, SavedActivations(), monkeypatch)
    found = decoder_results(True, scale_format, SavedActivations(), monkeypatch)
    # FP32 sums instead of FP64 ones move some BF16 values by an ulp, and so some FP8 codes.
    assert relative_error(expected[0], found[0]) < (0.01 if not scale_format else 0.03)
    whole = [torch.cat([grad.flatten() for grad in grads[1:]]) for grads in (expected, found)]
    assert relative_error(*whole) < (0.01 if not scale_format else 0.1)
    for saved in (
        SavedActivations(recompute="selective"),
        SavedActivations(keep_transposed_weights=False),
    ):
        again = decoder_results(True, scale_format, saved, monkeypatch)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True)), saved
    for saved in (SavedActivations(pre_activations="fp8"), SavedActivations("selective", "fp8")):
        rounded = decoder_results(True, scale_format, saved, monkeypatch)
        assert torch.equal(found[0], rounded[0])
        assert relative_error(whole[1], torch.cat([grad.flatten() for grad in rounded[1:]])) < 0.1


def test_operands_are_observed_on_kernels_as_in_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = ShapeSection(
        hidden_size=128, ffn_size=256, num_heads=4, num_kv_heads=2, head_dim=64, num_layers=1
    )
    ids = torch.randint(0, 50, (101,), generator=torch.Generator().manual_seed(2))
    batch = Batch(ids[:-1], torch.arange(100), ids[1:], ids[1:] >= 0, torch.tensor([0, 100]).int())
    rows = []
    for on_kernels in (False, True):
        monkeypatch.setattr(ops, "runs_on_kernels", lambda x, dtype=None, on=on_kernels: on)
        model = convert_to_fp8(Decoder.from_shape(shape, vocab_size=50, seed=1))
        rows.append(observe(model, [batch], "pow2", 64))
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        for name in set(one) - {"layer", "fp8"}:
            assert other[name] == pytest.approx(one[name], rel=0.1, abs=1e-3), (one["layer"], name)


@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
@pytest.mark.parametrize("pre_activations", ["bf16", "fp8"])
def test_layers_whose_blocks_cannot_be_stacked_have_their_own_gemms(
    scale_format: str, pre_activations: Literal["bf16", "fp8"], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"ffn_size": 200, "num_heads": 3, "num_kv_heads": 1}
    saved = SavedActivations(pre_activations=pre_activations)
    expected = decoder_results(False, scale_format, saved, monkeypatch, **sizes)
    found = decoder_results(True, scale_format, saved, monkeypatch, **sizes)
    assert relative_error(expected[0], found[0]) < 0.03
    flat = [torch.cat([grad.flatten() for grad in grads[1:]]) for grads in (expected, found)]
    assert relative_error(*flat) < 0.1


@pytest.mark.parametrize("scale_format", FORMATS)
def test_a_layer_in_another_model_is_its_definition(
    scale_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers calls it: FP32 [B, T, K] under autocast, a transposed gradient."""
    results = []
    for on_kernels in (False, True):
        monkeypatch.setattr(
            ops,
            "runs_on_kernels",
            lambda x, dtype=None, on=on_kernels: on and x.dtype == torch.bfloat16,
        )
        torch.manual_seed(3)
        layer = convert_to_fp8(torch.nn.Linear(200, 130), scale_format)
        x = torch.randn(2, 50, 200, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.backward(torch.randn(130, 2, 50).bfloat16().permute(1, 2, 0))
        results.append([out.detach(), x.grad, layer.weight.grad, layer.bias.grad])
    for one, other in zip(*results, strict=True):
        assert other.dtype == one.dtype
        assert relative_error(one, other) < 3e-3


def test_strided_input_is_read_in_place() -> None:
    wide = cases.hostile(70, 512)
    for view in (wide[:, 128:328], wide[::2], wide.t()):
        for scale_format in FORMATS:
            assert (
                cases.mismatches(
                    quantize(view, (1, 128), scale_format),
                    quantize_reference(view, (1, 128), scale_format),
                )
                == 0
            )


def test_scales_lie_where_the_gemms_read_them() -> None:
    x = cases.gaussian(140, 200)
    rows, tiles = operations.quantize_input(x)
    assert rows.scale.stride() == (1, 140)
    assert tiles.scale.shape == (2, 2)
    assert tiles.scale.stride() == (4, 1)


def test_scale_of_every_mantissa_without_the_division() -> None:
    bits = torch.cat(
        [
            torch.arange(1 << 23, dtype=torch.int32) + (130 << 23),
            torch.arange(0, 0x7F800000, 9973, dtype=torch.int32),
        ]
    )
    fast = (((bits + 0x1FFFFF) >> 23) - 8).clamp_min(1) << 23
    expected = block_scale(bits.view(torch.float32), "pow2").view(torch.int32)
    assert torch.equal(torch.where(bits == 0, 0x3F800000, fast), expected)


def test_transpose_takes_scales_in_any_layout_and_refuses_fp32() -> None:
    t = quantize_reference(cases.hostile(130, 300))
    for scale in (t.scale.contiguous(), t.scale.t().contiguous().t()):
        assert (
            cases.mismatches(
                transpose(Fp8Tensor(t.codes, scale, t.block, "pow2")), transpose_reference(t)
            )
            == 0
        )
    with pytest.raises(ValueError, match="cannot be transposed exactly"):
        transpose(quantize(cases.gaussian(4, 128), (1, 128), "fp32"))


def test_fused_gradient_refuses_halves_without_a_common_grid() -> None:
    x = cases.gaussian(4, 200)
    with pytest.raises(ValueError, match="divisible by 128, got 200"):
        swiglu_backward_quantize(x, *cases.gate_and_up(x))


def test_norm_weight_gradient_is_the_same_every_time() -> None:
    x, grad = cases.gaussian(64, 256), cases.gaussian(64, 256, seed=5)
    weight = cases.norm_weight(x)
    _, rstd = operations.rms_norm(x, weight, cases.EPS)
    first, second = (operations.rms_norm_backward(grad, x, rstd, weight, None)[1] for _ in range(2))
    assert torch.equal(first, second)


def as_tuple(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def operator_calls() -> dict[str, tuple]:
    x = cases.gaussian(6, 256)
    weight, gate, up = cases.norm_weight(x), *cases.gate_and_up(x)
    codes, scale = matrix.quantize_rows(x, True)
    tile_codes = matrix.quantize_tiles(x, True, True)
    rstd = torch.ones(6)
    heads, angles, logits, labels = (
        x.view(6, 2, 128),
        torch.ones(6, 1, 64),
        x.float(),
        torch.arange(6),
    )
    return {
        "rows": (matrix.quantize_rows, (x, True)),
        "rows and columns": (matrix.quantize_rows_and_columns, (x, True)),
        "rows and tiles": (matrix.quantize_rows_and_tiles, (x, True)),
        "transpose": (conversions.transpose_rows, (codes, scale)),
        "tiles": (matrix.quantize_tiles, (x, True, True)),
        "second layout alone": (matrix.quantize_transposed, (x, True)),
        "tiles transposed": (conversions.transpose_tiles, tile_codes),
        "norm": (norm.rms_norm, (x, weight, 1e-6)),
        "norm quantize": (norm.rms_norm_quantize, (x, weight, 1e-6, True)),
        "norm transposed": (norm.rms_norm_transposed, (x, rstd, weight, True)),
        "norm backward": (norm.rms_norm_backward, (x, x, rstd, weight, None)),
        "swiglu": (swiglu.swiglu, (gate, up)),
        "swiglu quantize": (swiglu.swiglu_quantize, (gate, up, True)),
        "swiglu transposed": (swiglu.swiglu_transposed, (gate, up, True)),
        "swiglu backward": (swiglu.swiglu_backward, (x, gate, up)),
        "swiglu backward quantize": (swiglu.swiglu_backward_quantize, (x, gate, up, True)),
        "rope": (rope.rope, (heads, heads, heads, None, angles, angles, True)),
        "head": (head.head_product, (x, x)),
        "log-probabilities": (softmax.label_logprobs, (logits, labels, 0.5, True)),
        "sampling": (sampling.sample_rows, (logits, rstd, rstd, labels)),
        "gradient of logits": (
            softmax.label_logprobs_backward,
            (logits, labels, rstd, rstd, rstd, rstd, 0.5),
        ),
    }


@pytest.mark.parametrize(("rows", "tokens", "depth"), [(1, 156, 64), (130, 257, 200), (0, 5, 64)])
def test_the_head_s_product_is_that_of_the_reference(rows: int, tokens: int, depth: int) -> None:
    """Small whole numbers, whose sums are exact; and strides that are not the number of columns."""
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (
        torch.randint(-8, 9, (count, depth + 8), generator=generator).bfloat16()[:, :depth]
        for count in (rows, tokens)
    )
    logits = head.head_product(hidden, weight)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, hidden.float() @ weight.float().t())


@pytest.mark.parametrize("columns", [101, 9000])
def test_sampling_draws_the_tokens_of_the_reference(columns: int) -> None:
    rng = np.random.default_rng(columns)
    logits = 3 * torch.randn(24, columns, generator=torch.Generator().manual_seed(columns))
    logits[:, ::7] = -torch.inf
    temperatures, draws = rng.choice([0.0, 0.7, 1.0], 24), rng.random(24)
    draws[:6] = [0.0, 0.0, 0.0, 1.0 - 2.0**-53, 1.0 - 2.0**-53, 1.0 - 2.0**-53]
    expected, expected_logprobs = sample(logits, temperatures, np.ones(24), draws)
    inverse = np.divide(1, temperatures, out=np.zeros(24), where=temperatures > 0)
    options = torch.from_numpy(inverse).float(), torch.from_numpy(draws).float()
    nothing = torch.empty(0, dtype=torch.int64)
    found, logprobs = sampling.sample_rows(logits, *options, nothing)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=2e-5, rtol=1e-5)
    _, given = sampling.sample_rows(logits, *options, expected)
    assert torch.equal(given, logprobs)
    for temperature in (0.7, 1.0):  # the bits of the trainer's kernel
        rows = torch.from_numpy(temperatures == temperature)
        trainer, _, _ = softmax.label_logprobs(logits[rows], found[rows], temperature, False)
        assert torch.equal(logprobs[rows], trainer)


@pytest.mark.parametrize("name", operator_calls())
def test_what_the_compiler_assumes_of_an_operator_is_what_it_returns(name: str) -> None:
    operator, arguments = operator_calls()[name]
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator.op(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
        )
    for one, other in zip(as_tuple(real), as_tuple(fake), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_operators_are_one_graph_for_the_compiler() -> None:
    def step(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        codes, scale, _ = norm.rms_norm_quantize(x * 2, weight, 1e-6, True)
        codes_t, scale_t = conversions.transpose_rows(codes, scale)
        return codes_t.view(torch.uint8).sum() + scale_t.sum()

    x = cases.gaussian(130, 200)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, cases.norm_weight(x)), step(x, cases.norm_weight(x)))
