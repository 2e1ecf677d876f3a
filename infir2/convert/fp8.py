"""Block-wise FP8 Hugging Face directories: BF16 to FP8 and back.

For each Linear of the decoder layers, an FP8 directory stores `weight` (E4M3 codes of the
BF16-rounded master in 128x128 blocks) and `weight_scale_inv` (FP32 dequantization multipliers, one
per block). All other tensors are BF16. Both directions stream tensor by tensor.
"""

import json
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infir2.config.schema import Fp8Section
from infir2.convert.hf import complete_config, write_with_progress
from infir2.convert.selfcheck import check_export
from infir2.convert.serving import as_patterns, unservable_layers, unservable_sentence
from infir2.convert.stop_tokens import with_stop_tokens
from infir2.convert.weights import (
    BLOCK,
    Weights,
    file_scale_format,
    hf_weights,
    meta_decoder,
    quantized_names,
    run_weights,
)
from infir2.directories import publish, remove_leftovers, require_absent
from infir2.errors import CheckpointError, ConfigError
from infir2.files import disk_errors
from infir2.model.hf_names import SCALE_SUFFIX, quantization_config
from infir2.model.safetensors_io import SCALES_FILE, HfWeights
from infir2.numerics import Fp8Tensor, quantize


def export_fp8(
    src: str | Path,
    out: str | Path,
    scale_format: str | None = None,
    skip_modules: Iterable[str] | None = None,
    servable: bool = False,
) -> list[str]:
    """Quantize a run or a BF16 (or FP32) directory to block-wise FP8 and check the result.

    The self-check reads the files with an independent reader and compares every value with its
    source. For small models it also compares the logits of transformers with those of our decoder.

    Args:
        src: Hugging Face directory that is not quantized, run directory, or `checkpoints/step-N`.
        out: directory to create.
        scale_format: "pow2" or "fp32"; None is the run's `fp8.scale_format`, or "pow2".
        skip_modules: patterns of module names whose weights stay in BF16; None is the run's
            `fp8.skip_modules`, or no pattern.
        servable: also keep the layers in BF16 that inference servers refuse in FP8.

    Returns:
        One sentence per check: what it proved, or why it was skipped. If servers refuse some
        layers, the first sentence names them.

    Raises:
        OutputExistsError: `out` exists.
        CheckpointError: `src` is quantized, incomplete or not finite. Nothing is left at `out`.
        ConfigError: a pattern matches no module, or no layer is left in FP8. Nothing is left at
            `out`.
        CheckFailedError: the written files differ from their source; they are set aside under
            another name.
    """
    src, out = Path(src), Path(out)
    is_hf = (src / "config.json").is_file()
    weights = hf_weights(src, quantized=False) if is_hf else with_stop_tokens(run_weights(src))
    fp8, findings = _layers(weights, _fp8_section(weights, scale_format, skip_modules), servable)
    names = set(quantized_names(weights.config, fp8))
    config = _fp8_config(weights, fp8)
    scales = _imported_scales(src, fp8.scale_format)
    tensors = _fp8_tensors(weights, names, fp8.scale_format, scales)
    require_absent(out)
    remove_leftovers(out)
    unverified = out.with_name(f"{out.name}.unverified-{secrets.token_hex(3)}")
    write_with_progress(weights, unverified, tensors, config, "quantizing")
    findings += check_export(weights, unverified, names, out)
    with disk_errors(f"{unverified}: is verified, but cannot be renamed to {out}"):
        publish(unverified, out)
    return findings


def _fp8_config(weights: Weights, fp8: Fp8Section) -> dict[str, Any]:
    """The `config.json` of an export.

    Its scale_fmt "ue8m0" declares that scales are powers of two (stored as FP32, as in
    DeepSeek-V3.1). Inference engines then use power-of-two scales for activations too, as training
    does.
    """
    declared = quantization_config(meta_decoder(weights.config, fp8))
    return complete_config(weights.config) | {"quantization_config": declared}


