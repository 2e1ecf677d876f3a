"""The weights of a model as one stream of named tensors, whatever holds them: a run's masters or a Hugging Face directory.

Names are Hugging Face's. What the model must have, and which of its weights are FP8, is asked of the model itself (a
decoder on the meta device), so that training, export and verification cannot disagree about the list.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infir2.checkpoint.store import open_checkpoint
from infir2.config.schema import Fp8Section
from infir2.errors import CheckFailedError, CheckpointError
from infir2.model import Decoder, ModelConfig
from infir2.model.hf_names import SCALE_SUFFIX
from infir2.model.safetensors_io import HfWeights, all_finite, read_json
from infir2.numerics import Fp8Linear, Fp8Tensor, convert_to_fp8, dequantize

PARAMETERS = "parameters/"
BLOCK = (128, 128)


def meta_decoder(config: Mapping[str, Any], fp8: Fp8Section | None = None) -> Decoder:
    """The decoder of a `config.json` without memory for its weights; with `fp8`, its FP8 layers are `Fp8Linear`."""
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_hf(config))
        if fp8 is None or not fp8.enabled:
            return decoder
        return convert_to_fp8(decoder, fp8.scale_format, fp8.skip_modules)


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that a `config.json` calls for, in the model's order; a tied head is absent."""
    return {
        name: tuple(parameter.shape) for name, parameter in meta_decoder(config).named_parameters()
    }


def quantized_names(config: Mapping[str, Any], fp8: Fp8Section) -> list[str]:
    """Names ("model.layers.0.mlp.down_proj.weight") of the weights that training under `fp8` keeps in FP8."""
    return [
        f"{name}.weight"
        for name, module in meta_decoder(config, fp8).named_modules()
        if isinstance(module, Fp8Linear)
    ]


