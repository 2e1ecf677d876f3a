"""Reading and writing config.json: keys of transformers 4 and 5, and errors that name the key."""

import json

import pytest
from pydantic import ValidationError

from infir2.config.schema import ShapeSection
from infir2.errors import CheckpointError, ConfigError
from infir2.model import ModelConfig

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 3,
    "eos_token_id": [5, 7],
}


def test_the_keys_of_transformers_4_and_5_say_the_same() -> None:
    old = ModelConfig.from_hf(QWEN)
    new_keys = {
        key: value for key, value in QWEN.items() if key not in ("rope_theta", "torch_dtype")
    }
    new = ModelConfig.from_hf(
        {
            **new_keys,
            "dtype": "bfloat16",
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        }
    )
    assert old == new
    assert (old.head_dim, old.rope_theta, old.qkv_bias, old.eos_token_id) == (10, 1e6, True, (5, 7))


def test_llama3_scaling_is_read_from_either_key() -> None:
    base = {**QWEN, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    old = ModelConfig.from_hf({**base, "rope_scaling": {"type": "llama3", **LLAMA3}})
    new = ModelConfig.from_hf(
        {
            **base,
            "rope_theta": None,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "llama3", **LLAMA3},
        }
    )
    assert old == new
    assert old.rope_scaling == LLAMA3
    assert hash(old) == hash(new)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_a_config_survives_writing_and_reading(architecture: str) -> None:
    shape = ShapeSection(
        architecture=architecture,
        hidden_size=60,
        num_layers=2,
        num_heads=6,
        num_kv_heads=3,
        head_dim=14,
        ffn_size=50,
        rope_theta=1e5,
    )
    config = ModelConfig.from_shape(shape, vocab_size=99)
    raw = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(raw) == config
    assert raw["torch_dtype"] == raw["dtype"] == "bfloat16"
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 1e5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["Qwen2ForRewardModel"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_experts": 8}, "num_experts"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type = 'linear' is not supported.*remove rope_scaling and set",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}},
            "rope_parameters.rope_type = 'longrope'",
        ),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rope_scaling": {"type": "yarn", "factor": 4.0},
            },
            "rope_scaling.rope_type = 'yarn'",
        ),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rope_scaling": {"type": "llama3", **LLAMA3},
            },
            "contradicts",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling.low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"hidden_size": "60"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_kv_heads"),
        ({"head_dim": 9}, "head_dim"),
        ({"rms_norm_eps": -1.0}, "rms_eps"),
        ({"model_type": "llama", "architectures": None, "hidden_size": 61}, "hidden_size"),
    ],
)
def test_what_would_change_the_result_is_refused_by_its_key(change: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_hf({**QWEN, **change})


def test_a_sliding_window_that_no_layer_uses_is_accepted() -> None:
    assert ModelConfig.from_hf(
        {**QWEN, "use_sliding_window": True, "max_window_layers": 3}
    ) == ModelConfig.from_hf(QWEN)


def test_a_shape_that_cannot_be_made_is_refused() -> None:
    shape = ShapeSection(hidden_size=60, num_layers=1, num_heads=8, num_kv_heads=2, ffn_size=50)
    with pytest.raises(ConfigError, match="head_dim"):
        ModelConfig.from_shape(shape, vocab_size=10)
    with pytest.raises(ConfigError, match="vocab_size = 9"):
        ModelConfig.from_shape(
            shape.model_copy(update={"head_dim": 8, "vocab_size": 9}), vocab_size=10
        )
    with pytest.raises(ConfigError, match="no variant"):
        ModelConfig("qwen3", 10, 60, 1, 6, 2, 10, 50)
    with pytest.raises(ValidationError):
        ShapeSection(
            architecture="gpt2",
            hidden_size=60,
            num_layers=1,
            num_heads=6,
            num_kv_heads=2,
            ffn_size=50,
        )  # type: ignore[arg-type]
