"""Linear layers: error gates, what is saved, one quantization per weight version, layers that share
an input.
"""

import copy
import gc
import importlib
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infir2.numerics import (
    Fp8Linear,
    dequantize,
    invalidate,
    linear,
    nonfinite_blocks,
    quantize,
    snr_db,
)
from infir2.numerics.linear import _warn_if_emulated
from infir2.numerics.weight_cache import rounded

linear_module = importlib.import_module("infir2.numerics.linear")  # not the function
FORMATS = ["pow2", "fp32"]
GATE_DB = 28.0


def gaussian_layer(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def run(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient; the layer's parameters get theirs."""
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad


def errors_db(layer: nn.Linear, scale_format: str, x: Tensor, grad: Tensor) -> list[float]:
    """SNR of output, grad_x, grad_W of the FP8 layer against FP32."""
    plain = copy.deepcopy(layer)
    out, grad_x = run(plain, x.float(), grad.float())
    fp8 = Fp8Linear.from_linear(copy.deepcopy(layer), scale_format)
    fp8_out, fp8_grad_x = run(fp8, x, grad)
    return [
        snr_db(out, fp8_out),
        snr_db(grad_x, fp8_grad_x),
        snr_db(plain.weight.grad, fp8.weight.grad),
    ]


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(512, 512, 384), (512, 576, 192), (300, 128, 173)]
)
def test_output_and_both_gradients_pass_the_gate(tokens, inputs, outputs, scale_format) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, inputs).bfloat16(), torch.randn(tokens, outputs).bfloat16()
    assert min(errors_db(gaussian_layer(inputs, outputs), scale_format, x, grad)) >= GATE_DB


@pytest.mark.parametrize("scale_format", FORMATS)
def test_masked_tokens_and_tiny_gradients_cost_no_accuracy(scale_format) -> None:
    torch.manual_seed(0)
    layer, x, grad = (
        gaussian_layer(256, 256),
        torch.randn(512, 256).bfloat16(),
        (torch.randn(512, 256) * 1e-9).bfloat16(),
    )
    grad[torch.rand(512) < 0.7] = 0
    grad[128:256] = 0
    assert min(errors_db(layer, scale_format, x, grad)) >= GATE_DB
    x[::2] = 0
    assert min(errors_db(layer, scale_format, x, grad)) >= GATE_DB


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_odd_shapes_and_bias(tokens, scale_format) -> None:
    torch.manual_seed(0)
    layer = Fp8Linear.from_linear(gaussian_layer(150, 173, bias=True), scale_format)
    x, grad = torch.randn(2, tokens, 150).bfloat16(), torch.randn(2, tokens, 173).bfloat16()
    out, grad_x = run(layer, x, grad)
    assert out.shape == (2, tokens, 173)
    assert out.dtype == grad_x.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    assert torch.allclose(layer.bias.grad, grad.float().sum((0, 1)), atol=1e-5)
    weight = dequantize(
        quantize(layer.weight.detach().bfloat16(), (128, 128), scale_format), torch.float64
    )
    values = dequantize(quantize(x.flatten(0, 1), (1, 128), scale_format), torch.float64)
    assert torch.equal(
        out.flatten(0, 1), (values @ weight.t() + layer.bias.detach().bfloat16()).bfloat16()
    )


