"""Sizes of the mesh, their error messages, and the tokens of each context-parallel rank."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from infir2.config.schema import ParallelSection
from infir2.errors import ConfigError
from infir2.model import ModelConfig
from infir2.model.attention import PackedAttention
from infir2.model.padding import plan_packing
from infir2.parallel.context import Continuation, attend_to_prefix, local_sequences, local_tokens
from infir2.parallel.mesh import Sizes, check_model, plan_sizes

QWEN_1_5B = ModelConfig(
    "qwen2",
    vocab_size=100,
    hidden_size=1536,
    num_layers=1,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    ffn_size=8960,
    qkv_bias=True,
)


def test_dp_takes_all_remaining_processes() -> None:
    sizes = plan_sizes(ParallelSection(tp=2, cp=2, dp_replicate=2), world_size=24)
    assert sizes == Sizes(dp_replicate=2, dp=3, cp=2, tp=2)
    assert (sizes.num_data, sizes.num_shards) == (6, 6)


@pytest.mark.parametrize(
    ("section", "world", "fix"),
    [
        (ParallelSection(tp=3), 8, "start 9 processes"),
        (
            ParallelSection(dp=4, tp=4),
            8,
            "needs 16 processes and this run has 8; start 16, or set parallel.dp = -1",
        ),
    ],
)
def test_sizes_with_a_wrong_product_are_refused_with_the_fix(
    section: ParallelSection, world: int, fix: str
) -> None:
    with pytest.raises(ConfigError, match=fix):
        plan_sizes(section, world)


def test_tp_must_divide_the_model() -> None:
    for tp in (1, 2):
        check_model(Sizes(tp=tp), QWEN_1_5B, fp8=True)
    with pytest.raises(
        ConfigError,
        match="does not divide the 12 query heads; the nearest sizes that work for this model: 2",
    ):
        check_model(Sizes(tp=8), QWEN_1_5B, fp8=True)
    with pytest.raises(ConfigError, match="down_proj would be 2240 wide"):
        check_model(Sizes(tp=4), QWEN_1_5B, fp8=True)
    check_model(Sizes(tp=4), QWEN_1_5B, fp8=False)  # two ranks hold each key/value head
    check_model(Sizes(tp=4), replace(QWEN_1_5B, ffn_size=9216), fp8=True)


def test_each_token_is_on_one_rank_and_continuations_know_their_keys() -> None:
    assert torch.cat(
        [local_tokens(rank, 2, 16) for rank in range(2)]
    ).sort().values.tolist() == list(range(16))
    assert local_tokens(0, 2, 16).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    bounds = [0, 6, 16]
    assert local_sequences(0, 2, bounds) == ([0, 4, 8], [Continuation(4, 8, 6, 16)])
    assert local_sequences(1, 2, bounds) == (
        [0, 2, 4, 8],
        [Continuation(0, 2, 0, 6), Continuation(4, 8, 6, 12)],
    )


def test_the_end_of_a_sequence_attends_as_in_the_full_sequence() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(600, heads, 16, generator=generator) for heads in (4, 2, 2))

    def plan(cu_seqlens: torch.Tensor, device: torch.device) -> PackedAttention:
        return PackedAttention(plan_packing(cu_seqlens, 4, 2 * 16, device=device))

    full = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    for first, last in ((0, 600), (250, 600), (0, 300)):
        part = attend_to_prefix(q[first:last], k[:last], v[:last], plan)
        torch.testing.assert_close(part, full[first:last], rtol=1e-5, atol=1e-5)
