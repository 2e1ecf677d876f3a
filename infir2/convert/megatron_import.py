"""Megatron-core `torch_dist` checkpoints to Hugging Face, without megatron and without trusting their pickles.

Keys, for L layers stacked in a leading dimension or each under its number:

    embedding.word_embeddings.weight [V, D]          decoder.layers[.i].mlp.linear_fc1.weight [2F, D] (gate, then up)
    decoder.layers[.i].self_attention.linear_qkv.weight [G * (N/G + 2) * H, D]: per group N/G queries, one key, one value
    decoder.layers[.i].self_attention.linear_proj.weight [D, N * H]          decoder.final_layernorm.weight [D]

Rotary embedding needs no permutation. `_extra_state` and the optimizer are left behind. A torch distributed checkpoint whose keys
are Hugging Face's names, with any prefix, is read too.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infir2.checkpoint.dcp import DcpTensors
from infir2.checkpoint.pickles import read_torch_save
from infir2.convert.export import SHARD_BYTES, complete_config
from infir2.convert.weights import checked, parameter_shapes
from infir2.errors import CheckpointError, ConfigError
from infir2.model import ModelConfig
from infir2.model.safetensors_io import read_json, write_hf
from infir2.parallel.shard_spec import unsharded
from infir2.terminal import byte_progress

EMBEDDING, HEAD, FINAL_NORM = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)
LAYERS = "decoder.layers."
HF_EMBEDDING, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"
OUTSIDE = {EMBEDDING: HF_EMBEDDING, FINAL_NORM: "model.norm.weight", HEAD: HF_HEAD}  # of the layers
_QKV = [f"self_attn.{part}_proj" for part in "qkv"]
# Megatron's tensor of a layer -> Hugging Face's, of which it is made.
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"{name}.weight" for name in _QKV],
    "self_attention.linear_qkv.bias": [f"{name}.bias" for name in _QKV],
    "self_attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
    "self_attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "self_attention.linear_proj.bias": ["self_attn.o_proj.bias"],
    "mlp.linear_fc1.layer_norm_weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc1.bias": ["mlp.gate_proj.bias", "mlp.up_proj.bias"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
    "mlp.linear_fc2.bias": ["mlp.down_proj.bias"],
}
_WITHOUT_FUSED_NORMS = {
    "input_layernorm.weight": LAYER["self_attention.linear_qkv.layer_norm_weight"]
}
_WITHOUT_FUSED_NORMS |= {"pre_mlp_layernorm.weight": LAYER["mlp.linear_fc1.layer_norm_weight"]}
# Our names of the sizes -> Megatron's arguments.
ARGUMENTS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "ffn_hidden_size",
    "num_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "rms_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
}
_USUAL = {
    "use_rope_scaling": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "normalization": "RMSNorm",
    "swiglu": True,
    "apply_layernorm_1p": False,
}


def import_megatron(
    src: str | Path,
    out: str | Path,
    like: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write a Megatron-core checkpoint (`torch_dist`, any tensor-parallel size), or a plain torch one, as a Hugging Face directory.

    src: an `iter_*` directory, or the one above it with `latest_checkpointed_iteration.txt`. like: Hugging Face directory
    of the same shape, which gives config.json and the tokenizer; without it the shape comes from the arguments that
    Megatron saved. Weights keep their dtype. Rows of the vocabulary that only pad it are cut; an output layer of its own
    makes the result untied, whatever `like` says.
    Raises CheckpointError (unreadable, foreign or missing tensors; a pickle that asks for a class it should not),
    ConfigError (no shape known), OutputExistsError.
    """
    out, like = Path(out), None if like is None else Path(like)
    checkpoint = MegatronCheckpoint(find_iteration(Path(src)))
    config = read_json(like / "config.json") if like else config_of_arguments(checkpoint)
    config = config | {
        "tie_word_embeddings": checkpoint.is_tied(bool(config.get("tie_word_embeddings")))
    }
    shapes = parameter_shapes(config)
    config = complete_config(config, checkpoint.dtype)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    with byte_progress(f"importing {out.name}", total) as on_numbers:
        write_hf(
            out,
            _converted(checkpoint, ModelConfig.from_hf(config), shapes, on_numbers),
            config,
            like,
            SHARD_BYTES,
        )
    say(f"{out}: {len(shapes)} tensors from {checkpoint.path}.")


