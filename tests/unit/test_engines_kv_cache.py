"""Generation through the KV cache gives the packed forward's hidden states, bit for bit."""

from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from infir2.config.schema import ShapeSection
from infir2.engines.kv_cache import KvCache, NewTokens, cached_hidden_states
from infir2.model import Decoder
from infir2.model import padding as packing_module
from infir2.numerics import convert_to_fp8

LENGTHS = [5, 17, 3, 40, 1, 9]
PAGE = 4
PAGES = [[9, 2], [21, 5, 0, 14, 3], [7], [1, 20, 4, 19, 6, 18, 8, 17, 10, 16], [11], [15, 12, 13]]
ARCHITECTURES = ["qwen2", "qwen3", "llama"]


def make_model(architecture: Literal["qwen2", "qwen3", "llama"], fp8: str) -> Decoder:
    shape = ShapeSection(
        architecture=architecture,
        hidden_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=200,
    )
    model = Decoder.from_shape(shape, vocab_size=101, seed=3)
    return model if fp8 == "off" else convert_to_fp8(model, fp8)


def poisoned_cache(model: Decoder) -> KvCache:
    cache = KvCache(model.config, num_pages=22, page_size=PAGE)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    return cache


def packed_stream(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    token_ids = torch.randint(0, 101, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return (
        token_ids,
        torch.cat([torch.arange(n) for n in lengths]),
        torch.tensor([0, *lengths]).cumsum(0),
    )


def generate(model: Decoder, first: list[int], step: int) -> tuple[Tensor, Tensor]:
    """(packed, cached) hidden states.

    The cached ones are computed `first[i]` tokens of sequence i in the first pass, then `step`.
    """
    token_ids, positions, cu_seqlens = packed_stream(LENGTHS)
    cache, done, sizes = poisoned_cache(model), [0] * len(LENGTHS), first
    cached = torch.full(
        (sum(LENGTHS), model.config.hidden_size), float("nan"), dtype=torch.bfloat16
    )
    while done != LENGTHS:
        active = [i for i, length in enumerate(LENGTHS) if done[i] < length]
        new = [min(sizes[i], LENGTHS[i] - done[i]) for i in active]
        starts = [int(cu_seqlens[i]) + done[i] for i in active]
        rows = torch.cat([torch.arange(at, at + n) for at, n in zip(starts, new, strict=True)])
        sequences = [
            NewTokens(token_ids[at : at + n].tolist(), done[i], PAGES[i])
            for i, at, n in zip(active, starts, new, strict=True)
        ]
        cached[rows], last = cached_hidden_states(model, cache, sequences)
        assert last.tolist() == (torch.tensor(new).cumsum(0) - 1).tolist()
        for i, n in zip(active, new, strict=True):
            done[i] += n
        sizes = [step] * len(LENGTHS)
    return model.hidden_states(token_ids, positions, cu_seqlens), cached


@pytest.mark.parametrize("fp8", ["off", "pow2", "fp32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefill_and_decode_equal_the_packed_forward(
    architecture: Literal["qwen2", "qwen3", "llama"], fp8: str
) -> None:
    packed, cached = generate(make_model(architecture, fp8), first=[2, 8, 1, 20, 1, 4], step=1)
    assert torch.equal(cached, packed)
    assert not cached.requires_grad


def test_chunked_prefill_beside_decoding_equals_the_packed_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing_module, "SCORE_BUDGET", 1 << 9)
    packed, cached = generate(make_model("qwen2", "pow2"), first=[1, 17, 1, 30, 1, 1], step=7)
    assert torch.equal(cached, packed)


def test_a_token_does_not_depend_on_what_is_in_the_batch() -> None:
    model = make_model("qwen3", "pow2")
    token_ids, positions, cu_seqlens = packed_stream(LENGTHS)
    packed = model.hidden_states(token_ids, positions, cu_seqlens)
    for start, end in pairwise(cu_seqlens.tolist()):
        single_process = model.hidden_states(
            token_ids[start:end], positions[start:end], torch.tensor([0, end - start])
        )
        assert torch.equal(single_process, packed[start:end])


def test_pages_can_be_used_again() -> None:
    model = make_model("llama", "off")
    cache = poisoned_cache(model)
    token_ids, _, _ = packed_stream([40])
    cached_hidden_states(model, cache, [NewTokens(token_ids.tolist(), 0, list(range(10)))])
    again = [
        cached_hidden_states(model, c, [NewTokens(token_ids[:3].tolist(), 0, [4])])[0]
        for c in (cache, poisoned_cache(model))
    ]
    assert torch.equal(*again)


def test_a_sequence_reads_pages_that_another_one_of_the_pass_writes() -> None:
    model = make_model("qwen3", "pow2")
    token_ids = packed_stream([12])[0].tolist()
    sequences = [NewTokens(token_ids, 0, [3, 1, 5]), NewTokens(token_ids[8:], 8, [3, 1, 2])]
    hidden, last = cached_hidden_states(model, poisoned_cache(model), sequences)
    assert torch.equal(hidden[8:12], hidden[12:])
    assert last.tolist() == [11, 15]


def test_what_does_not_fit_is_refused() -> None:
    model = make_model("llama", "off")
    cache = KvCache(model.config, num_pages=2, page_size=4)
    with pytest.raises(ValueError, match="position 4"):
        cached_hidden_states(model, cache, [NewTokens([1, 2], 3, [0])])
    with pytest.raises(ValueError, match="page 2"):
        cached_hidden_states(model, cache, [NewTokens([1, 2], 3, [0, 2])])
    with pytest.raises(ValueError, match="cu_seqlens up to 3"):
        model.hidden_states(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0, 3]))


def test_a_growing_cache_keeps_its_content() -> None:
    model = make_model("llama", "off")
    token_ids = packed_stream([9])[0].tolist()
    cache = KvCache(model.config, num_pages=3, page_size=4)
    whole, _ = cached_hidden_states(model, cache, [NewTokens(token_ids, 0, [2, 0, 1])])
    cache.grow(5)
    again, _ = cached_hidden_states(model, cache, [NewTokens(token_ids[8:], 8, [2, 0, 4])])
    assert torch.equal(again, whole[8:])
