"""Megatron-core `torch_dist` checkpoints to Hugging Face, without megatron and without trusting their pickles.

Keys, for L layers stacked in a leading dimension or each under its number:

    embedding.word_embeddings.weight [V, D]          decoder.layers[.i].mlp.linear_fc1.weight [2F, D] (gate, then up)
    decoder.layers[.i].self_attention.linear_qkv.weight [G * (N/G + 2) * H, D]: per group N/G queries, one key, one value
    decoder.layers[.i].self_attention.linear_proj.weight [D, N * H]          decoder.final_layernorm.weight [D]

Rotary embedding needs no permutation. `_extra_state` and the optimizer are left behind. A torch distributed checkpoint whose keys
are Hugging Face's names, with any prefix, is read too.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infir2.checkpoint.dcp import DcpTensors
from infir2.checkpoint.export import SHARD_BYTES, complete_config
from infir2.checkpoint.pickles import read_torch_save
from infir2.checkpoint.places import whole
from infir2.checkpoint.progress import byte_progress
from infir2.checkpoint.weights import parameter_shapes
from infir2.errors import CheckpointError, ConfigError, OutputExistsError
from infir2.model import ModelConfig
from infir2.model.files import all_finite, read_json, write_hf

EMBEDDING, HEAD, FINAL_NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"
LAYERS = "decoder.layers."
HF_EMBEDDING, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NORMS = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm", "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm"}
_NORMS |= {"input_layernorm.weight": "input_layernorm", "pre_mlp_layernorm.weight": "post_attention_layernorm"}
_PLAIN = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}
_USUAL = {
    "use_rope_scaling": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "normalization": "RMSNorm",
    "swiglu": True,
    "apply_layernorm_1p": False,
}
_HEAD_NORMS = {"self_attention.q_layernorm.weight": "self_attn.q_norm", "self_attention.k_layernorm.weight": "self_attn.k_norm"}


def import_megatron(src: str | Path, out: str | Path, like: str | Path | None = None, say: Callable[[str], None] = print) -> None:
    """Write a Megatron-core checkpoint (`torch_dist`, any tensor-parallel size), or a plain torch one, as a Hugging Face directory.

    src: an `iter_*` directory, or the one above it with `latest_checkpointed_iteration.txt`. like: Hugging Face directory
    of the same shape, which gives config.json and the tokenizer; without it the shape comes from the arguments that
    Megatron saved. Weights keep their dtype. Rows of the vocabulary that only pad it are cut; an output layer of its own
    makes the result untied, whatever `like` says.
    Raises CheckpointError (unreadable, foreign or missing tensors; a pickle that asks for a class it should not),
    ConfigError (no shape known), OutputExistsError.
    """
    out, like = Path(out), None if like is None else Path(like)
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; name a directory that does not, nothing was written.")
    checkpoint = MegatronCheckpoint(find_iteration(Path(src)))
    config = read_json(like / "config.json") if like else config_of_arguments(checkpoint)
    config = config | {"tie_word_embeddings": checkpoint.is_tied(bool(config.get("tie_word_embeddings")))}
    shapes = parameter_shapes(config)
    config = complete_config(config, checkpoint.dtype)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    with byte_progress(f"importing {out.name}", total) as on_numbers:
        write_hf(out, _converted(checkpoint, ModelConfig.from_hf(config), shapes, on_numbers), config, like, SHARD_BYTES)
    say(f"{out}: {len(shapes)} tensors from {checkpoint.path}.")


def find_iteration(path: Path) -> Path:
    """The directory with `.metadata`: `path` itself, or the iteration that its tracker file names."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        word = tracker.read_text().strip()
        directory = path / ("release" if word == "release" else f"iter_{int(word):07d}" if word.isdecimal() else "?")
        if (directory / ".metadata").is_file():
            return directory
    raise CheckpointError(f"{path}: is not a Megatron torch_dist checkpoint (no .metadata here, nor in the iteration of {tracker.name}).")