def find_iteration(path: Path) -> Path:
    """The directory with `.metadata`: `path` itself, or the iteration that its tracker file names."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        word = tracker.read_text().strip()
        directory = path / (
            "release" if word == "release" else f"iter_{int(word):07d}" if word.isdecimal() else "?"
        )
        if (directory / ".metadata").is_file():
            return directory
    raise CheckpointError(
        f"{path}: is not a Megatron torch_dist checkpoint (no .metadata here, nor in the iteration of {tracker.name})."
    )


class MegatronCheckpoint:
    """The tensors of a `torch_dist` directory by Megatron's keys, each assembled from its shards when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = DcpTensors(path, foreign=True)
        self.shapes = {key: self._tensors.shape(key) for key in self._tensors}
        named = [key for key in self.shapes if key.endswith(HF_EMBEDDING) and "optim" not in key]
        self.hf_prefix = (
            min(named, key=len).removesuffix(HF_EMBEDDING)
            if named and EMBEDDING not in self.shapes
            else None
        )
        if EMBEDDING not in self.shapes and self.hf_prefix is None:
            raise CheckpointError(
                f"{path}: has no '{EMBEDDING}' nor '{HF_EMBEDDING}'; it is not a checkpoint of a Qwen or Llama model."
            )

    @property
    def dtype(self) -> str:
        """dtype of the weights, as config.json writes it."""
        embedding = EMBEDDING if self.hf_prefix is None else self.hf_prefix + HF_EMBEDDING
        return str(self._tensors.dtype(embedding)).removeprefix("torch.")

    def is_tied(self, wanted: bool) -> bool:
        """Whether embedding and output layer are one; `wanted`: what the config says, for a head that is stored twice."""
        if self.hf_prefix is None:
            return HEAD not in self.shapes
        head = self.hf_prefix + HF_HEAD
        return head not in self.shapes or (
            wanted and torch.equal(self.read(head), self.read(self.hf_prefix + HF_EMBEDDING))
        )

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """A tensor, or one layer of a tensor that stacks them."""
        spec = unsharded(self.shapes.get(key, ()))
        if layer is None:
            return self._tensors.part(key, spec)
        offset, size = (layer, *spec.offset[1:]), (1, *spec.local_shape[1:])
        return self._tensors.part(key, spec._replace(offset=offset, local_shape=size))[0]

    def arguments(self) -> dict[str, Any]:
        """Megatron's own command-line arguments, from common.pt; empty if it has none."""
        common = (
            read_torch_save(self.path / "common.pt") if (self.path / "common.pt").is_file() else {}
        )
        arguments = common.get("args") if isinstance(common, dict) else None
        return dict(vars(arguments)) if arguments is not None else {}


