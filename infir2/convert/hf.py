"""A run's weights as a BF16 Hugging Face directory, and what all Hugging Face writers share.

Conversions stream: memory holds one shard of the output and one tensor of the input.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infir2.convert.stop_tokens import with_stop_tokens
from infir2.convert.weights import Weights, run_weights
from infir2.model import ModelConfig
from infir2.model.safetensors_io import write_hf
from infir2.terminal import byte_progress

SHARD_BYTES = 2**30  # the writer holds one shard in memory


def export_hf(src: str | Path, out: str | Path) -> None:
    """Write a run's weights as a BF16 Hugging Face directory.

    Args:
        src: run directory (its newest checkpoint) or `checkpoints/step-N`.
        out: directory to create; after an error it does not exist.

    Raises:
        OutputExistsError: `out` exists.
        CheckpointError: a weight is missing, misshapen or not finite.
    """
    weights = with_stop_tokens(run_weights(Path(src)))
    config = complete_config(weights.config)
    write_with_progress(weights, Path(out), weights.bf16(), config, "exporting")


def complete_config(config: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    """`config` with its dtype and RoPE settings under the keys of both major transformers versions.

    transformers 4, vLLM and SGLang read `torch_dtype`, `rope_theta` and `rope_scaling`;
    transformers 5 reads `dtype` and `rope_parameters`. Keys that do not apply to the new files are
    left out: `quantization_config`, and `auto_map`, which names code that is not copied.
    """
    written = ModelConfig.from_hf(config).to_hf(dtype)
    keys = ("dtype", "torch_dtype", "rope_theta", "rope_parameters", "rope_scaling")
    kept = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    return kept | {key: written[key] for key in keys}


def write_with_progress(
    weights: Weights,
    out: Path,
    tensors: Iterator[tuple[str, Tensor]],
    config: dict[str, Any],
    action: str,
    scales: dict[str, Tensor] | None = None,
) -> None:
    """Write `tensors` and the side files of `weights` to `out`, under a progress bar.

    Args:
        action: first word of the bar's label.
        scales: scales to store beside the weights, for a later `export_fp8`.

    Raises:
        OutputExistsError: `out` exists.
    """
    with byte_progress(f"{action} {weights.origin.name}", weights.num_bf16_bytes) as on_bytes:
        stream = _report_bytes(tensors, on_bytes)
        write_hf(
            out, stream, config, weights.side_files, SHARD_BYTES, scales, weights.changed_files
        )


def _report_bytes(
    tensors: Iterator[tuple[str, Tensor]], on_bytes: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        # The total counts two bytes per weight, so the FP32 scales of FP8 weights are left out.
        if tensor.dtype != torch.float32:
            on_bytes(2 * tensor.numel())
