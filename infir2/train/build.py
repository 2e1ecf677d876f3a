"""Build the model that a recipe names: a new one, a Hugging Face model, or a run's weights."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from infir2.checkpoint import open_checkpoint
from infir2.checkpoint.fingerprint import is_run
from infir2.config.paths import check_model_directory, check_tokenizer_directory
from infir2.config.rl_section import template_variables
from infir2.config.schema import DataSection, Fp8Section, ModelSection, RunSection
from infir2.convert.weights import tokenizer_directory
from infir2.data import ChatTokenizer
from infir2.errors import ConfigError
from infir2.model import Decoder, ModelConfig
from infir2.model.memory import require_memory
from infir2.numerics import SavedActivations, convert_to_fp8
from infir2.parallel.parallel_model import single_process
from infir2.terminal import begin_phase
from infir2.train.plan import (
    check_vocabulary,
    device_of,
    planned_config,
    refuse_torch_dist,
    saved_config,
)
from infir2.train.trainer import load_parameters

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def reuse_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation.

    Fresh pages cost a CPU run 5-15 % of its time (docs/LOG.md). Does nothing without mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 1 << 26)


def build_model(
    model: ModelSection, fp8: Fp8Section, run: RunSection, vocab_size: int, resumed: bool = False
) -> Decoder:
    """FP32 masters on the run's device, with FP8 Linears where the recipe enables them.

    With `resumed`, the caller fills the masters from the checkpoint that `model` names
    (`resumed_model`): they are not initialized, and take no memory on a CPU until then.
    Raises ConfigError and CheckpointError.
    """
    begin_phase("loading the model")
    check_vocabulary(planned_config(model, vocab_size), vocab_size)
    device = device_of(run)
    if device.type == "cpu":
        reuse_freed_memory()
    decoder = _decoder(model, run, vocab_size, resumed)
    decoder.recompute = "full" if model.recompute == "full" else "none"
    decoder.saved_activations = SavedActivations(
        recompute="selective" if model.recompute == "selective" else "none",
        pre_activations="fp8" if model.pre_activation_dtype == "fp8" else "bf16",
        keep_transposed_weights=fp8.caches_transposed(model),
    )
    decoder = decoder.to(device)
    return convert_to_fp8(decoder, fp8.scale_format, fp8.skip_modules) if fp8.enabled else decoder


def _decoder(model: ModelSection, run: RunSection, vocab_size: int, resumed: bool) -> Decoder:
    dtype = getattr(torch, model.compute_dtype)
    if resumed:
        return _empty_decoder(planned_config(model, vocab_size), dtype, device_of(run))
    if model.shape is not None:
        vocab_size = model.shape.vocab_size or vocab_size
        return Decoder.from_shape(model.shape, vocab_size, seed=run.seed, compute_dtype=dtype)
    if not is_run(Path(model.path)):
        return Decoder.from_hf(Path(model.path), compute_dtype=dtype)
    checkpoint = open_checkpoint(Path(model.path))
    config = saved_config(checkpoint.state, checkpoint.path)
    require_memory(4 * config.num_parameters)
    decoder = _empty_decoder(config, dtype, torch.device("cpu"))
    load_parameters(decoder, checkpoint.tensors(), single_process(decoder).shard_specs)
    return decoder


def _empty_decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    with torch.device("meta"):  # its weights are overwritten: do not initialize them
        decoder = Decoder(config, compute_dtype=dtype)
    return decoder.to_empty(device=device)


def open_tokenizer(
    model: ModelSection,
    data: DataSection | None = None,
    today: str = "",
    template_options: Sequence[str] = (),
) -> ChatTokenizer:
    """The tokenizer of `data.tokenizer` if that is set, else the model's own.

    Its chat template writes the date `model.template_date`, else that of the run which made the
    model (a run that resumes is its own model), else `today`. Raises ConfigError for a directory
    that does not exist, the model's first.
    """
    begin_phase("loading the tokenizer")
    data = data or DataSection()
    if model.shape is None:
        check_model_directory("model.path", model.path)
    refuse_torch_dist(Path(model.path))
    path = Path(data.tokenizer or model.path)
    _check_tokenizer_directory(path, bool(data.tokenizer))
    written = model.template_date or today
    if model.path and is_run(Path(model.path)):
        run = open_checkpoint(model.path, sizes_only=True)
        path = path if data.tokenizer else tokenizer_directory(run)
        if not model.template_date and "template_date" in run.state:
            written = run.value("template_date", str)
    variables = template_variables(template_options)
    return ChatTokenizer(path, data.document_bos, written, variables)


def _check_tokenizer_directory(path: Path, configured: bool) -> None:
    """Raise ConfigError unless `path` can hold the tokenizer, or is a run that names one."""
    if not path.is_dir():
        check_tokenizer_directory("data.tokenizer", path)
    if not configured and not is_run(path) and not (path / "tokenizer.json").is_file():
        raise ConfigError(
            f"model.path: {path} is not a run directory and has no tokenizer.json; name a model's "
            "directory with its tokenizer, or set data.tokenizer if the command trains."
        )
