"""The shape of a decoder, and its Hugging Face `config.json`.

Three architectures share one block: Qwen2/Qwen2.5 (biases on q, k, v), Qwen3 (RMSNorm on every
query and key head) and Llama (neither, with optional scaling of the rotary frequencies). Any other
key of a `config.json` that would change the result raises an error with its name: a model that
loads and computes something else is worse than one that does not load.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from infir2.config.schema import ShapeSection
from infir2.errors import CheckpointError, ConfigError

Architecture = Literal["qwen2", "qwen3", "llama"]

_CLASS_NAMES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# sizes: key of config.json -> field of ModelConfig
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_positions",
}
_MOE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
# Above every dense model: a larger number is a mistake, and building such a model never ends.
MAX_LAYERS, MAX_PARAMETERS = 1000, 10**13


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of a decoder.

    Example, Qwen2.5-1.5B: `ModelConfig("qwen2", vocab_size=151936, hidden_size=1536,
    num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128, ffn_size=8960, qkv_bias=True,
    rope_theta=1e6, tie_embeddings=True)`.

    Raises ConfigError when the sizes are inconsistent or the architecture has no such variant.

    Attributes:
        rope_scaling: Llama 3's four numbers, or None for unscaled frequencies.
        output_bias: bias of the attention's output projection.
        max_positions: positions that the model was made for; runs with longer ones are refused.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict[str, float] | None = field(default=None, hash=False)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 32768
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            supported = ", ".join(get_args(Architecture))
            raise ConfigError(
                f"architecture {self.architecture!r} is not supported; use one of {supported}"
            )
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type in (int, float) and not 0 < value < math.inf:
                raise ConfigError(f"{entry.name} = {_shown(value)} must be greater than 0")
        if self.num_layers > MAX_LAYERS or self.num_parameters > MAX_PARAMETERS:
            raise ConfigError(
                f"num_layers = {_shown(self.num_layers)} and the other sizes make a model of "
                f"{float(min(self.num_parameters, 10**300)):.1e} parameters; no model has more "
                f"than {MAX_LAYERS} layers or {MAX_PARAMETERS:.0e} parameters"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads = {self.num_kv_heads} must divide num_heads = {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim = {self.head_dim} must be even, because rotary embedding rotates pairs"
            )
        if self.architecture == "llama" and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads = {self.num_heads} must divide hidden_size = {self.hidden_size} "
                "in a llama model"
            )
        self._check_rope_scaling()
        self._check_variant()

    def _check_rope_scaling(self) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        if sorted(scaling) != sorted(_LLAMA3_KEYS):
            raise ConfigError(f"rope_scaling must have exactly the keys {', '.join(_LLAMA3_KEYS)}")
        if not scaling["high_freq_factor"] > scaling["low_freq_factor"] > 0:
            raise ConfigError(
                "rope_scaling.high_freq_factor must be greater than low_freq_factor, "
                "and both greater than 0"
            )
        if not min(scaling.values()) > 0:
            raise ConfigError("the numbers of rope_scaling must be greater than 0")

    def _check_variant(self) -> None:
        allowed = {
            "qwen2": self.qkv_bias and not (self.output_bias or self.mlp_bias or self.qk_norm),
            "qwen3": self.qk_norm and self.qkv_bias == self.output_bias and not self.mlp_bias,
            "llama": self.qkv_bias == self.output_bias and not self.qk_norm,
        }
        if not allowed[self.architecture]:
            raise ConfigError(
                f"architecture {self.architecture} has no variant with qkv_bias = {self.qkv_bias}, "
                f"output_bias = {self.output_bias}, mlp_bias = {self.mlp_bias}, "
                f"qk_norm = {self.qk_norm}; no Hugging Face class could load it"
            )

    @property
    def num_parameters(self) -> int:
        """Elements of all weight matrices; norms and biases are left out."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads  # q and o, k and v
        layer = heads * self.head_dim * self.hidden_size + 3 * self.ffn_size * self.hidden_size
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + embeddings

    @classmethod
    def from_shape(cls, shape: ShapeSection, vocab_size: int) -> "ModelConfig":
        """The config of a new model; `shape` may add rows to the tokenizer's `vocab_size`."""
        rows = shape.vocab_size or vocab_size
        if rows < vocab_size:
            raise ConfigError(
                f"model.shape.vocab_size = {rows} is below the tokenizer's {vocab_size} tokens; "
                "raise it or set it to 0"
            )
        same_name = {entry.name for entry in fields(cls)} & ShapeSection.model_fields.keys()
        derived = {
            "vocab_size": rows,
            "head_dim": shape.head_dim or shape.hidden_size // shape.num_heads,
            "qkv_bias": shape.architecture == "qwen2",
            "qk_norm": shape.architecture == "qwen3",
        }
        return cls(**shape.model_dump(include=same_name) | derived)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read a `config.json` of transformers 4 or 5. Raises CheckpointError with the key."""
        architecture = _architecture(raw)
        _refuse_unsupported(raw)
        hidden, heads = _integer(raw, "hidden_size"), _integer(raw, "num_attention_heads")
        defaults = {
            "num_key_value_heads": heads,
            "head_dim": 128 if architecture == "qwen3" else hidden // heads,
            "max_position_embeddings": 2048 if architecture == "llama" else 32768,
        }
        theta, scaling = _rope(raw)
        attention_bias = architecture != "qwen2" and _boolean(raw, "attention_bias")
        try:
            return cls(
                architecture=architecture,
                **{field: _integer(raw, key, defaults.get(key)) for key, field in _SIZES.items()},
                rms_eps=_number(raw, "rms_norm_eps", default=1e-6),
                rope_theta=theta,
                rope_scaling=scaling,
                tie_embeddings=_boolean(raw, "tie_word_embeddings"),
                qkv_bias=architecture == "qwen2" or attention_bias,
                output_bias=attention_bias,
                mlp_bias=architecture == "llama" and _boolean(raw, "mlp_bias"),
                qk_norm=architecture == "qwen3",
                bos_token_id=_token_id(raw, "bos_token_id"),
                eos_token_id=_token_ids(raw, "eos_token_id"),
                pad_token_id=_token_id(raw, "pad_token_id"),
            )
        except ConfigError as error:
            raise CheckpointError(f"config.json cannot be used: {error}") from error

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """This model's `config.json`, with the keys of transformers 4 (vLLM, SGLang) and of 5."""
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        scaling = (
            None if self.rope_scaling is None else {"rope_type": "llama3", **self.rope_scaling}
        )
        raw: dict[str, Any] = {
            "architectures": [_CLASS_NAMES[self.architecture]],
            "model_type": self.architecture,
            **{key: getattr(self, field) for key, field in _SIZES.items()},
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rms_norm_eps": self.rms_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {
                "rope_theta": self.rope_theta,
                **(scaling or {"rope_type": "default"}),
            },
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": dtype,
            "dtype": dtype,
        }
        if self.architecture != "qwen2":
            raw["attention_bias"] = self.qkv_bias
        if self.architecture == "llama":
            raw["mlp_bias"] = self.mlp_bias
        else:
            raw |= {
                "use_sliding_window": False,
                "sliding_window": None,
                "max_window_layers": self.num_layers,
            }
        return raw