def _fp8_section(
    weights: Weights, scale_format: str | None, skip_modules: Iterable[str] | None
) -> Fp8Section:
    """The run's section, or the default one, with the arguments that are not None."""
    section = weights.fp8 or Fp8Section()
    patterns = section.skip_modules if skip_modules is None else tuple(skip_modules)
    chosen = {"scale_format": scale_format or section.scale_format, "skip_modules": patterns}
    return Fp8Section.model_validate(chosen)


def _layers(weights: Weights, fp8: Fp8Section, servable: bool) -> tuple[Fp8Section, list[str]]:
    """(section of the export, sentences about the layers that servers refuse)."""
    refused = unservable_layers(weights.config, fp8)
    if not refused:
        return fp8, []
    patterns = as_patterns(weights.config, fp8, refused)
    if not servable:
        return fp8, [unservable_sentence(refused, patterns) + " --servable keeps them in BF16."]
    if len(refused) == len(quantized_names(weights.config, fp8)):
        raise ConfigError(
            f"{weights.origin}: no FP8 layer of this model can be served"
            f" ({', '.join(patterns)}): their sizes are no multiples of 128; export it in BF16."
        )
    kept = fp8.model_copy(update={"skip_modules": (*fp8.skip_modules, *patterns)})
    return kept, [
        f"{len(refused)} layers kept in BF16 for inference servers: {', '.join(patterns)};"
        f" RL with this export needs fp8.skip_modules = {json.dumps(kept.skip_modules)}."
    ]


def import_fp8(src: str | Path, out: str | Path) -> None:
    """Dequantize a block-wise FP8 Hugging Face directory to a BF16 one.

    Power-of-two scales change no value. `out` then keeps the scales in a side file, from which
    `export_fp8` restores the same bytes. Without it, a block whose largest code is 224 = 448 / 2
    would come back with half the scale and doubled codes.

    Args:
        src: FP8 Hugging Face directory with 128x128 blocks.
        out: directory to create.

    Raises:
        OutputExistsError: `out` exists.
        CheckpointError: `src` is not block-wise FP8, or a tensor is missing, misshapen or not
            finite.
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
    config = complete_config(weights.config)
    write_with_progress(weights, Path(out), weights.bf16(), config, "dequantizing", scales)


def _imported_scales(src: Path, scale_format: str) -> dict[str, Tensor]:
    """The scales that `import_fp8` stored beside the weights; empty unless they are of use.

    Raises CheckpointError for a damaged file.
    """
    if scale_format != "pow2" or not (src / SCALES_FILE).is_file():
        return {}
    try:
        return load_file(src / SCALES_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{src / SCALES_FILE}: is not readable ({error});"
            " remove it, the values will not change."
        ) from error


def _fp8_tensors(
    weights: Weights, names: set[str], scale_format: str, scales: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.bf16():
        if name not in names:
            yield name, tensor
            continue
        quantized = _quantize(tensor, scales.get(name + SCALE_SUFFIX), scale_format)
        yield name, quantized.codes
        yield name + SCALE_SUFFIX, quantized.scale


def _quantize(tensor: Tensor, imported_scale: Tensor | None, scale_format: str) -> Fp8Tensor:
    """Quantize `tensor` [N, K], keeping its imported scale if every value is exact under it."""
    computed = quantize(tensor, BLOCK, scale_format)
    if imported_scale is None or imported_scale.shape != computed.scale.shape:
        return computed
    if not bool((imported_scale.isfinite() & (imported_scale > 0)).all()):
        return computed
    rows, columns = tensor.shape
    block_rows = imported_scale.repeat_interleave(128, 0)[:rows]
    multipliers = block_rows.repeat_interleave(128, 1)[:, :columns]
    codes = (tensor.float() / multipliers).clamp(-448, 448).to(torch.float8_e4m3fn)
    exact = torch.equal(codes.float() * multipliers, tensor.float())
    return Fp8Tensor(codes, imported_scale, BLOCK, "pow2") if exact else computed
