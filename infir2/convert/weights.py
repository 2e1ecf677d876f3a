"""A model's weights as a stream of named tensors, from a run or a Hugging Face directory.

Names are Hugging Face's. The list of weights, and of those in FP8, comes from a decoder on the meta
device, so training, export and verification cannot disagree about it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infir2.checkpoint.reader import Checkpoint, open_checkpoint
from infir2.config.schema import Fp8Section
from infir2.errors import CheckFailedError, CheckpointError
from infir2.model import Decoder, ModelConfig
from infir2.model.hf_names import SCALE_SUFFIX, checked_scale
from infir2.model.safetensors_io import HfWeights, all_finite, read_config, read_json
from infir2.numerics import Fp8Linear, Fp8Tensor, convert_to_fp8, dequantize

PARAMETERS = "parameters/"
BLOCK = (128, 128)


def meta_decoder(config: Mapping[str, Any], fp8: Fp8Section | None = None) -> Decoder:
    """The decoder of a config.json on the meta device, with `Fp8Linear` layers if given `fp8`."""
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_hf(config))
        if fp8 is None or not fp8.enabled:
            return decoder
        return convert_to_fp8(decoder, fp8.scale_format, fp8.skip_modules)


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a `config.json`, in model order, without a tied head."""
    parameters = meta_decoder(config).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in parameters}


def quantized_names(config: Mapping[str, Any], fp8: Fp8Section) -> list[str]:
    """Names of the weights that training with the section `fp8` keeps in FP8.

    Example: "model.layers.0.mlp.down_proj.weight".
    """
    modules = meta_decoder(config, fp8).named_modules()
    return [f"{name}.weight" for name, module in modules if isinstance(module, Fp8Linear)]


