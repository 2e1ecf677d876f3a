"""Our decoder against transformers' Qwen2, Qwen3 and Llama: logits, and bit-equal weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from infir2.config.schema import ShapeSection
from infir2.model import Decoder, ModelConfig, exported_weights, write_hf
from infir2.model.rope import inverse_frequencies

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 tied": (
        "Qwen2",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        },
    ),
    "qwen2 untied, wide heads": ("Qwen2", {"head_dim": 14, "rms_norm_eps": 1e-5}),
    "qwen3 tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "llama scaled": ("Llama", {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}),
    "llama biases, one key head": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ),
}


def reference_model(variant: str) -> Any:
    """A random FP32 model of transformers; norms and biases are random, so that each one counts."""
    import transformers

    family, extra = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def reference_logits(model: Any, token_ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=part[None]).logits[0].float() for part in token_ids.split(lengths)]
        )


def packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    token_ids = torch.randint(0, 97, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return (
        token_ids,
        torch.cat([torch.arange(n) for n in lengths]),
        torch.tensor([0, *lengths]).cumsum(0),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_what_transformers_saved_loads_bit_for_bit_and_gives_its_logits(
    variant: str, shard_size: str, tmp_path: Path
) -> None:
    theirs = reference_model(variant)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "5GB")
    ours = Decoder.from_hf(tmp_path, compute_dtype=torch.float32)
    expected = theirs.state_dict()
    parameters = dict(ours.named_parameters())
    assert set(parameters) == set(expected) - (
        {"lm_head.weight"} if ours.config.tie_embeddings else set()
    )
    assert all(torch.equal(parameter, expected[name]) for name, parameter in parameters.items())
    lengths = [70, 1, 9]
    token_ids, positions, cu_seqlens = packed(lengths)
    logits = ours(token_ids, positions, cu_seqlens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits, reference_logits(theirs, token_ids, lengths), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_what_we_write(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = ModelConfig.from_hf(reference_model(variant).config.to_dict())
    ours = Decoder(config, compute_dtype=torch.float32)
    ours.initialize(seed=3, std=0.2)
    with torch.no_grad():  # the file holds BF16, so both sides start from values that BF16 holds
        for parameter in ours.parameters():
            parameter.copy_(parameter.bfloat16())
    write_hf(tmp_path / "model", exported_weights(ours), config.to_hf(), max_shard_bytes=20_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert theirs.dtype == torch.bfloat16
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state = theirs.state_dict()
    assert all(
        torch.equal(parameter, state[name].float()) for name, parameter in ours.named_parameters()
    )
    lengths = [40, 5]
    token_ids, positions, cu_seqlens = packed(lengths)
    logits = ours(token_ids, positions, cu_seqlens)
    torch.testing.assert_close(
        logits, reference_logits(theirs.float(), token_ids, lengths), rtol=0, atol=1e-4
    )


def test_rotary_frequencies_are_those_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for variant in ("llama scaled", "llama biases, one key head"):
        config = reference_model(variant).config
        expected = LlamaRotaryEmbedding(config).inv_freq
        torch.testing.assert_close(
            inverse_frequencies(ModelConfig.from_hf(config.to_dict())).float(),
            expected,
            rtol=1e-6,
            atol=0,
        )


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_gradients_match_transformers(architecture: str, tmp_path: Path) -> None:
    theirs = reference_model(f"{architecture} tied")
    theirs.save_pretrained(tmp_path)
    token_ids, positions, cu_seqlens = packed([30])
    theirs(input_ids=token_ids[None]).logits.sum().backward()
    gradients = {}
    for recompute in ("none", "full"):
        ours = Decoder.from_hf(tmp_path, compute_dtype=torch.float32)
        ours.recompute = recompute
        ours(token_ids, positions, cu_seqlens).sum().backward()
        gradients[recompute] = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(
            gradients["none"][name], parameter.grad, rtol=0, atol=2e-5 * scale, msg=name
        )
        assert torch.equal(gradients["none"][name], gradients["full"][name])


def test_a_new_model_is_a_function_of_shape_and_seed() -> None:
    shape = ShapeSection(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=256)
    torch.manual_seed(5)
    first = Decoder.from_shape(shape, vocab_size=300, seed=7)
    again = Decoder.from_shape(shape, vocab_size=300, seed=7)
    other = Decoder.from_shape(shape, vocab_size=300, seed=8)
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (a.ndim == 1), name
    block = first.model.layers[0]
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert block.mlp.gate_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert first.head_weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert block.self_attn.q_proj.bias.count_nonzero() == 0
    assert (block.input_layernorm.weight == 1).all()
    fixed = Decoder.from_shape(shape.model_copy(update={"init_std": 0.008}), vocab_size=300, seed=7)
    assert fixed.model.layers[1].mlp.down_proj.weight.std().item() == pytest.approx(0.008, rel=0.05)