@dataclass(frozen=True)
class Weights:
    """Where weights come from.

    config: the `config.json`. side_files: directory with tokenizer and generation settings, if there is one.
    fp8: how the run trained (None for a Hugging Face directory). names: of the tensors that are there; load: one of them.
    shapes: what the config calls for.
    """

    origin: Path
    config: dict[str, Any]
    side_files: Path | None
    fp8: Fp8Section | None
    names: set[str]
    load: Callable[[str], Tensor]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """One weight on the CPU in its stored dtype; CheckpointError if it is absent, misshapen or not finite."""
        if name not in self.names:
            raise CheckpointError(
                f"{self.origin}: has no tensor '{name}', which its config calls for; the model is not complete."
            )
        return checked(self.load(name), self.shapes[name], f"{self.origin}: '{name}'")

    def bf16(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight rounded to BF16, in the model's order: the one source of FP8 codes and of BF16 exports."""
        for name in self.shapes:
            yield name, self.read_bf16(name)

    def read_bf16(self, name: str) -> Tensor:
        """One weight rounded to BF16; raises as `read`."""
        tensor = self.read(name).to(torch.bfloat16)
        if not all_finite(tensor):
            raise CheckpointError(
                f"{self.origin}: '{name}' has values beyond the range of BF16; such a model is not exported."
            )
        return tensor

    @property
    def num_bf16_bytes(self) -> int:
        return 2 * sum(torch.Size(shape).numel() for shape in self.shapes.values())


def checked(tensor: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """`tensor` itself; CheckpointError if it is misshapen or not finite."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{what} is {list(tensor.shape)}, not {list(shape)} as its config says; the two belong to different models."
        )
    if not all_finite(tensor):
        raise CheckpointError(
            f"{what} holds NaN or Inf and is not taken; go back to an older checkpoint."
        )
    return tensor


def run_weights(path: Path) -> Weights:
    """The masters of a run's newest checkpoint, or of the checkpoint named."""
    checkpoint = open_checkpoint(path)
    tensors, state = checkpoint.tensors(), checkpoint.state
    for key in ("model_config", "fp8"):
        if not isinstance(state.get(key), dict):
            raise CheckpointError(
                f"{checkpoint.path}: its state has no '{key}'; it was not saved by a training run."
            )
    shapes = parameter_shapes(state["model_config"])
    names = {name.removeprefix(PARAMETERS) for name in tensors if name.startswith(PARAMETERS)}
    _refuse_unknown(checkpoint.path, names - set(shapes))
    side_files = Path(state["tokenizer_dir"]) if state.get("tokenizer_dir") else None
    if side_files and not side_files.is_dir():
        raise CheckpointError(
            f"{checkpoint.path}: its tokenizer directory {side_files} is gone; put it back, the export needs its files."
        )
    section = Fp8Section.model_validate(state["fp8"], strict=False)
    return Weights(
        checkpoint.path,
        state["model_config"],
        side_files,
        section,
        names,
        lambda name: tensors[PARAMETERS + name],
        shapes,
    )


def hf_weights(path: Path, quantized: bool) -> Weights:
    """The weights of a Hugging Face directory; with `quantized` its FP8 pairs come out dequantised to BF16.

    Raises CheckpointError if the directory is of the other kind.
    """
    config = read_json(path / "config.json")
    if quantized != (config.get("quantization_config") is not None):
        wanted = (
            "an FP8 model (quantization_config)"
            if quantized
            else "a model that is not quantised yet"
        )
        raise CheckpointError(
            f"{path / 'config.json'}: is not of {wanted}; give the other directory."
        )
    files = HfWeights(path)
    names = set(files.names())
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    shapes = parameter_shapes(plain)
    unknown = {
        name for name in names - set(shapes) if not name.endswith(".rotary_emb.inv_freq")
    }  # a derived buffer of old files
    if quantized:
        unknown -= {name + SCALE_SUFFIX for name in names}
    if "lm_head.weight" in unknown and torch.equal(
        files.read("lm_head.weight"), files.read("model.embed_tokens.weight")
    ):
        unknown.discard("lm_head.weight")  # tied, and written twice
    _refuse_unknown(path, unknown)

    def load(name: str) -> Tensor:
        tensor, scale_name = files.read(name), name + SCALE_SUFFIX
        if scale_name in names:
            return dequantize_pair(tensor, files.read(scale_name), name)
        if tensor.element_size() < 2:
            raise CheckpointError(
                f"{path}: '{name}' is {tensor.dtype} and has no '{scale_name}'; copy the model again."
            )
        return tensor

    return Weights(path, plain, path, None, names, load, shapes)


def file_scale_format(path: Path) -> str:
    """Scale format ("pow2", "fp32") that an FP8 directory declares, after checking that its blocks are ours."""
    section = read_json(path / "config.json").get("quantization_config")
    if (
        not isinstance(section, dict)
        or section.get("quant_method") != "fp8"
        or list(section.get("weight_block_size") or ()) != list(BLOCK)
    ):
        raise CheckpointError(
            f"{path / 'config.json'}: quantization_config is not quant_method fp8 with weight_block_size [128, 128]."
        )
    return "pow2" if section.get("scale_fmt") == "ue8m0" else "fp32"


def dequantize_pair(codes: Tensor, scale: Tensor, name: str) -> Tensor:
    """BF16 values of an FP8 weight [N, K] and its `weight_scale_inv`; CheckpointError unless the two belong together.

    Exact for power-of-two scales, rounded once otherwise.
    """
    try:
        pair = Fp8Tensor(codes, scale.float(), BLOCK, "fp32")
    except ValueError as error:
        raise CheckpointError(
            f"'{name}' and '{name}{SCALE_SUFFIX}' are not a block-wise FP8 pair: {error}."
        ) from error
    return dequantize(pair, torch.float32).to(torch.bfloat16)


def compare_names(found: set[str], weights: set[str], quantized: set[str], directory: Path) -> None:
    """Raise CheckFailedError unless the tensors of `directory` are these weights, with scales for the quantised ones."""
    for name in sorted(found ^ (weights | {weight + SCALE_SUFFIX for weight in quantized})):
        weight = name.removesuffix(SCALE_SUFFIX)
        if name != weight and weight in weights:
            ours, theirs = ("FP8", "BF16") if weight in quantized else ("BF16", "FP8")
            raise CheckFailedError(
                f"'{weight}' is {ours} in the run and {theirs} in {directory}: the high-precision lists differ."
            )
        raise CheckFailedError(
            f"{directory}: tensor '{name}' is {'not in the model' if name in found else 'missing'}."
        )


def _refuse_unknown(origin: Path, unknown: set[str]) -> None:
    if unknown:
        raise CheckpointError(
            f"{origin}: has {len(unknown)} tensors that its config does not know, such as '{min(unknown)}'."
        )
