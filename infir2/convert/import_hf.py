"""Models that transformers can load and we do not read ourselves (GGUF, pickled or FP16 directories), as BF16 Hugging Face directories."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infir2.convert.export import SHARD_BYTES, complete_config, write_with_progress
from infir2.convert.weights import hf_weights
from infir2.errors import CheckpointError, OutputExistsError, first_line
from infir2.model import Decoder, ModelConfig
from infir2.model.hf_names import exported_weights, load_weights
from infir2.model.safetensors_io import read_json, write_hf


def import_hf(src: str | Path, out: str | Path) -> None:
    """Load `src`, a model directory or a .gguf file, with transformers, and write weights (BF16), configuration and tokenizer to `out`.

    No code of the model's runs (`trust_remote_code` stays off). Raises CheckpointError for what transformers cannot load
    or our decoder does not implement, OutputExistsError. A directory of safetensors is streamed; for the rest, transformers
    holds the whole model in memory.
    """
    src, out = Path(src), Path(out)
    if out.exists():
        raise OutputExistsError(f"{out} already exists; remove it or choose another output")
    if not src.exists():
        raise CheckpointError(f"{src} does not exist; give a model directory or a .gguf file")
    if (
        (src / "config.json").is_file()
        and list(src.glob("*.safetensors"))
        and "quantization_config" not in read_json(src / "config.json")
    ):
        weights = hf_weights(src, quantized=False)  # ours to read, tensor by tensor
        write_with_progress(
            weights, out, weights.bf16(), complete_config(weights.config), "importing"
        )
        return
    directory, options = (
        (src.parent, {"gguf_file": src.name}) if src.suffix == ".gguf" else (src, {})
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, **options)
        theirs = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, dtype=torch.bfloat16, **options
        )
    except ImportError as error:
        raise CheckpointError(
            f"{src}: transformers needs another package to read this: {first_line(error)}"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{src}: transformers cannot load it: {first_line(error)}") from error
    config = theirs.config.to_dict()
    config.pop("quantization_config", None)  # transformers has dequantised
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_hf(config))
    load_weights(model, _tensors(theirs), "cpu")
    with tempfile.TemporaryDirectory() as side_files:
        tokenizer.save_pretrained(side_files)
        with contextlib.suppress(OSError, ValueError):  # a model without generation settings
            theirs.generation_config.save_pretrained(side_files)
        write_hf(out, exported_weights(model), model.config.to_hf(), side_files, SHARD_BYTES)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ())
        if model.config.tie_word_embeddings
        else set()
    )
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)