def config_of_arguments(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """A config.json from the arguments in common.pt; ConfigError names what is missing."""
    arguments = checkpoint.arguments()
    sizes: dict[str, Any] = {ours: arguments.get(theirs) for ours, theirs in ARGUMENTS.items()}
    missing = [ARGUMENTS[ours] for ours, size in sizes.items() if size is None]
    if missing:
        raise ConfigError(
            f"{checkpoint.path}: common.pt gives no {missing[0]}; name a Hugging Face directory with --like."
        )
    unusual = [
        name for name, usual in _USUAL.items() if arguments.get(name, usual) not in (usual, None)
    ]
    if unusual:
        raise ConfigError(
            f"{checkpoint.path}: was trained with Megatron's --{unusual[0].replace('_', '-')}; name a directory with --like."
        )
    qk_norm, qkv_bias = bool(arguments.get("qk_layernorm")), bool(arguments.get("add_qkv_bias"))
    return ModelConfig(
        architecture="qwen3" if qk_norm else "qwen2" if qkv_bias else "llama",
        vocab_size=checkpoint.shapes[EMBEDDING][0],
        num_kv_heads=arguments["num_query_groups"]
        if arguments.get("group_query_attention")
        else sizes["num_heads"],
        tie_embeddings=HEAD not in checkpoint.shapes,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        max_positions=arguments.get("max_position_embeddings") or 32768,
        **sizes | {"rope_theta": float(sizes["rope_theta"])},
    ).to_hf()


def _converted(
    checkpoint: MegatronCheckpoint,
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    on_numbers: Callable[[int], None],
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its Hugging Face name; raises for what is left over, missing, misshapen or not finite."""
    known = set(shapes)
    for name, tensor in _all_tensors(checkpoint, config, shapes):
        if name not in known:
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' is not in the config's {config.architecture} model; give another --like."
            )
        if name in (HF_EMBEDDING, HF_HEAD):
            tensor = tensor[: shapes[name][0]]
        known.discard(name)
        yield name, checked(tensor, shapes[name], f"{checkpoint.path}: '{name}'").contiguous()
        on_numbers(tensor.numel())
    for name in sorted(known):
        raise CheckpointError(
            f"{checkpoint.path}: has nothing for '{name}', which the config calls for; give another --like."
        )


def _all_tensors(
    checkpoint: MegatronCheckpoint, config: ModelConfig, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    if checkpoint.hf_prefix is not None:
        for name in names:
            yield name, checkpoint.read(checkpoint.hf_prefix + name)
        return
    for key in checkpoint.shapes:
        if "_extra_state" in key or not key.startswith(("decoder.", "embedding.", "output_layer.")):
            continue  # of the optimizer, among others
        layer, _, rest = key.removeprefix(LAYERS).partition(".")
        if key in OUTSIDE:
            yield OUTSIDE[key], checkpoint.read(key)
        elif not key.startswith(LAYERS):
            raise _foreign(key)
        elif layer.isdecimal():
            yield from _layer_tensors(layer, rest, checkpoint.read(key), config)
        elif (num_layers := checkpoint.shapes[key][0]) == config.num_layers:
            for index in range(num_layers):
                yield from _layer_tensors(
                    str(index), f"{layer}.{rest}", checkpoint.read(key, index), config
                )
        else:
            raise CheckpointError(
                f"{checkpoint.path}: has {num_layers} layers, not {config.num_layers} as configured; use another --like."
            )


def _layer_tensors(
    layer: str, suffix: str, tensor: Tensor, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of Hugging Face that Megatron's `suffix` of a layer is made of."""
    names = LAYER.get(suffix) or _WITHOUT_FUSED_NORMS.get(suffix)
    if names is None:
        raise _foreign(LAYERS + suffix)
    parts = tensor.chunk(len(names))
    if len(names) == len(_QKV):  # per group its queries, its key, its value
        heads = config.num_heads // config.num_kv_heads * config.head_dim
        if tensor.shape[0] != config.num_kv_heads * (heads + 2 * config.head_dim):
            raise CheckpointError(
                f"{suffix} has {tensor.shape[0]} rows, which do not fit the config's heads; give another --like."
            )
        grouped = tensor.reshape(config.num_kv_heads, -1, *tensor.shape[1:])
        parts = tuple(
            rows.flatten(0, 1)
            for rows in grouped.split([heads, config.head_dim, config.head_dim], dim=1)
        )
    yield from (
        (f"model.layers.{layer}.{name}", part) for name, part in zip(names, parts, strict=True)
    )


def _foreign(key: str) -> CheckpointError:
    return CheckpointError(
        f"Megatron's tensor '{key}' belongs to no Qwen2, Qwen3 or Llama model, which are all that is supported."
    )
