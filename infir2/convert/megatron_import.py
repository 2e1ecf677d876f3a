"""Megatron-core `torch_dist` checkpoints to Hugging Face.

Neither megatron nor trust in the checkpoint's pickles is needed. `_extra_state` entries and the
optimizer are skipped. A torch distributed checkpoint whose keys are Hugging Face's names, under any
prefix, is read too. `megatron_names` documents keys and layouts.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infir2.checkpoint.dcp import DcpTensors
from infir2.checkpoint.torch_save import read_torch_save
from infir2.convert.hf import SHARD_BYTES, complete_config
from infir2.convert.megatron_names import (
    ARGUMENTS,
    EMBEDDING,
    FIXED_ARGUMENTS,
    FLOAT_ARGUMENTS,
    HEAD,
    HF_EMBEDDING,
    HF_HEAD,
    LAYER,
    LAYERS,
    OUTSIDE_LAYERS,
    QKV,
    UNFUSED_NORMS,
)
from infir2.convert.weights import parameter_shapes, validated
from infir2.errors import CheckpointError, ConfigError
from infir2.files import read_regular
from infir2.model import ModelConfig
from infir2.model.safetensors_io import read_json, write_hf
from infir2.parallel.shard_spec import unsharded
from infir2.pickles import is_record
from infir2.terminal import byte_progress

MAX_TRACKER_BYTES = 100
MAX_ARGUMENT = 2**31


def import_megatron(src: str | Path, out: str | Path, like: str | Path | None = None) -> Path:
    """Write a Megatron-core or plain torch distributed checkpoint as a Hugging Face directory.

    The checkpoint may have any tensor-parallel size. Weights keep their dtype. Vocabulary rows that
    are only padding are dropped. A checkpoint with an output layer gives an untied model, whatever
    `like` says.

    Args:
        src: an `iter_*` directory, or its parent with `latest_checkpointed_iteration.txt`.
        out: directory to create.
        like: Hugging Face directory of the same shape, which provides config.json and tokenizer.
            Without it the shape is taken from the arguments that Megatron saved, and `out` has no
            tokenizer.

    Returns:
        The directory of the iteration that was read.

    Raises:
        OutputExistsError: `out` exists.
        CheckpointError: a tensor is unreadable, unknown, missing, misshapen or not finite, or a
            pickle asks for a class outside the allow-list.
        ConfigError: neither `like` nor the saved arguments describe the shape.
    """
    out, like = Path(out), None if like is None else Path(like)
    checkpoint = MegatronCheckpoint(find_iteration(Path(src)))
    config = read_json(like / "config.json") if like else config_from_arguments(checkpoint)
    tied = checkpoint.is_tied(bool(config.get("tie_word_embeddings")))
    config = config | {"tie_word_embeddings": tied}
    _check_size(checkpoint, ModelConfig.from_hf(config))
    shapes = parameter_shapes(config)
    config = complete_config(config, checkpoint.dtype)
    numel = sum(torch.Size(shape).numel() for shape in shapes.values())
    num_bytes = numel * getattr(torch, checkpoint.dtype).itemsize
    with byte_progress(f"importing {out.name}", num_bytes) as on_bytes:
        tensors = _hf_tensors(checkpoint, ModelConfig.from_hf(config), shapes, on_bytes)
        write_hf(out, tensors, config, like, SHARD_BYTES)
    return checkpoint.path


def find_iteration(path: Path) -> Path:
    """The directory with `.metadata`: `path`, or the iteration that its tracker file names."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        iteration = read_regular(tracker, MAX_TRACKER_BYTES).decode("ascii").strip()
        name = f"iter_{int(iteration):07d}" if iteration.isdecimal() else "release"
        if (iteration.isdecimal() or iteration == "release") and (
            path / name / ".metadata"
        ).is_file():
            return path / name
    raise CheckpointError(
        f"{path}: is not a Megatron torch_dist checkpoint"
        f" (no .metadata in it, nor in the iteration of {tracker.name})."
    )


def _check_size(checkpoint: "MegatronCheckpoint", config: ModelConfig) -> None:
    """Raise CheckpointError for a config that describes more values than the files have bytes."""
    if config.num_parameters > checkpoint.num_file_bytes:
        raise CheckpointError(
            f"{checkpoint.path}: its config describes {config.num_parameters:,} values, more than"
            f" its {checkpoint.num_file_bytes:,} bytes hold; name another directory with --like."
        )