class MegatronCheckpoint:
    """The tensors of a `torch_dist` directory by Megatron's keys, each assembled from its shards when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = DcpTensors(path, foreign=True)
        self.shapes = {key: self._tensors.shape(key) for key in self._tensors}
        named = [key for key in self.shapes if key.endswith(HF_EMBEDDING) and "optim" not in key]
        self.hf_prefix = min(named, key=len).removesuffix(HF_EMBEDDING) if named and EMBEDDING not in self.shapes else None
        if EMBEDDING not in self.shapes and self.hf_prefix is None:
            raise CheckpointError(f"{path}: has no '{EMBEDDING}' nor '{HF_EMBEDDING}'; it is not a checkpoint of a Qwen or Llama model.")

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
        return head not in self.shapes or (wanted and torch.equal(self.read(head), self.read(self.hf_prefix + HF_EMBEDDING)))

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """A tensor, or one layer of a tensor that stacks them."""
        place = whole(self.shapes.get(key, ()))
        if layer is None:
            return self._tensors.part(key, place)
        offset, size = (layer, *place.offset[1:]), (1, *place.size[1:])
        return self._tensors.part(key, place._replace(offset=offset, size=size))[0]

    def arguments(self) -> dict[str, Any]:
        """Megatron's own command-line arguments, from common.pt; empty if it has none."""
        common = read_torch_save(self.path / "common.pt") if (self.path / "common.pt").is_file() else {}
        arguments = common.get("args") if isinstance(common, dict) else None
        return dict(vars(arguments)) if arguments is not None else {}


def config_of_arguments(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """A config.json from the arguments in common.pt; ConfigError names what is missing."""
    arguments = checkpoint.arguments()
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "norm_epsilon", "rotary_base")
    missing = [name for name in needed if arguments.get(name) is None]
    if missing:
        raise ConfigError(
            f"{checkpoint.path}: common.pt does not give the shape (no {missing[0]}); name a Hugging Face directory with --like."
        )
    unusual = [name for name, usual in _USUAL.items() if arguments.get(name, usual) not in (usual, None)]
    if unusual:
        raise ConfigError(f"{checkpoint.path}: was trained with Megatron's --{unusual[0].replace('_', '-')}; name a directory with --like.")
    grouped = arguments.get("group_query_attention")
    qk_norm, qkv_bias = bool(arguments.get("qk_layernorm")), bool(arguments.get("add_qkv_bias"))
    return ModelConfig(
        architecture="qwen3" if qk_norm else "qwen2" if qkv_bias else "llama",
        vocab_size=checkpoint.shapes[EMBEDDING][0],
        hidden_size=arguments["hidden_size"],
        num_layers=arguments["num_layers"],
        num_heads=arguments["num_attention_heads"],
        num_kv_heads=arguments["num_query_groups"] if grouped else arguments["num_attention_heads"],
        head_dim=arguments["kv_channels"],
        ffn_size=arguments["ffn_hidden_size"],
        rms_eps=arguments["norm_epsilon"],
        rope_theta=float(arguments["rotary_base"]),
        tie_embeddings=HEAD not in checkpoint.shapes,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        max_positions=arguments.get("max_position_embeddings") or 32768,
    ).to_hf()