def _architecture(raw: Mapping[str, Any]) -> Architecture:
    for architecture in get_args(Architecture):
        if raw.get("model_type") == architecture:
            expected, classes = _CLASS_NAMES[architecture], _list(raw, "architectures")
            if classes and expected not in classes:
                raise CheckpointError(
                    f"config.json: architectures = {_shown(classes)} is not supported; "
                    f"a {architecture} model must be {expected}"
                )
            return architecture
    supported = ", ".join(get_args(Architecture))
    raise CheckpointError(
        f"config.json: model_type {_shown(raw.get('model_type'))} is not supported; "
        f"use a model of {supported}"
    )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Raise for keys that change the result: activation, dropout, experts, sliding windows."""
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"config.json: hidden_act = {_shown(raw['hidden_act'])} is not supported; "
            "only 'silu' is"
        )
    if raw.get("attention_dropout"):
        raise CheckpointError(
            f"config.json: attention_dropout = {_shown(raw['attention_dropout'])} is not "
            "supported; set it to 0.0"
        )
    for key in _MOE_KEYS:
        if raw.get(key):
            raise CheckpointError(
                f"config.json: {key} = {_shown(raw[key])} is a mixture of experts, which is not "
                "supported; use a dense model"
            )
    # missing keys have transformers' defaults
    has_window = _boolean(raw, "use_sliding_window") and raw.get("sliding_window", 4096) is not None
    if has_window and _number(raw, "max_window_layers", 28) < _integer(raw, "num_hidden_layers"):
        raise CheckpointError(
            "config.json: use_sliding_window = true is not supported; "
            "set it to false if the model was trained without"
        )
    if any(kind != "full_attention" for kind in _list(raw, "layer_types")):
        raise CheckpointError(
            "config.json: layer_types has layers other than 'full_attention', "
            "which are not supported"
        )


def _rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, float] | None]:
    """Rotary base and Llama 3 scaling.

    transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`. A file
    may have both (ours do); transformers 5 then reads `rope_scaling`, so the two must agree.
    """
    keys = [key for key in ("rope_parameters", "rope_scaling") if raw.get(key)] or ["rope_scaling"]
    theta, scaling = _rope_of(raw, keys[0])
    if len(keys) == 2 and _rope_of(raw, keys[1])[1] != scaling:
        raise CheckpointError(
            "config.json: rope_scaling contradicts rope_parameters; remove one of them"
        )
    return theta, scaling


def _rope_of(raw: Mapping[str, Any], key: str) -> tuple[float, dict[str, float] | None]:
    scaling = raw.get(key) or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"config.json: {key} must be an object")
    theta = _number({"rope_theta": raw.get("rope_theta"), **scaling}, "rope_theta", default=10000.0)
    if raw.get("rope_theta") is not None and raw["rope_theta"] != theta:
        raise CheckpointError(
            f"config.json: rope_theta = {_shown(raw['rope_theta'])} contradicts "
            f"{key}.rope_theta = {theta}; make them equal"
        )
    if (rotated := scaling.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(
            f"config.json: {key}.partial_rotary_factor = {_shown(rotated)} is not supported; "
            "only 1 is"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(
            f"config.json: {key}.rope_type = {_shown(kind)} is not supported, only 'default' and "
            "'llama3' are. If it only lengthens the context of a model trained without it, "
            f"as YaRN does for Qwen, remove {key} and set max_position_embeddings to the positions "
            "of that training"
        )
    return theta, {name: _number(scaling, name, where=f"{key}.") for name in _LLAMA3_KEYS}


def _number(
    raw: Mapping[str, Any], key: str, default: float | None = None, where: str = ""
) -> float:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise CheckpointError(f"config.json: {where}{key} must be a number, not {_shown(value)}")
    return value


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(
            f"config.json: {key} must be an integer greater than 0, not {_shown(value)}"
        )
    return value


def _boolean(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"config.json: {key} must be true or false, not {_shown(value)}")
    return bool(value)


def _list(raw: Mapping[str, Any], key: str) -> list[Any]:
    value = raw.get(key)
    if not isinstance(value, list | None):
        raise CheckpointError(f"config.json: {key} must be a list, not {_shown(value)}")
    return value or []


def _token_id(raw: Mapping[str, Any], key: str) -> int | None:
    value = raw.get(key)
    if not isinstance(value, int | None) or isinstance(value, bool) or abs(value or 0) >= 2**31:
        raise CheckpointError(f"config.json: {key} must be a token id, not {_shown(value)}")
    return value


def _token_ids(raw: Mapping[str, Any], key: str) -> int | tuple[int, ...] | None:
    """One id, or a tuple of several."""
    if not isinstance(raw.get(key), list):
        return _token_id(raw, key)
    return tuple(value for item in raw[key] if (value := _token_id({key: item}, key)) is not None)


def _shown(value: object) -> str:
    """A value in a sentence; long ones are cut."""
    return reprlib.repr(value)