class MegatronCheckpoint:
    """The tensors of a `torch_dist` directory, assembled from their shards when read.

    Example: `MegatronCheckpoint(Path("iter_0000100")).read("decoder.final_layernorm.weight")` ->
    [D].
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = DcpTensors(path, foreign=True)
        self.num_file_bytes = self._tensors.num_file_bytes
        self.shapes = {key: self._tensors.shape(key) for key in self._tensors}
        # Prefix of Hugging Face's names, such as "model."; None for Megatron's names.
        self.hf_prefix: str | None = None
        if EMBEDDING in self.shapes:
            return
        keys = [key for key in self.shapes if key.endswith(HF_EMBEDDING) and "optim" not in key]
        if not keys:
            raise CheckpointError(
                f"{path}: has no '{EMBEDDING}' nor '{HF_EMBEDDING}';"
                " it is not a checkpoint of a Qwen or Llama model."
            )
        self.hf_prefix = min(keys, key=len).removesuffix(HF_EMBEDDING)

    @property
    def dtype(self) -> str:
        """dtype of the weights, as config.json writes it."""
        embedding = EMBEDDING if self.hf_prefix is None else self.hf_prefix + HF_EMBEDDING
        return str(self._tensors.dtype(embedding)).removeprefix("torch.")

    def is_tied(self, config_says_tied: bool) -> bool:
        """Whether embedding and output layer share one weight.

        `config_says_tied` decides only if a stored head equals the embedding.
        """
        if self.hf_prefix is None:
            return HEAD not in self.shapes
        head = self.hf_prefix + HF_HEAD
        if head not in self.shapes:
            return True
        return config_says_tied and torch.equal(
            self.read(head), self.read(self.hf_prefix + HF_EMBEDDING)
        )

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """A tensor, or one layer of a tensor that stacks all layers."""
        spec = unsharded(self.shapes.get(key, ()))
        if layer is None:
            return self._tensors.read_shard(key, spec)
        offset, local_shape = (layer, *spec.offset[1:]), (1, *spec.local_shape[1:])
        return self._tensors.read_shard(key, spec._replace(offset=offset, local_shape=local_shape))[
            0
        ]

    def arguments(self) -> dict[str, Any]:
        """The command-line arguments that Megatron saved in common.pt; empty if there are none."""
        path = self.path / "common.pt"
        common = read_torch_save(path) if path.is_file() else {}
        arguments: Any = common.get("args") if isinstance(common, dict) else None
        if not is_record(arguments, "argparse.Namespace") or not isinstance(arguments.state, dict):
            return {}
        return arguments.state


def config_from_arguments(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """A config.json from the arguments in common.pt.

    Raises ConfigError for a missing argument, and for one that asks for what our decoder lacks.
    """
    arguments = checkpoint.arguments()
    sizes: dict[str, Any] = {
        ours: _number(checkpoint, arguments, theirs) for ours, theirs in ARGUMENTS.items()
    }
    for name, fixed in FIXED_ARGUMENTS.items():
        if arguments.get(name, fixed) not in (fixed, None):
            raise ConfigError(
                f"{checkpoint.path}: was trained with Megatron's --{name.replace('_', '-')};"
                " name a Hugging Face directory with --like."
            )
    qk_norm, qkv_bias = bool(arguments.get("qk_layernorm")), bool(arguments.get("add_qkv_bias"))
    grouped, positions = arguments.get("group_query_attention"), "max_position_embeddings"
    return ModelConfig(
        architecture="qwen3" if qk_norm else "qwen2" if qkv_bias else "llama",
        vocab_size=checkpoint.shapes[EMBEDDING][0],
        num_kv_heads=(
            _number(checkpoint, arguments, "num_query_groups") if grouped else sizes["num_heads"]
        ),
        tie_embeddings=HEAD not in checkpoint.shapes,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        max_positions=(
            _number(checkpoint, arguments, positions) if arguments.get(positions) else 32768
        ),
        **sizes | {"rope_theta": float(sizes["rope_theta"])},
    ).to_hf()


def _number(checkpoint: MegatronCheckpoint, arguments: dict[str, Any], name: str) -> Any:
    """A size, or one of the two arguments that are no integers."""
    value: Any = arguments.get(name)
    kinds = (int, float) if name in FLOAT_ARGUMENTS else (int,)
    if type(value) not in kinds or not 0 < value <= MAX_ARGUMENT:
        raise ConfigError(
            f"{checkpoint.path}: common.pt has {'no' if value is None else 'an unusable'} {name};"
            " name a Hugging Face directory with --like."
        )
    return value


def _hf_tensors(
    checkpoint: MegatronCheckpoint,
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    on_bytes: Callable[[int], None],
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its Hugging Face name.

    Raises CheckpointError for an unknown, missing, misshapen or non-finite tensor.
    """
    missing = set(shapes)
    for name, tensor in _named_tensors(checkpoint, config, shapes):
        if name not in missing:
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' is not in the config's {config.architecture} model;"
                " name another directory with --like."
            )
        if name in (HF_EMBEDDING, HF_HEAD):
            tensor = tensor[: shapes[name][0]]  # without the padding of the vocabulary
        missing.discard(name)
        yield name, validated(tensor, shapes[name], f"{checkpoint.path}: '{name}'").contiguous()
        on_bytes(tensor.nbytes)
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: has nothing for '{min(missing)}', which the config requires;"
            " name another directory with --like."
        )


