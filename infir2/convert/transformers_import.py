"""Models that transformers loads and our readers do not, as BF16 Hugging Face directories.

These are GGUF files, pickled (`.bin`) directories, and directories in another quantization.
"""

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from infir2.convert.gguf_header import check_gguf_header
from infir2.convert.hf import SHARD_BYTES, complete_config, write_with_progress
from infir2.convert.weights import hf_weights
from infir2.data.tokenizer_files import check_tokenizer_files, library_errors
from infir2.errors import CheckpointError, OutputExistsError, first_line
from infir2.model import Decoder, ModelConfig
from infir2.model.config import Architecture
from infir2.model.hf_names import exported_weights, load_weights
from infir2.model.memory import require_memory
from infir2.model.safetensors_io import read_config, read_json, write_hf
from infir2.terminal import begin_phase

_OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def import_hf(src: str | Path, out: str | Path) -> None:
    """Write the model at `src` as a BF16 Hugging Face directory with configuration and tokenizer.

    An unquantized directory of safetensors is streamed. Everything else is loaded by transformers,
    which holds the full model in memory. `trust_remote_code` stays off, so no code of the model is
    executed.

    Args:
        src: model directory or .gguf file.
        out: directory to create.

    Raises:
        OutputExistsError: `out` exists.
        CheckpointError: transformers cannot load `src`, or our decoder does not implement its
            architecture.
    """
    src, out = Path(src), Path(out)
    if out.exists():
        raise OutputExistsError(f"{out} already exists; remove it or choose another output")
    if not src.exists():
        raise CheckpointError(f"{src} does not exist; give a model directory or a .gguf file")
    if _is_plain_safetensors(src):
        weights = hf_weights(src, quantized=False)
        config = complete_config(weights.config)
        write_with_progress(weights, out, weights.bf16(), config, "importing")
        return
    source, tokenizer = _load_with_transformers(src)
    config = source.config.to_dict()
    config.pop("quantization_config", None)  # transformers has dequantized the weights
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_hf(config))
    load_weights(decoder, _named_weights(source), "cpu")
    with tempfile.TemporaryDirectory() as side_files:
        tokenizer.save_pretrained(side_files)
        with contextlib.suppress(OSError, ValueError):  # the model has no generation settings
            source.generation_config.save_pretrained(side_files)
        write_hf(out, exported_weights(decoder), decoder.config.to_hf(), side_files, SHARD_BYTES)


def _is_plain_safetensors(src: Path) -> bool:
    config = src / "config.json"
    if not config.is_file() or not list(src.glob("*.safetensors")):
        return False
    return "quantization_config" not in read_json(config)


def _load_with_transformers(src: Path) -> tuple[Any, Any]:
    """(model in BF16, tokenizer) from a directory or a .gguf file; raises CheckpointError."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    directory, options = src, dict[str, Any](_OFFLINE)
    if src.suffix == ".gguf":
        _require_gguf_packages(src)
        check_gguf_header(src)
        directory, options = src.parent, {**_OFFLINE, "gguf_file": src.name}
    else:  # absurd sizes would keep transformers busy for ever
        _require_known_model(src)
        if (src / "tokenizer.json").exists():
            check_tokenizer_files(src)
    begin_phase(f"reading {src.name} with transformers")
    with _transformers_errors(src), _no_stdin():
        config = AutoConfig.from_pretrained(directory, **options)
    # refuse it before its weights are read, in BF16
    require_memory(2 * ModelConfig.from_hf(config.to_dict()).num_parameters)
    with _transformers_errors(src), _no_stdin():
        with library_errors(src):
            tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options)
    return model, tokenizer


def _require_known_model(src: Path) -> None:
    raw = read_json(src / "config.json") if (src / "config.json").exists() else {}
    if "auto_map" in raw and raw.get("model_type") not in get_args(Architecture):
        raise CheckpointError(
            f"{src}: its config.json asks for code of the model's own, which is never run; "
            "use a model that transformers itself implements"
        )
    read_config(src)


def _loading_problem(error: Exception) -> str:
    """Of a file of pickles that needs code, torch says how to run that code; we do not."""
    if "weights_only" in str(error):
        return (
            "its pickled weights (.bin, .pt) are damaged, or would have to run code, which is "
            "refused; get the model as safetensors"
        )
    return f"transformers cannot load it: {first_line(error)}; copy the model again"


@contextlib.contextmanager
def _transformers_errors(src: Path) -> Iterator[None]:
    """Whatever transformers raises as a CheckpointError: any line of it can meet bad files.

    Its warnings, such as for settings that a GGUF file lacks, are not shown.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except ImportError as error:
        raise CheckpointError(
            f"{src}: transformers needs another package to read this: {first_line(error)}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{src}: {_loading_problem(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _require_gguf_packages(src: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise CheckpointError(
            f"{src}: transformers reads GGUF files with the packages gguf and accelerate; "
            f"run `pip install {' '.join(missing)}`"
        )


@contextlib.contextmanager
def _no_stdin() -> Iterator[None]:
    """A library that asks a question gets no answer, and the user's terminal is not read."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


def _named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Named weights of a transformers model, without the ones tied to another weight."""
    tied = set()
    if model.config.tie_word_embeddings:
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)
