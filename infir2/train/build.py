"""The model a recipe names: made new, from a Hugging Face directory, or from a run's newest checkpoint."""

import ctypes
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint import Checkpoint, open_checkpoint
from infir2.checkpoint.store import read_state
from infir2.config.schema import Fp8Section, ModelSection, RunSection
from infir2.data import ChatTokenizer
from infir2.errors import CheckpointError, ConfigError
from infir2.model import Decoder, ModelConfig
from infir2.model.safetensors_io import read_json
from infir2.numerics import SavedActivations, convert_to_fp8
from infir2.parallel.parallel_model import single_process
from infir2.train.trainer import load_parameters

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def reuse_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation: fresh pages cost a CPU run 5-15 % of its time (docs/LOG.md).

    Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    for parameter, value in (
        (_M_MMAP_THRESHOLD, 1 << 30),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 1 << 26),
    ):
        mallopt(parameter, value)


def device_of(section: RunSection) -> torch.device:
    """The device a recipe asks for; `auto` is a GPU if torch sees one."""
    if section.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if section.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device is cuda, but torch sees no GPU: set run.device = 'cpu' or check the driver"
        )
    return torch.device(section.device)


def is_run(path: Path) -> bool:
    """True for a run directory or one of its checkpoints, False for a Hugging Face directory."""
    return (path / "checkpoints").is_dir() or (path / "manifest.json").is_file()


def planned_config(model: ModelSection, vocab_size: int = 1) -> ModelConfig:
    """The shape of the model that a recipe names, from headers alone; `vocab_size`: of the tokenizer, for a new model."""
    if model.shape is not None:
        return ModelConfig.from_shape(model.shape, vocab_size=model.shape.vocab_size or vocab_size)
    path = Path(model.path)
    return (
        _saved_config(read_state(path), path)
        if is_run(path)
        else ModelConfig.from_hf(read_json(path / "config.json"))
    )


def _saved_config(state: Mapping[str, Any], origin: Path) -> ModelConfig:
    if not isinstance(state.get("model_config"), dict):
        raise CheckpointError(
            f"{origin}: its state has no 'model_config'; it was not saved by a training run."
        )
    return ModelConfig.from_hf(state["model_config"])


def resumed_model(model: ModelSection, checkpoint: Checkpoint | None) -> ModelSection:
    """The model section of a run that goes on from `checkpoint`: the checkpoint itself. What the run began with need not be there.

    ConfigError when model.shape is another than the checkpoint's: no option makes its tensors fit.
    """
    if checkpoint is None:
        return model
    config = _saved_config(checkpoint.state, checkpoint.path)
    if model.shape is not None:
        asked = ModelConfig.from_shape(model.shape, model.shape.vocab_size or config.vocab_size)
        for name in (
            field.name for field in fields(config) if not field.name.endswith("_token_id")
        ):
            if getattr(asked, name) != getattr(config, name):
                raise ConfigError(
                    f"model.shape makes {name} = {getattr(asked, name)}, and {checkpoint.path} has {getattr(config, name)}; "
                    "restore the value, or name a new run.dir."
                )
    return model.model_copy(update={"path": str(checkpoint.path), "shape": None})


def build_model(
    model: ModelSection, fp8: Fp8Section, run: RunSection, vocab_size: int, resumed: bool = False
) -> Decoder:
    """FP32 masters on the run's device, FP8 Linears where the recipe wants them. Errors: ConfigError, CheckpointError.

    `resumed`: the caller fills the masters, or its part of them, from the checkpoint that `model` names (`resumed_model`): they are
    neither drawn nor read, and take no memory on a CPU until then.
    """
    dtype = getattr(torch, model.compute_dtype)
    if device_of(run).type == "cpu":
        reuse_freed_memory()
    if resumed:
        decoder = _empty_decoder(planned_config(model, vocab_size), dtype, device_of(run))
    elif model.shape is not None:
        decoder = Decoder.from_shape(
            model.shape,
            vocab_size=model.shape.vocab_size or vocab_size,
            seed=run.seed,
            compute_dtype=dtype,
        )
    elif is_run(Path(model.path)):
        checkpoint = open_checkpoint(Path(model.path))
        decoder = _empty_decoder(
            _saved_config(checkpoint.state, checkpoint.path), dtype, torch.device("cpu")
        )
        load_parameters(decoder, checkpoint.tensors(), single_process(decoder).shard_specs)
    else:
        decoder = Decoder.from_hf(Path(model.path), compute_dtype=dtype)
    decoder.recompute = "full" if model.recompute == "full" else "none"
    decoder.saved_activations = SavedActivations(
        recompute="selective" if model.recompute == "selective" else "none",
        pre_activations="fp8" if model.pre_activation_dtype == "fp8" else "bf16",
        keep_transposed_weights=fp8.keep_transposed,
    )
    decoder = decoder.to(device_of(run))
    if not fp8.enabled:
        return decoder
    return convert_to_fp8(decoder, fp8.scale_format, fp8.skip_modules)


def _empty_decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    with torch.device("meta"):  # no time for an initialisation that is overwritten
        decoder = Decoder(config, compute_dtype=dtype)
    return decoder.to_empty(device=device)


def open_tokenizer(model: ModelSection, configured: str = "") -> tuple[ChatTokenizer, Path]:
    """data.tokenizer if set, else the tokenizer the model came with; and its directory."""
    path = Path(configured or model.path)
    directory = Path(read_state(path)["tokenizer_dir"]) if not configured and is_run(path) else path
    return ChatTokenizer(directory), directory
