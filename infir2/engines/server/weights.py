"""New weights for a running engine, from an exported directory."""

from pathlib import Path

from torch import Tensor

from infir2.engines.native import NativeEngine
from infir2.errors import CheckpointError
from infir2.model import ModelConfig
from infir2.model.hf_names import SCALE_SUFFIX, checked_scale, exported_fp8_weights
from infir2.model.safetensors_io import HfWeights, read_json


def update_from_directory(engine: NativeEngine, directory: Path, policy_version: int) -> None:
    """Replace the engine's weights by those of an exported Hugging Face directory.

    No request may be unfinished. Raises CheckpointError, and keeps the old weights, for a directory
    of another model: names, shapes, dtypes, scale format or config.json differ, or a value is none
    that a weight can have.
    """
    _check_config(engine, directory)
    tensors = dict(HfWeights(directory))
    _check_tensors(dict(exported_fp8_weights(engine.model)), tensors, directory)
    engine.update_weights(tensors.items(), policy_version)


def _check_config(engine: NativeEngine, directory: Path) -> None:
    raw = read_json(directory / "config.json")
    section = raw.get("quantization_config")
    scale_format = None
    if section is not None:
        is_pow2 = isinstance(section, dict) and section.get("scale_fmt") == "ue8m0"
        scale_format = "pow2" if is_pow2 else "fp32"
    if scale_format != engine.scale_format or ModelConfig.from_hf(raw) != engine.model.config:
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