def _named_tensors(
    checkpoint: MegatronCheckpoint, config: ModelConfig, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Every model tensor of the checkpoint under its Hugging Face name, shapes not checked."""
    if checkpoint.hf_prefix is not None:
        for name in names:
            yield name, checkpoint.read(checkpoint.hf_prefix + name)
        return
    for key in checkpoint.shapes:
        if "_extra_state" in key or not key.startswith(("decoder.", "embedding.", "output_layer.")):
            continue  # optimizer state, among others
        layer, _, rest = key.removeprefix(LAYERS).partition(".")
        if key in OUTSIDE_LAYERS:
            yield OUTSIDE_LAYERS[key], checkpoint.read(key)
        elif not key.startswith(LAYERS):
            raise _unknown_tensor(key)
        elif layer.isdecimal():
            yield from _layer_tensors(layer, rest, checkpoint.read(key), config)
        else:
            yield from _stacked_layers(checkpoint, key, config)


def _stacked_layers(
    checkpoint: MegatronCheckpoint, key: str, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    num_layers = checkpoint.shapes[key][0]
    if num_layers != config.num_layers:
        raise CheckpointError(
            f"{checkpoint.path}: has {num_layers} layers, not {config.num_layers} as its config"
            " says; name another directory with --like."
        )
    suffix = key.removeprefix(LAYERS)
    for index in range(num_layers):
        yield from _layer_tensors(str(index), suffix, checkpoint.read(key, index), config)


def _layer_tensors(
    layer: str, suffix: str, tensor: Tensor, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that Megatron's tensor `suffix` of one layer concatenates."""
    names = LAYER.get(suffix) or UNFUSED_NORMS.get(suffix)
    if names is None:
        raise _unknown_tensor(LAYERS + suffix)
    parts = tensor.chunk(len(names))
    if len(names) == len(QKV):
        parts = _split_qkv(suffix, tensor, config)
    for name, part in zip(names, parts, strict=True):
        yield f"model.layers.{layer}.{name}", part


def _split_qkv(suffix: str, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """Queries, keys and values of a fused [G * (N/G + 2) * H, ...] weight or bias."""
    queries = config.num_heads // config.num_kv_heads * config.head_dim  # rows of a group
    if tensor.shape[0] != config.num_kv_heads * (queries + 2 * config.head_dim):
        raise CheckpointError(
            f"{suffix} has {tensor.shape[0]} rows, which do not fit the config's heads;"
            " name another directory with --like."
        )
    grouped = tensor.reshape(config.num_kv_heads, -1, *tensor.shape[1:])
    parts = grouped.split([queries, config.head_dim, config.head_dim], dim=1)
    return tuple(part.flatten(0, 1) for part in parts)


def _unknown_tensor(key: str) -> CheckpointError:
    return CheckpointError(
        f"Megatron's tensor '{key}' belongs to no Qwen2, Qwen3 or Llama model;"
        " other models are not supported."
    )
