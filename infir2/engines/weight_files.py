"""New weights for an engine, from an exported directory: the same model's, or none."""

from pathlib import Path

from torch import Tensor

from infir2.errors import CheckpointError
from infir2.model import Decoder, ModelConfig
from infir2.model.hf_names import SCALE_SUFFIX, checked_scale, exported_fp8_weights
from infir2.model.safetensors_io import HfWeights, read_json


def read_weights(model: Decoder, scale_format: str | None, directory: Path) -> dict[str, Tensor]:
    """The tensors of an exported Hugging Face directory, by name.

    Raises CheckpointError for a directory of another model than `model`, whose FP8 layers have
    `scale_format`: names, shapes, dtypes, scale format or config.json differ, or a value is none
    that a weight can have.
    """
    _check_config(model, scale_format, directory)
    tensors = dict(HfWeights(directory))
    _check_tensors(dict(exported_fp8_weights(model)), tensors, directory)
    return tensors


def _check_config(model: Decoder, scale_format: str | None, directory: Path) -> None:
    raw = read_json(directory / "config.json")
    section, found = raw.get("quantization_config"), None
    if section is not None:
        is_pow2 = isinstance(section, dict) and section.get("scale_fmt") == "ue8m0"
        found = "pow2" if is_pow2 else "fp32"
    if found != scale_format or ModelConfig.from_hf(raw) != model.config:
        raise CheckpointError(f"{directory}: its config.json is not that of the served model")


def _check_tensors(old: dict[str, Tensor], new: dict[str, Tensor], directory: Path) -> None:
    for name in sorted(old.keys() ^ new.keys()):
        owner = "the directory" if name in old else "the served model"
        raise CheckpointError(f"{directory}: {owner} has no tensor {name}")
    for name, tensor in new.items():
        kinds = [f"{each.dtype} {list(each.shape)}" for each in (tensor, old[name])]
        if kinds[0] != kinds[1]:
            raise CheckpointError(
                f"{directory}: tensor {name} is {kinds[0]}, and the served model has {kinds[1]}"
            )
        scale = new.get(name + SCALE_SUFFIX)
        if scale is not None:
            checked_scale(name, tensor, scale)
        elif not name.endswith(SCALE_SUFFIX) and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{directory}: tensor {name} has values that are not finite")