def _converted(
    checkpoint: MegatronCheckpoint, config: ModelConfig, shapes: dict[str, tuple[int, ...]], on_numbers: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its Hugging Face name; raises for what is left over, missing, misshapen or not finite."""
    known = set(shapes)
    _refuse_foreign(checkpoint)
    for name, tensor in _all_tensors(checkpoint, config, shapes):
        if name not in known:
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' is not in a {config.architecture} model of this config; give another --like."
            )
        if name in (HF_EMBEDDING, HF_HEAD):
            tensor = tensor[: shapes[name][0]]
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' is {list(tensor.shape)}, not {list(shapes[name])} as the config says; give another --like."
            )
        if not all_finite(tensor):
            raise CheckpointError(f"{checkpoint.path}: '{name}' holds NaN or Inf; go back to an older checkpoint.")
        known.discard(name)
        yield name, tensor.contiguous()
        on_numbers(tensor.numel())
    for name in sorted(known):
        raise CheckpointError(f"{checkpoint.path}: has nothing for '{name}', which the config calls for; give another --like.")


def _all_tensors(checkpoint: MegatronCheckpoint, config: ModelConfig, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    if checkpoint.hf_prefix is not None:
        for name in names:
            yield name, checkpoint.read(checkpoint.hf_prefix + name)
        return
    yield HF_EMBEDDING, checkpoint.read(EMBEDDING)
    stacked = sorted({key.removeprefix(LAYERS) for key in _layer_keys(checkpoint) if not key[len(LAYERS)].isdigit()})
    for suffix in stacked:
        num_layers = checkpoint.shapes[LAYERS + suffix][0]
        if num_layers != config.num_layers:
            raise CheckpointError(
                f"{checkpoint.path}: has {num_layers} layers, not {config.num_layers} as the config says; give another --like."
            )
    for layer, suffix in itertools.product(range(config.num_layers), stacked):
        yield from _layer_tensors(f"model.layers.{layer}.", suffix, checkpoint.read(LAYERS + suffix, layer), config)
    for key in sorted(key for key in _layer_keys(checkpoint) if key[len(LAYERS)].isdigit()):
        layer_text, _, suffix = key.removeprefix(LAYERS).partition(".")
        yield from _layer_tensors(f"model.layers.{layer_text}.", suffix, checkpoint.read(key), config)
    yield "model.norm.weight", checkpoint.read(FINAL_NORM)
    if HEAD in checkpoint.shapes:
        yield HF_HEAD, checkpoint.read(HEAD)


def _layer_keys(checkpoint: MegatronCheckpoint) -> list[str]:
    return [key for key in checkpoint.shapes if key.startswith(LAYERS) and "._extra_state" not in key]


def _layer_tensors(prefix: str, suffix: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    module, _, kind = suffix.rpartition(".")  # kind: weight or bias
    if suffix in _NORMS or suffix in _HEAD_NORMS:
        yield f"{prefix}{_NORMS.get(suffix) or _HEAD_NORMS[suffix]}.weight", tensor
    elif module == "self_attention.linear_qkv":
        heads = config.num_heads // config.num_kv_heads * config.head_dim
        if tensor.shape[0] != config.num_kv_heads * (heads + 2 * config.head_dim):
            raise CheckpointError(
                f"Megatron's {suffix} has {tensor.shape[0]} rows, which do not fit the config's heads; give another --like."
            )
        grouped = tensor.reshape(config.num_kv_heads, -1, *tensor.shape[1:])
        for part, rows in zip("qkv", grouped.split([heads, config.head_dim, config.head_dim], dim=1), strict=True):
            yield f"{prefix}self_attn.{part}_proj.{kind}", rows.reshape(-1, *tensor.shape[1:])
    elif module == "mlp.linear_fc1":
        for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
            yield f"{prefix}mlp.{part}_proj.{kind}", rows
    elif module in _PLAIN:
        yield f"{prefix}{_PLAIN[module]}.{kind}", tensor
    else:
        raise CheckpointError(
            f"Megatron's tensor '{LAYERS}{suffix}' belongs to no Qwen2, Qwen3 or Llama model, which are all that is supported."
        )


def _refuse_foreign(checkpoint: MegatronCheckpoint) -> None:
    for key in checkpoint.shapes:
        ours = key in (EMBEDDING, HEAD, FINAL_NORM) or key.startswith(LAYERS) or "_extra_state" in key
        if key.startswith(("decoder.", "embedding.", "output_layer.")) and not ours:
            raise CheckpointError(f"Megatron's tensor '{key}' belongs to no Qwen2, Qwen3 or Llama model, which are all that is supported.")
