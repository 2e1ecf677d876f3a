"""The FP64 reference of packed attention: values, gradients, and bits independent of the batch."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from infir2.model import padding as packing
from infir2.model.attention import AttentionContext, PackedAttention, softmax_values
from infir2.model.attention_cuda import plan_varlen
from infir2.model.padding import plan_packing

LENGTHS = [7, 1, 40, 0, 23, 300, 33, 2]


def stream(
    lengths: list[int], dtype: torch.dtype, heads: int = 6, kv_heads: int = 2, size: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), n, 16, generator=generator).to(dtype)
        for n in (6, kv_heads, kv_heads)
    )
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0)


def plan(cu_seqlens: Tensor) -> PackedAttention:
    return PackedAttention(plan_packing(cu_seqlens, num_heads=6, key_width=32))


def attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    return context.attend(q, k, v, layer=0)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Textbook attention, a document and a head at a time, in the inputs' dtype."""
    outs = []
    for start, end in pairwise(cu_seqlens.tolist()):
        if start == end:
            continue
        heads = []
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = q[start:end, head] @ k[start:end, group].T / q.shape[2] ** 0.5
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(
                scores.masked_fill(future, float("-inf")).softmax(-1) @ v[start:end, group]
            )
        outs.append(torch.stack(heads, dim=1))
    return torch.cat(outs)


@pytest.mark.parametrize("budget", [1 << 20, 1 << 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_output_is_the_rounded_exact_value(
    dtype: torch.dtype, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SCORE_BUDGET", budget)
    q, k, v, cu_seqlens = stream(LENGTHS, dtype)
    out = attention(q, k, v, plan(cu_seqlens))
    assert torch.equal(out, one_by_one(q.double(), k.double(), v.double(), cu_seqlens).to(dtype))


@pytest.mark.parametrize("budget", [1 << 20, 1 << 10])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_gradients_are_those_of_textbook_attention(
    kv_heads: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SCORE_BUDGET", budget)
    q, k, v, cu_seqlens = stream(LENGTHS, torch.float32, kv_heads=kv_heads)
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(attention(*inputs, plan(cu_seqlens)), inputs, grad_out)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(one_by_one(*exact, cu_seqlens), exact, grad_out.double())
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, [6, 6, 6]])
def test_the_libraries_compute_the_same_attention(lengths: list[int]) -> None:
    q, k, v, cu_seqlens = stream(lengths, torch.float32)
    results = []
    for layout in (
        plan(cu_seqlens),
        plan_varlen(tuple(n for n in lengths if n), torch.device("cpu")),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, layout)
        results.append([out, *torch.autograd.grad(out, inputs, q)])
    for reference, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-5)


def test_no_tokens_attend_to_nothing() -> None:
    """A context-parallel rank has no tokens left when cut documents cover all of them."""
    q, k, v = torch.randn(0, 4, 8), torch.randn(0, 2, 8), torch.randn(0, 2, 8)
    for layout in (plan(torch.tensor([0])), plan_varlen((), torch.device("cpu"))):
        assert attention(q, k, v, layout).shape == (0, 4, 8)


def test_a_document_does_not_see_its_neighbours() -> None:
    q, k, v, cu_seqlens = stream(LENGTHS, torch.bfloat16)
    packed = attention(q, k, v, plan(cu_seqlens))
    for start, end in pairwise(cu_seqlens.tolist()):
        single_process = attention(
            q[start:end], k[start:end], v[start:end], plan(torch.tensor([0, end - start]))
        )
        assert torch.equal(single_process, packed[start:end])


def test_nan_in_one_document_stays_there() -> None:
    q, k, v, cu_seqlens = stream([5, 4, 5], torch.bfloat16)
    v[6] = float("nan")
    out = attention(q, k, v, plan(cu_seqlens))
    assert out[:5].isfinite().all()
    assert out[9:].isfinite().all()
    assert out[6:9].isnan().all()


def test_a_long_document_beside_short_ones_keeps_to_the_score_budget() -> None:
    lengths = [2048, *[20] * 100]
    layout = plan_packing(torch.tensor([0, *lengths]).cumsum(0), num_heads=4, key_width=64)
    padded_rows = sum(
        n * length for n, length in (rectangle.shape for rectangle in layout.rectangles)
    )
    assert padded_rows < 1.5 * sum(lengths)
    for rectangle in layout.rectangles:
        n, length = rectangle.shape
        assert n * 4 * min(rectangle.query_chunk, length) * length <= packing.SCORE_BUDGET


def test_a_stream_without_tokens_gives_no_rows() -> None:
    q, k, v, cu_seqlens = stream([0, 0], torch.bfloat16)
    assert attention(q, k, v, plan(cu_seqlens)).shape == (0, 6, 16)


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("factor", [1.0, 40.0, 1e200])
def test_causal_softmax_has_the_bits_of_any_other_mask(start: int, factor: float) -> None:
    """A trainer's causal mask and an engine's mask of the same keys; later keys may be Inf."""
    length, keys = 30, 30 + start
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(4, n, 16, generator=generator, dtype=torch.float64)
        for n in (3 * length, keys, keys)
    )
    k *= factor
    k[1, 20] = torch.inf
    blocked = torch.ones(1, 1, length, keys, dtype=torch.bool).triu(start + 1)
    expected = softmax_values(q, k, v, blocked, True)
    found = softmax_values(q, k, v, blocked, True, start)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert not a.isnan().all()
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
