"""Norm, SwiGLU and the head: values, gradients, what is saved, independence of the batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infir2.numerics import (
    Fp8Linear,
    RMSNorm,
    head_logits,
    linear,
    rms_norm,
    snr_db,
    swiglu,
    token_logprobs,
)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def exact_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("shape", [(9, 64), (2, 5, 3, 32), (0, 64)])
def test_rms_norm_and_its_gradients(shape) -> None:
    x, weight = leaves(shape, shape[-1:])
    x64, weight64 = doubles(x, weight)
    out, exact = rms_norm(x, weight, 1e-6), exact_norm(x64, weight64)
    assert torch.equal(out, exact.float())
    grad = torch.randn(shape)
    out.backward(grad)
    exact.backward(grad.double())
    assert snr_db(x64.grad, x.grad) > 130
    assert snr_db(weight64.grad, weight.grad) > 130


def test_rms_norm_of_bf16_rounds_weight_and_result_once() -> None:
    x, weight = leaves((50, 48), (48,))
    x = x.detach().bfloat16().requires_grad_()
    out = rms_norm(x, weight, 1e-5)
    assert torch.equal(out, exact_norm(x.double(), weight.bfloat16().double(), 1e-5).bfloat16())
    out.backward(torch.ones_like(out))
    assert x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_its_gradients(dtype) -> None:
    gate, up = leaves((37, 64), (37, 64), dtype=dtype)
    gate64, up64 = doubles(gate, up)
    out, exact = swiglu(gate, up), F.silu(gate64) * up64
    assert torch.equal(out, exact.to(dtype))
    grad = torch.randn(37, 64).to(dtype)
    before = grad.clone()
    out.backward(grad)
    exact.backward(grad.double())
    assert torch.equal(grad, before)
    floor = 130 if dtype == torch.float32 else 50
    assert snr_db(gate64.grad, gate.grad) > floor
    assert snr_db(up64.grad, up.grad) > floor


def test_swiglu_of_large_gates_stays_finite() -> None:
    gate = torch.tensor([-1e30, -200.0, 200.0, 1e30], requires_grad=True)
    swiglu(gate, torch.ones(4)).sum().backward()
    assert torch.isfinite(gate.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_does_not_depend_on_its_batch(dtype) -> None:
    torch.manual_seed(0)
    x, gate, up = (
        torch.randn(1000, 173).to(dtype),
        torch.randn(1000, 173).to(dtype),
        torch.randn(1000, 173).to(dtype),
    )
    norm, labels, head = RMSNorm(173), torch.randint(0, 61, (1000,)), torch.randn(61, 173)
    with torch.no_grad():
        whole = norm(x), swiglu(gate, up), head_logits(x, head), token_logprobs(x, head, labels)[0]
        for rows in (slice(0, 1), slice(500, 507), slice(999, 1000)):
            part = (
                norm(x[rows]),
                swiglu(gate[rows], up[rows]),
                head_logits(x[rows], head),
                token_logprobs(x[rows], head, labels[rows])[0],
            )
            for a, b in zip(whole, part, strict=True):
                assert torch.equal(a[rows], b)


@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
def test_producers_into_fp8_linears_keep_fp8_only(scale_format) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(128)
    layers = [Fp8Linear(128, n, scale_format=scale_format) for n in (256, 256)]
    down = Fp8Linear(256, 128, scale_format=scale_format)
    x = torch.randn(200, 128).bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gate, up = linear(norm(x), layers)
        out = linear(swiglu(gate, up), (down,))[0]
    inputs = {t.data_ptr() for t in (x, gate, up)}
    sixteen_bit = [t for t in saved if t.dtype == torch.bfloat16]
    assert {t.data_ptr() for t in sixteen_bit} == inputs
    assert torch.equal(
        out, linear(swiglu(*linear(rms_norm(x, norm.weight, norm.eps), layers)), [down])[0]
    )
    out.sum().backward()
    assert all(p.grad is not None for module in (norm, *layers, down) for p in module.parameters())


def dense_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    return logits.gather(1, labels[:, None])[:, 0], -(logits.exp() * logits).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 2048])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy_gradient", [False, True])
def test_token_logprobs_equal_the_dense_softmax(
    dtype, chunk_tokens, temperature, with_entropy_gradient
) -> None:
    hidden, weight = leaves((50, 64), (173, 64))
    hidden = hidden.detach().to(dtype).requires_grad_()
    labels, grad = torch.randint(0, 173, (50,)), torch.randn(50)
    grad[::3] = 0
    logprobs, entropy = token_logprobs(
        hidden, weight, labels, temperature, chunk_tokens, with_entropy=True
    )
    hidden64, weight64 = doubles(hidden, weight.to(dtype))
    exact, exact_entropy = dense_logprobs(hidden64, weight64, labels, temperature)
    torch.testing.assert_close(logprobs, exact.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, exact_entropy.float(), rtol=1e-5, atol=1e-5)
    grads, grads64 = (grad, grad.flip(0)), (grad.double(), grad.flip(0).double())
    if with_entropy_gradient:
        torch.autograd.backward([logprobs, entropy], grads)
        torch.autograd.backward([exact, exact_entropy], grads64)
    else:
        logprobs.backward(grad)
        exact.backward(grad.double())
    assert hidden.grad.dtype == dtype
    assert weight.grad.dtype == torch.float32
    exact_db = 108 if with_entropy_gradient else 110  # log p + entropy cancels some digits
    assert snr_db(hidden64.grad, hidden.grad) > (exact_db if dtype == torch.float32 else 50)
    assert snr_db(weight64.grad, weight.grad) > exact_db
    assert token_logprobs(hidden, weight, labels)[1] is None


def test_token_logprobs_with_a_frozen_side_or_no_tokens() -> None:
    hidden, weight = leaves((5, 8), (11, 8))
    labels = torch.zeros(5, dtype=torch.int64)
    token_logprobs(hidden.detach(), weight, labels)[0].sum().backward()
    token_logprobs(hidden, weight.detach(), labels)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    empty = token_logprobs(hidden[:0], weight, labels[:0], with_entropy=True)
    assert empty[0].shape == empty[1].shape == (0,)
    empty[0].sum().backward()


def test_peaked_and_nonfinite_distributions() -> None:
    weight = torch.tensor([[1.0], [-1.0]])
    logprobs, entropy = token_logprobs(
        torch.tensor([[1e5], [math.inf]]), weight, torch.tensor([0, 0]), with_entropy=True
    )
    assert float(logprobs[0]) == 0.0
    assert float(entropy[0]) == 0.0
    assert torch.isnan(logprobs[1])
    assert torch.isnan(entropy[1])


def test_token_logprobs_refuses_shapes_and_settings_that_do_not_fit() -> None:
    hidden, weight, labels = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels \[T\]"):
        token_logprobs(hidden, weight, labels[:2])
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, weight, labels, temperature=0.0)


def test_head_logits_round_the_weight_like_the_hidden_state() -> None:
    hidden, weight = leaves((6, 32), (20, 32))
    hidden = hidden.detach().bfloat16().requires_grad_()
    exact = (hidden.detach().double() @ weight.detach().bfloat16().double().t()).float()
    logits = head_logits(hidden, weight)
    assert torch.equal(logits.detach(), exact)
    logits.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    with torch.no_grad():
        assert torch.equal(head_logits(hidden, weight), exact)
        nn.init.zeros_(weight)
        assert torch.all(head_logits(hidden, weight) == 0)