@pytest.mark.parametrize("scale_format", FORMATS)
def test_gradients_are_the_products_of_the_recipe(scale_format) -> None:
    torch.manual_seed(0)
    layer = Fp8Linear.from_linear(gaussian_layer(192, 130), scale_format)
    x, grad = torch.randn(200, 192).bfloat16(), torch.randn(200, 130).bfloat16()
    _, grad_x = run(layer, x, grad)
    weight = dequantize(layer.quantized_weight())
    by_row, by_token = (dequantize(quantize(g, (1, 128), scale_format)) for g in (grad, grad.t()))
    if scale_format == "pow2":
        from infir2.numerics import transpose

        x_t = dequantize(transpose(quantize(x)))
    else:
        x_t = dequantize(quantize(x.t(), (128, 128), "fp32"))
    torch.testing.assert_close(grad_x.float(), by_row @ weight, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, by_token @ x_t.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_does_not_depend_on_its_batch(fp8, dtype) -> None:
    torch.manual_seed(0)
    layer = gaussian_layer(576, 192, bias=True)
    layers = [Fp8Linear.from_linear(layer) if fp8 else layer]
    x = torch.randn(1000, 576).to(dtype)
    with torch.no_grad():
        whole = linear(x, layers)[0]
        assert torch.equal(linear(x[5:12], layers)[0], whole[5:12])
        for t in (0, 17, 999):
            assert torch.equal(linear(x[t : t + 1], layers)[0], whole[t : t + 1])
    assert torch.equal(linear(x, layers)[0], whole)  # with autograd


def test_one_quantization_per_weight_version_with_micro_batches_and_recompute() -> None:
    layer = Fp8Linear(128, 128)
    optimizer = torch.optim.AdamW(layer.parameters())
    for step in range(1, 4):
        for _ in range(2):
            x = torch.randn(4, 128, requires_grad=True)
            checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert layer.quantizations == step
        optimizer.step()
    assert Fp8Linear.quantizations == 0


def swap_data(layer: Fp8Linear) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def swap_data_twice(layer: Fp8Linear) -> None:  # the allocator may hand the first storage out again
    shape = layer.weight.shape
    layer.weight.data = torch.empty(0)
    layer.weight.data = torch.randn(shape)


def load_state(layer: Fp8Linear) -> None:
    layer.load_state_dict({name: torch.randn_like(p) for name, p in layer.state_dict().items()})


def new_parameter(layer: Fp8Linear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def write_in_place(layer: Fp8Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(3)


def write_in_inference_mode(layer: Fp8Linear) -> None:
    with torch.inference_mode():
        layer.weight.mul_(3)


def write_behind_autograd(layer: Fp8Linear) -> None:
    layer.weight.data.mul_(3)
    invalidate(layer.weight)


@pytest.mark.parametrize(
    "change",
    [
        swap_data,
        swap_data_twice,
        load_state,
        new_parameter,
        write_in_place,
        write_in_inference_mode,
        write_behind_autograd,
    ],
)
def test_every_change_of_the_weight_is_seen(change) -> None:
    layer, x = Fp8Linear(128, 64, bias=False), torch.randn(3, 128)
    with torch.no_grad():
        before = layer(x)
        change(layer)
        after = layer(x)
        fresh = Fp8Linear.from_linear(layer)
        fresh.weight = nn.Parameter(layer.weight.detach().clone())
        assert torch.equal(after, fresh(x))
    assert not torch.equal(before, after)
    assert layer.quantizations == 2


def test_codes_made_in_inference_mode_serve_training() -> None:
    layer, x = Fp8Linear(128, 64), torch.randn(3, 128)
    with torch.inference_mode():
        served = layer(x)
    out = layer(x)
    out.sum().backward()
    assert torch.equal(out, served)
    assert layer.weight.grad is not None
    assert layer.quantizations == 1


def test_caches_die_with_the_weight() -> None:
    from infir2.numerics import weight_cache as operands

    before = len(operands._versions)
    layers = [Fp8Linear(128, 128) for _ in range(5)]
    for layer in layers:
        layer(torch.randn(1, 128)).sum().backward()
    assert len(operands._versions) == before + 5
    del layer, layers
    assert len(operands._versions) == before


def test_changing_a_weight_between_forward_and_backward_is_an_error() -> None:
    layer = Fp8Linear(128, 64)
    out = layer(torch.randn(3, 128, requires_grad=True))
    write_in_place(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("scale_format", FORMATS)
def test_backward_saves_fp8_only(scale_format) -> None:
    layer = Fp8Linear(256, 128, scale_format=scale_format)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(300, 256).bfloat16().requires_grad_())
    own = [t for t in saved if t.shape != layer.weight.shape]
    assert {t.dtype for t in own} == {torch.float8_e4m3fn, torch.float32}
    assert sum(t.nbytes for t in own) <= 300 * 256 * (1 + 4 / 128)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_layers_that_share_an_input_quantize_it_once_and_round_its_gradient_once(
    scale_format, monkeypatch
) -> None:
    torch.manual_seed(0)
    layers = [Fp8Linear.from_linear(gaussian_layer(128, n), scale_format) for n in (128, 64, 64)]
    x = torch.randn(130, 128).bfloat16()
    grads = [torch.randn(130, layer.out_features).bfloat16() for layer in layers]
    exact = torch.zeros(130, 128)
    for layer, grad in zip(layers, grads, strict=True):
        exact += dequantize(quantize(grad, (1, 128), scale_format)) @ dequantize(
            layer.quantized_weight()
        )
        layer.quantized_weight()
    from infir2.numerics import gemm_reference as gemm

    calls = []
    original = gemm.quantize
    monkeypatch.setattr(
        gemm, "quantize", lambda t, *rest: calls.append(t.shape) or original(t, *rest)
    )
    shared = x.clone().requires_grad_()
    outputs = linear(shared, layers)
    assert len(calls) == (
        1 if scale_format == "pow2" else 2
    )  # fp32 also writes the transpose for backward
    torch.autograd.backward(outputs, grads)
    assert snr_db(exact.bfloat16(), shared.grad) > 60
    for layer, grad, out in zip(layers, grads, outputs, strict=True):
        single_process = Fp8Linear.from_linear(layer, scale_format)
        single_process.weight = nn.Parameter(layer.weight.detach().clone())
        alone_out, _ = run(single_process, x, grad)
        assert torch.equal(out, alone_out)
        assert torch.equal(layer.weight.grad, single_process.weight.grad)


def test_plain_and_fp8_layers_mix() -> None:
    torch.manual_seed(0)
    plain, fp8 = gaussian_layer(128, 64, bias=True), Fp8Linear.from_linear(gaussian_layer(128, 64))
    other = Fp8Linear.from_linear(gaussian_layer(128, 32), "fp32")
    x = torch.randn(20, 128).bfloat16().requires_grad_()
    outputs = linear(x, [plain, fp8, other])
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    master = plain.weight.detach().bfloat16()
    assert torch.equal(
        outputs[0],
        (x.detach().double() @ master.double().t() + plain.bias.detach().bfloat16()).bfloat16(),
    )
    assert plain.weight.grad.dtype == torch.float32
    torch.testing.assert_close(plain.weight.grad, x.detach().float().sum(0).expand(64, 128))
    weights = (
        master.float(),
        dequantize(fp8.quantized_weight()),
        dequantize(other.quantized_weight()),
    )
    expected = sum(w.sum(0) for w in weights).expand(
        20, 128
    )  # ones are exact in FP8, up to fp32 scales
    assert snr_db(expected, x.grad) > 45


def test_only_what_needs_a_gradient_gets_one() -> None:
    frozen, trained = Fp8Linear(128, 64), Fp8Linear(128, 64)
    frozen.requires_grad_(False)
    x = torch.randn(4, 128)
    a, b = linear(x, [frozen, trained])
    (a.sum() + b.sum()).backward()
    assert frozen.weight.grad is None
    assert trained.weight.grad is not None
    x = torch.randn(4, 128, requires_grad=True)
    linear(x, [frozen, trained])[0].sum().backward()  # the second output is not used
    assert x.grad is not None
    assert frozen.weight.grad is None


def test_weight_gradients_accumulate_in_fp32() -> None:
    layer, x = Fp8Linear(128, 64), torch.randn(8, 128).bfloat16()
    layer(x).sum().backward()
    once = layer.weight.grad.clone()
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, 2 * once)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_activations_and_gradients_propagate(bad) -> None:
    layer = Fp8Linear(256, 64, bias=False)
    x = torch.randn(5, 256).bfloat16()
    x[2, 3] = bad
    nonfinite_blocks.take(torch.device("cpu"))
    out = layer(x)
    assert nonfinite_blocks.take(torch.device("cpu")) == 1
    assert torch.isnan(out).all(dim=1).tolist() == [False, False, True, False, False]
    out.sum().backward()
    assert not torch.isfinite(layer.weight.grad).all()


def test_given_bytes_are_served_as_they_are() -> None:
    torch.manual_seed(0)
    source, server = Fp8Linear(200, 130), Fp8Linear(200, 130)
    t = source.quantized_weight()
    server.bias.data.copy_(source.bias.data)
    with torch.inference_mode():
        server.load_codes(t.codes, t.scale)
    assert server.weight is None
    assert "weight" not in server.state_dict()
    x = torch.randn(3, 200).bfloat16()
    for served in (server, copy.deepcopy(server), copy.deepcopy(server).bfloat16().float()):
        got = served.quantized_weight()
        assert torch.equal(got.codes.view(torch.uint8), t.codes.view(torch.uint8))
        assert torch.equal(got.scale, t.scale)
        with torch.inference_mode():
            assert torch.equal(served(x), source(x))
    other = Fp8Linear(200, 130).quantized_weight()
    server.load_codes(other.codes, other.scale)
    assert torch.equal(
        server.quantized_weight().codes.view(torch.uint8), other.codes.view(torch.uint8)
    )
    assert server.quantizations == 0
    x.requires_grad_()
    server(x).sum().backward()
    assert x.grad is not None


def test_bytes_that_do_not_fit_are_refused() -> None:
    layer = Fp8Linear(200, 130)
    t = layer.quantized_weight()
    with pytest.raises(ValueError, match=r"float8_e4m3fn \[130, 200\]"):
        layer.load_codes(t.codes[:2], t.scale)
    with pytest.raises(ValueError, match=r"float32 \[2, 2\]"):
        layer.load_codes(t.codes, t.scale[:1])
    with pytest.raises(ValueError, match="finite and positive"):
        layer.load_codes(t.codes, torch.zeros_like(t.scale))
    with pytest.raises(ValueError, match="powers of two"):
        layer.load_codes(t.codes, t.scale * 1.5)
    assert layer.weight is not None


def test_the_weights_bytes_are_those_of_the_bf16_master() -> None:
    layer = Fp8Linear(300, 200)
    expected = quantize(layer.weight.detach().bfloat16(), (128, 128))
    assert torch.equal(
        layer.quantized_weight().codes.view(torch.uint8), expected.codes.view(torch.uint8)
    )
    assert layer.quantized_weight() is layer.quantized_weight()


@pytest.mark.parametrize("keys", [{}, {"foreach": True}, {"fused": True}])
def test_a_step_of_any_optimizer_ends_the_version(keys: dict) -> None:
    layer = Fp8Linear(128, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, **keys)
    before = layer.quantized_weight()
    layer(torch.randn(3, 128)).sum().backward()
    optimizer.step()
    fresh = quantize(layer.weight.detach().bfloat16(), (128, 128))
    assert torch.equal(
        layer.quantized_weight().codes.view(torch.uint8), fresh.codes.view(torch.uint8)
    )
    assert not torch.equal(before.codes.view(torch.uint8), fresh.codes.view(torch.uint8))


def test_memory_filled_again_by_an_owner_that_sets_the_weight_is_another_version() -> None:
    """As torch's fully_shard: the memory is freed and filled without a move of the counter."""
    layer = Fp8Linear(128, 64)
    before = layer.quantized_weight()
    with torch.autograd._unsafe_preserve_version_counter(layer.weight), torch.no_grad():
        layer.weight.mul_(3)
    layer.weight = layer.weight
    assert not torch.equal(
        before.codes.view(torch.uint8), layer.quantized_weight().codes.view(torch.uint8)
    )


def test_copies_state_and_meta() -> None:
    layer = Fp8Linear(128, 64)
    layer(torch.randn(1, 128))
    twin = copy.deepcopy(layer)
    write_in_place(twin)
    assert not torch.equal(twin.quantized_weight().scale, layer.quantized_weight().scale)
    assert set(layer.state_dict()) == {"weight", "bias"}
    built = Fp8Linear(128, 64, device="meta").to_empty(device="cpu")
    built.load_state_dict(layer.state_dict())
    assert torch.equal(built.quantized_weight().scale, layer.quantized_weight().scale)
    assert torch.equal(built(torch.ones(1, 128)), layer(torch.ones(1, 128)))


def test_autocast_sets_the_dtype_and_leaves_the_sums_alone() -> None:
    layer, x = Fp8Linear(128, 64), torch.randn(5, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        out.sum().backward()
    grad = layer.weight.grad.clone()
    layer.weight.grad = None
    expected = layer(x.bfloat16())
    expected.sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(grad, layer.weight.grad)


def test_a_plain_weight_is_rounded_once_per_version() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    first = rounded(weight, torch.bfloat16, torch.float64)
    assert rounded(weight, torch.bfloat16, torch.float64) is first
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(
        rounded(weight, torch.bfloat16, torch.float64), weight.detach().bfloat16().double()
    )


def train_small_model(compiled: bool) -> list[float]:
    torch.manual_seed(0)
    layers = (Fp8Linear(128, 256), nn.GELU(), Fp8Linear(256, 128))
    model: nn.Module = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    x, losses = torch.randn(32, 128), []
    for _ in range(4):
        loss = call(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_compiled_model_trains_with_the_same_bits(monkeypatch, recwarn) -> None:
    """Codes are never stale, layers are not traced (which warned and broke weak references)."""
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    expected = train_small_model(False)
    assert expected[-1] < expected[0] / 2
    assert train_small_model(True) == expected
    gc.collect()
    assert not ignored
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]


def test_a_graph_without_breaks_is_refused_with_the_remedy() -> None:
    torch._dynamo.reset()
    layer = torch.compile(Fp8Linear(128, 128), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"use torch\.compile without fullgraph=True"):
        layer(torch.randn(2, 128))


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs an input of 10 features; got \[2, 20\]"):
        Fp8Linear(10, 3)(torch.randn(2, 20))


@pytest.mark.parametrize(
    ("reason", "dtype", "triton", "sentence"),
    [
        (None, torch.bfloat16, True, None),
        (None, torch.float32, True, "run the forward under torch.autocast"),
        (None, torch.bfloat16, False, "Triton is missing"),
        ("this GPU is a T4", torch.bfloat16, True, "this GPU is a T4"),
    ],
)
def test_a_gpu_that_emulates_says_so(monkeypatch, recwarn, reason, dtype, triton, sentence) -> None:
    monkeypatch.setattr(linear_module, "missing_block_scaling", lambda device: reason)
    monkeypatch.setattr(linear_module, "usable", lambda device: triton)
    _warn_if_emulated.__wrapped__(torch.device("cuda"), dtype)
    assert [sentence in str(w.message) for w in recwarn] == [True] * (sentence is not None)
