"""Weights out and back in: a run to Hugging Face BF16, BF16 to block-wise FP8, FP8 to BF16.

An FP8 export holds, for each Linear of the decoder layers, `weight` (E4M3, 128x128 blocks of the BF16-rounded master)
and `weight_scale_inv` (FP32, the dequantisation multiplier); all else is BF16. Memory holds one shard and one tensor.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infir2.config.schema import Fp8Section
from infir2.convert.selfcheck import check_export
from infir2.convert.weights import (
    BLOCK,
    Weights,
    file_scale_format,
    hf_weights,
    meta_decoder,
    quantized_names,
    run_weights,
)
from infir2.errors import CheckpointError
from infir2.model import ModelConfig
from infir2.model.hf_names import SCALE_SUFFIX, quantization_config
from infir2.model.safetensors_io import SCALES_FILE, HfWeights, write_hf
from infir2.numerics import Fp8Tensor, quantize
from infir2.terminal import byte_progress

SHARD_BYTES = 2**30  # a shard is gathered in memory before it is written

Say = Callable[[str], None]


def export_hf(src: str | Path, out: str | Path) -> None:
    """Write a run's weights (run directory or `checkpoints/step-N`) as a BF16 Hugging Face directory.

    Raises OutputExistsError if `out` exists, CheckpointError for a missing, misshapen or non-finite weight; in both
    cases nothing is left at `out`.
    """
    weights = run_weights(Path(src))
    write_with_progress(
        weights, Path(out), weights.bf16(), complete_config(weights.config), "exporting"
    )


def export_fp8(
    src: str | Path,
    out: str | Path,
    scale_format: str = "pow2",
    skip_modules: Iterable[str] = (),
    say: Say = print,
) -> None:
    """Quantise a BF16 (or FP32) Hugging Face directory to block-wise FP8, then prove the result by reading it back.

    scale_format: "pow2" or "fp32", as in training. skip_modules: patterns of module names kept in BF16.
    The self-check reads the files with an independent reader and holds every value against its source; for small models
    it also compares transformers with our decoder. `say` hears what was checked and what was not.
    Raises OutputExistsError, CheckpointError (bad source) or ConfigError (pattern that matches nothing) before anything
    stays at `out`, and CheckFailedError if the written files do not hold what they should.
    """
    out = Path(out)
    weights = hf_weights(Path(src), quantized=False)
    fp8 = Fp8Section(scale_format=scale_format, skip_modules=tuple(skip_modules))  # type: ignore[arg-type]
    names = set(quantized_names(weights.config, fp8))
    # scale_fmt "ue8m0" says that scales are powers of two (stored as FP32, as DeepSeek-V3.1 does): engines then use such
    # scales for activations too, as training does.
    section = quantization_config(meta_decoder(weights.config, fp8))
    config = complete_config(weights.config) | {"quantization_config": section}
    tensors = _fp8_tensors(weights, names, scale_format, _imported_scales(Path(src), scale_format))
    write_with_progress(weights, out, tensors, config, "quantising")
    check_export(weights, out, names, say)


def import_fp8(src: str | Path, out: str | Path) -> None:
    """Write a block-wise FP8 Hugging Face directory as a BF16 one.

    With power-of-two scales no value changes, and `out` keeps the scales in a side file, from which `export_fp8` makes the
    same bytes again: a block whose largest code is 224 would otherwise come back with half its scale and twice its codes.
    """
    src = Path(src)
    is_pow2 = file_scale_format(src) == "pow2"
    weights = hf_weights(src, quantized=True)
    files = HfWeights(src)
    scales = {
        name: files.read(name).float()
        for name in files.names()
        if is_pow2 and name.endswith(SCALE_SUFFIX)
    }
    write_with_progress(
        weights, Path(out), weights.bf16(), complete_config(weights.config), "dequantising", scales
    )


def complete_config(config: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    """The config with its dtype and rope settings under the keys of transformers 4 (vLLM, SGLang) and 5."""
    written = ModelConfig.from_hf(config).to_hf(dtype)
    return config | {
        key: written[key]
        for key in ("dtype", "torch_dtype", "rope_theta", "rope_parameters", "rope_scaling")
    }


def _imported_scales(src: Path, scale_format: str) -> dict[str, Tensor]:
    """Scales that `import_fp8` left beside the weights, of use for pow2 only; CheckpointError for a damaged file."""
    if scale_format != "pow2" or not (src / SCALES_FILE).is_file():
        return {}
    try:
        return load_file(src / SCALES_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{src / SCALES_FILE}: is not readable ({error}); remove it, values will not change."
        ) from error


def _quantized(tensor: Tensor, scale: Tensor | None, scale_format: str) -> Fp8Tensor:
    """`tensor` [N, K] in FP8: at the `scale` it was imported with where that holds every value exactly, else by the rule."""
    ours = quantize(tensor, BLOCK, scale_format)
    if (
        scale is None
        or scale.shape != ours.scale.shape
        or not bool((scale.isfinite() & (scale > 0)).all())
    ):
        return ours
    steps = scale.repeat_interleave(128, 0)[: tensor.shape[0]].repeat_interleave(128, 1)[
        :, : tensor.shape[1]
    ]
    codes = (tensor.float() / steps).clamp(-448, 448).to(torch.float8_e4m3fn)
    exact = torch.equal(codes.float() * steps, tensor.float())
    return Fp8Tensor(codes, scale, BLOCK, "pow2") if exact else ours


def _fp8_tensors(
    weights: Weights, names: set[str], scale_format: str, scales: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.bf16():
        if name not in names:
            yield name, tensor
            continue
        quantized = _quantized(tensor, scales.get(name + SCALE_SUFFIX), scale_format)
        yield name, quantized.codes
        yield name + SCALE_SUFFIX, quantized.scale


def write_with_progress(
    weights: Weights,
    out: Path,
    tensors: Iterator[tuple[str, Tensor]],
    config: dict[str, Any],
    doing: str,
    scales: dict[str, Tensor] | None = None,
) -> None:
    """`write_hf` under a progress bar that says `doing`. Raises OutputExistsError."""
    with byte_progress(f"{doing} {out.name}", weights.num_bf16_bytes) as on_bytes:
        write_hf(out, _counted(tensors, on_bytes), config, weights.side_files, SHARD_BYTES, scales)


def _counted(
    tensors: Iterator[tuple[str, Tensor]], on_bytes: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        if tensor.dtype != torch.float32:  # scales come on top of the weight they belong to
            on_bytes(2 * tensor.numel())