@dataclass(frozen=True)
class Weights:
    """Named weights that are read one at a time.

    Example: `for name, tensor in hf_weights(Path("Qwen2.5-1.5B"), quantized=False).bf16(): ...`
    """

    origin: Path  # checkpoint or directory, for error messages
    config: dict[str, Any]  # of config.json
    side_files: Path | None  # directory with tokenizer and generation settings
    fp8: Fp8Section | None  # how the run trained; None for a Hugging Face directory
    names: set[str]  # of the tensors that `origin` stores
    load: Callable[[str], Tensor]  # reads one of `names`, in its stored dtype
    shapes: dict[str, tuple[int, ...]]  # of the tensors that `config` requires
    kind: str | None = None  # "cpt", "sft" or "rl"; None for a Hugging Face directory
    changed_files: dict[str, dict[str, Any]] = field(default_factory=dict)  # of `side_files`

    def read(self, name: str) -> Tensor:
        """One weight on the CPU in its stored dtype.

        Raises CheckpointError if the weight is missing, misshapen or not finite.
        """
        if name not in self.names:
            raise CheckpointError(
                f"{self.origin}: has no tensor '{name}', which its config requires;"
                " the model is not complete."
            )
        return validated(self.load(name), self.shapes[name], f"{self.origin}: '{name}'")

    def bf16(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight rounded to BF16, in model order: the input of BF16 and FP8 exports."""
        for name in self.shapes:
            yield name, self.read_bf16(name)

    def read_bf16(self, name: str) -> Tensor:
        """One weight rounded to BF16; raises CheckpointError as `read`, and for an overflow."""
        tensor = self.read(name).to(torch.bfloat16)
        if not all_finite(tensor):
            raise CheckpointError(
                f"{self.origin}: '{name}' has values beyond the range of BF16;"
                " such a model cannot be exported."
            )
        return tensor

    @property
    def num_bf16_bytes(self) -> int:
        """Size of all weights in BF16."""
        return 2 * sum(torch.Size(shape).numel() for shape in self.shapes.values())


def validated(tensor: Tensor, shape: tuple[int, ...], label: str) -> Tensor:
    """Return `tensor`, or raise CheckpointError if it is misshapen or not finite.

    `label` begins the error sentence.
    """
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{label} is {list(tensor.shape)}, not {list(shape)} as its config says;"
            " the two belong to different models."
        )
    if not all_finite(tensor):
        raise CheckpointError(f"{label} holds NaN or Inf; go back to an older checkpoint.")
    return tensor


def tokenizer_directory(run: Checkpoint) -> Path:
    """The tokenizer of a run; a relative path starts where the run did, or where we are.

    The latter serves runs that were moved together with their tokenizer.
    """
    stored = run.value("tokenizer_dir", str)
    start = Path(str(run.state.get("working_dir", "")), stored)
    return start if start.is_dir() else Path(stored)


def run_weights(path: Path) -> Weights:
    """The FP32 masters of a run's newest checkpoint, or of the checkpoint that `path` names."""
    checkpoint = open_checkpoint(path)
    tensors, state = checkpoint.tensors(), checkpoint.state
    for key in ("model_config", "fp8"):
        if not isinstance(state.get(key), dict):
            raise CheckpointError(
                f"{checkpoint.path}: its state has no '{key}'; it was not saved by a training run."
            )
    shapes = parameter_shapes(state["model_config"])
    names = {name.removeprefix(PARAMETERS) for name in tensors if name.startswith(PARAMETERS)}
    _reject_unknown(checkpoint.path, names - set(shapes))
    side_files = tokenizer_directory(checkpoint) if state.get("tokenizer_dir") else None
    if side_files and not side_files.is_dir():
        raise CheckpointError(
            f"{checkpoint.path}: its tokenizer directory {side_files} is gone;"
            " put it back, the export copies its files."
        )
    return Weights(
        origin=checkpoint.path,
        config=state["model_config"],
        side_files=side_files,
        fp8=Fp8Section.model_validate(state["fp8"], strict=False),
        names=names,
        load=lambda name: tensors[PARAMETERS + name],
        shapes=shapes,
        kind=state.get("kind"),
    )


def hf_weights(path: Path, quantized: bool) -> Weights:
    """The weights of a Hugging Face directory; FP8 weights are dequantized to BF16.

    Args:
        quantized: which kind of directory is required, FP8 or not quantized.

    Raises:
        CheckpointError: `path` is of the other kind, or stores tensors that its config does not
            know.
    """
    read_config(path)
    config = read_json(path / "config.json")
    if quantized != (config.get("quantization_config") is not None):
        required = (
            "an FP8 model (quantization_config)"
            if quantized
            else "a model that is not quantized yet"
        )
        raise CheckpointError(
            f"{path / 'config.json'}: is not the config of {required}; name the other directory"
            + ("." if quantized else f", or infir2 import fp8 {path} --to DIR makes one.")
        )
    files = HfWeights(path)
    plain_config = {key: value for key, value in config.items() if key != "quantization_config"}
    shapes = parameter_shapes(plain_config)
    names = set(files.names())
    _reject_unknown(path, _unknown_names(files, names - set(shapes), quantized))
    return Weights(
        origin=path,
        config=plain_config,
        side_files=path,
        fp8=None,
        names=names,
        load=lambda name: _read_dequantized(files, names, name),
        shapes=shapes,
    )


def _unknown_names(files: HfWeights, extra: set[str], quantized: bool) -> set[str]:
    """Those of `extra` that are not redundant either.

    Args:
        extra: names of stored tensors that are not weights of the model.
        quantized: whether scales of FP8 weights may be among them.
    """
    # Old files store inv_freq, a buffer that is computed from the config.
    unknown = {name for name in extra if not name.endswith(".rotary_emb.inv_freq")}
    if quantized:
        unknown -= {name + SCALE_SUFFIX for name in files.names()}
    if "lm_head.weight" in unknown:  # a tied head may be stored as a second copy of the embedding
        head, embedding = files.read("lm_head.weight"), files.read("model.embed_tokens.weight")
        if torch.equal(head, embedding):
            unknown.discard("lm_head.weight")
    return unknown


def _read_dequantized(files: HfWeights, names: set[str], name: str) -> Tensor:
    tensor, scale_name = files.read(name), name + SCALE_SUFFIX
    if scale_name in names:
        return dequantize_pair(tensor, files.read(scale_name), name)
    if tensor.element_size() < 2:
        raise CheckpointError(
            f"{files.directory}: '{name}' is {tensor.dtype} and has no '{scale_name}';"
            " copy the model again."
        )
    return tensor


def file_scale_format(path: Path) -> str:
    """The scale format ("pow2", "fp32") that an FP8 directory declares.

    Raises CheckpointError unless its weights are FP8 in 128x128 blocks.
    """
    section = read_json(path / "config.json").get("quantization_config")
    if (
        not isinstance(section, dict)
        or section.get("quant_method") != "fp8"
        or section.get("weight_block_size") != list(BLOCK)
    ):
        remedy = (
            "convert it with software that knows its format"
            if section
            else f"it is not quantized, and infir2 export fp8 {path} --to DIR does that"
        )
        raise CheckpointError(
            f"{path / 'config.json'}: quantization_config is not quant_method fp8"
            f" with weight_block_size [128, 128]; {remedy}."
        )
    return "pow2" if section.get("scale_fmt") == "ue8m0" else "fp32"


def dequantize_pair(codes: Tensor, scale: Tensor, name: str) -> Tensor:
    """Dequantize an FP8 weight to BF16.

    codes: [N, K]; scale: its `weight_scale_inv`, [ceil(N/128), ceil(K/128)].
    The result is exact for power-of-two scales and rounded once otherwise. Raises CheckpointError
    unless dtypes and shapes of the two match, and for what `checked_scale` refuses.
    """
    try:
        pair = Fp8Tensor(codes, checked_scale(name, codes, scale), BLOCK, "fp32")
    except ValueError as error:
        raise CheckpointError(
            f"'{name}' and '{name}{SCALE_SUFFIX}' are not a block-wise FP8 pair: {error}."
        ) from error
    return dequantize(pair, torch.float32).to(torch.bfloat16)


def compare_names(
    stored: set[str], weights: set[str], quantized: set[str], directory: Path
) -> None:
    """Raise CheckFailedError unless `stored` is `weights` plus one scale for each of `quantized`.

    Args:
        stored: names of the tensors in `directory`.
        weights: names of the model's weights.
        quantized: those of `weights` that are FP8.
    """
    for name in sorted(stored ^ (weights | {weight + SCALE_SUFFIX for weight in quantized})):
        weight = name.removesuffix(SCALE_SUFFIX)
        if name != weight and weight in weights:
            ours, theirs = ("FP8", "BF16") if weight in quantized else ("BF16", "FP8")
            raise CheckFailedError(
                f"'{weight}' is {ours} in the run and {theirs} in {directory}:"
                " their lists of layers in high precision differ."
            )
        state = "not in the model" if name in stored else "missing"
        raise CheckFailedError(f"{directory}: tensor '{name}' is {state}.")


def _reject_unknown(origin: Path, unknown: set[str]) -> None:
    if unknown:
        raise CheckpointError(
            f"{origin}: has {len(unknown)} tensors that its config does not know,"
            f" such as '{min(unknown)}'."
        )
