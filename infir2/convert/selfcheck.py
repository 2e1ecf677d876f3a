"""The self-check at the end of an FP8 export.

It reads the files back without our reader and our quantizer.

1. Every tensor: the names match the config, BF16 tensors are bit-equal, and FP8 values are within
   half a step of their source.
2. Small models: transformers and our decoder, given the dequantized weights, agree on logits and
   greedy tokens, and transformers' own FP8 loader reads the same values. The loader is tried only
   where it works: its CPU path gets the block size wrong for a matrix with a size above 128 that is
   no multiple of 128.
"""

import importlib.util
import json
import os
import secrets
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from infir2.convert.weights import Weights, compare_names
from infir2.errors import CheckFailedError, UserError, first_line
from infir2.model import Decoder, ModelConfig
from infir2.model.hf_names import SCALE_SUFFIX, load_weights
from infir2.model.safetensors_io import read_json
from infir2.terminal import begin_phase, byte_progress

SMALL_MODEL_PARAMETERS = 20_000_000
GREEDY_TOKENS = 16
_SLAB_ROWS = 1024  # a multiple of 128; bounds the memory of the comparison

# Value of each of the 256 E4M3 codes: sign, 4 exponent bits (bias 7), 3 mantissa bits. Exponent 0
# is subnormal, and 0x7F and 0xFF are NaN.
_CODE = np.arange(256)
_EXPONENT, _MANTISSA = (_CODE >> 3) & 15, _CODE & 7
_MAGNITUDE = np.where(
    _EXPONENT == 0, _MANTISSA / 8 * 2.0**-6, (1 + _MANTISSA / 8) * 2.0 ** (_EXPONENT - 7.0)
)
E4M3_VALUES = np.where(_CODE & 127 == 127, np.nan, np.where(_CODE & 128, -_MAGNITUDE, _MAGNITUDE))


def check_export(weights: Weights, directory: Path, quantized: set[str], out: Path) -> list[str]:
    """Check that the FP8 directory `directory` stores `weights`.

    Args:
        quantized: names of the weights that are FP8.
        out: the name that the directory gets when it has passed.

    Returns:
        One sentence per check: what it proved, or why it was skipped.

    Raises:
        CheckFailedError: a check failed, or could not be carried out. After this and every other
            exception the directory has the name `OUT.failed-...`.
    """
    try:
        return _findings(weights, directory, quantized, out)
    except BaseException as error:
        aside = out.with_name(f"{out.name}.failed-{secrets.token_hex(3)}")
        os.rename(directory, aside)
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        reason = str(error)
        if not isinstance(error, UserError):
            reason = f"self-check: stopped by {type(error).__name__} ({first_line(error)})."
        raise CheckFailedError(
            f"{reason} The export is not usable; it was renamed to {aside}."
        ) from error


def _findings(weights: Weights, directory: Path, quantized: set[str], out: Path) -> list[str]:
    files = PlainReader(directory)
    compare_names(files.names(), set(weights.shapes), quantized, directory)
    with byte_progress("checking the export", weights.num_bf16_bytes) as on_bytes:
        for name, source in weights.bf16():
            _check_tensor(files, name, source, name in quantized)
            on_bytes(source.nbytes)
    begin_phase("comparing with transformers")
    finding = (
        f"{out}: {len(weights.shapes)} tensors read back, {len(quantized)} of them FP8,"
        " every value within half a step of its source."
    )
    return [finding, *_check_behavior(files, weights, quantized, directory)]


class PlainReader:
    """Reads the tensors of a Hugging Face directory with safetensors and numpy only."""

    def __init__(self, directory: Path) -> None:
        self._file_of: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._file_of |= dict.fromkeys(file.keys(), path)
        index = directory / "model.safetensors.index.json"
        file_names = {name: path.name for name, path in self._file_of.items()}
        if index.exists() and json.loads(index.read_bytes())["weight_map"] != file_names:
            raise CheckFailedError(
                f"{index}: does not list the tensors that its files store;"
                " the export is not consistent."
            )

    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype of the file."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def values(self, name: str, quantized: bool) -> Tensor:
        """Values in FP32; FP8 codes are looked up in the table and multiplied by their scales."""
        tensor = self.read(name)
        if not quantized:
            return tensor.float()
        multipliers = _expand(self.read(name + SCALE_SUFFIX), *tensor.shape)
        return torch.from_numpy(E4M3_VALUES[tensor.view(torch.uint8).numpy()] * multipliers).float()


def _expand(scale: Tensor, rows: int, columns: int) -> np.ndarray:
    """Scales of 128x128 blocks as one FP64 multiplier per element: [rows, columns]."""
    return scale.double().numpy().repeat(128, 0)[:rows].repeat(128, 1)[:, :columns]


def _check_tensor(files: PlainReader, name: str, source: Tensor, quantized: bool) -> None:
    written = files.read(name)
    dtype = torch.float8_e4m3fn if quantized else torch.bfloat16
    if written.shape != source.shape or written.dtype != dtype:
        raise CheckFailedError(
            f"self-check: '{name}' was written as {written.dtype} {list(written.shape)}."
        )
    if quantized:
        _check_codes(name, source, written, files.read(name + SCALE_SUFFIX))
    elif not torch.equal(written.view(torch.int16), source.view(torch.int16)):
        raise CheckFailedError(
            f"self-check: the BF16 tensor '{name}' differs from its source in some bytes."
        )


def _check_codes(name: str, source: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Check that `codes` [N, K] under `scale` are within half a step of `source`."""
    grid = tuple(-(-size // 128) for size in source.shape)
    valid = scale.dtype == torch.float32 and tuple(scale.shape) == grid
    if not valid or not bool((scale > 0).all() & scale.isfinite().all()):
        raise CheckFailedError(
            f"self-check: '{name}{SCALE_SUFFIX}' must be positive finite FP32 {list(grid)}."
        )
    for start in range(0, source.shape[0], _SLAB_ROWS):
        slab_codes = codes[start : start + _SLAB_ROWS]
        slab_scale = scale[start // 128 : (start + _SLAB_ROWS) // 128]
        multipliers = torch.from_numpy(_expand(slab_scale, *slab_codes.shape))
        expected = source[start : start + _SLAB_ROWS].double() / multipliers
        actual = torch.from_numpy(E4M3_VALUES[slab_codes.view(torch.uint8).numpy()])
        # A step of E4M3 is 1/8 of the power of two at or below the value, and 2^-9 among the
        # subnormals. FP32 scales add a relative rounding of 2^-24, which the factors above 1 allow
        # for.
        step = torch.exp2((torch.frexp(expected).exponent - 1).clamp(min=-6) - 3.0)
        within = (actual - expected).abs() <= 0.5 * step * (1 + 1e-5)
        bad = ~within | (expected.abs() > 448 * (1 + 1e-6))
        if bad.any():
            row, column = (int(index) for index in bad.nonzero()[0])
            value = actual[row, column] * multipliers[row, column]
            raise CheckFailedError(
                f"self-check: '{name}'[{start + row}, {column}] reads back as {value:.6g},"
                f" but its source is {source[start + row, column].item():.6g}."
            )


def _check_behavior(
    files: PlainReader, weights: Weights, quantized: set[str], out: Path
) -> list[str]:
    """Compare with transformers where possible; one sentence per comparison, done or skipped."""
    num_parameters = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    if num_parameters > SMALL_MODEL_PARAMETERS:
        return [
            f"logits against transformers not compared: {num_parameters:,} parameters"
            f" are above {SMALL_MODEL_PARAMETERS:,}."
        ]
    values = {name: files.values(name, name in quantized) for name in weights.shapes}
    difference = compare_with_transformers(out, values)
    findings = [
        "transformers and our decoder agree on these weights:"
        f" logits within {difference:.1e}, {GREEDY_TOKENS} greedy tokens equal."
    ]
    sizes = [size for name in quantized for size in weights.shapes[name]]
    odd_sizes = any(size > 128 and size % 128 for size in sizes)
    if odd_sizes or torch.cuda.is_available() or importlib.util.find_spec("accelerate") is None:
        return [
            *findings,
            "transformers' own FP8 loader not tried: it needs accelerate, no GPU,"
            " and sizes that are multiples of 128 or below it.",
        ]
    _check_transformers_loader(out, values)
    return [*findings, "transformers' own FP8 loader reads the same values."]


def compare_with_transformers(directory: Path, values: dict[str, Tensor]) -> float:
    """Compare transformers with our decoder, both in FP32 with these weights and one config.json.

    Our decoder continues a fixed prompt greedily. At each step both must choose the same token,
    unless the two best are closer than the tolerance.

    Args:
        directory: Hugging Face directory with the config.json.
        values: every weight, in FP32.

    Returns:
        The largest logit difference.

    Raises:
        CheckFailedError: tokens or logits differ.
    """
    config = ModelConfig.from_hf(read_json(directory / "config.json"))
    decoder = Decoder(config, compute_dtype=torch.float32)
    load_weights(decoder, values.items())
    reference = _transformers_model(directory, values)
    token_ids = [(7 * index + 3) % config.vocab_size for index in range(12)]
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            token_ids.append(int(_logits(decoder, token_ids)[-1].argmax()))
        ours = _logits(decoder, token_ids)
        theirs = reference(torch.tensor([token_ids])).logits[0].float()
    difference = (ours - theirs).abs().max().item()
    tolerance = 1e-3 * max(1.0, theirs.abs().max().item())
    best = theirs.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] > tolerance
    tokens_differ = (ours.argmax(-1) != theirs.argmax(-1)) & clear
    if not difference <= tolerance or tokens_differ.any():
        raise CheckFailedError(
            f"self-check: logits of transformers and our decoder differ by {difference:.3g}"
            f" (allowed {tolerance:.3g})."
        )
    return difference


def _transformers_model(directory: Path, values: dict[str, Tensor]) -> torch.nn.Module:
    """transformers' model of `directory` in FP32, not quantized, with the weights `values`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=False
    ).eval()
    missing, unexpected = model.load_state_dict(values, strict=False)
    model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise CheckFailedError(
            f"self-check: transformers does not know {unexpected} or lacks {missing}."
        )
    return model


def _logits(decoder: Decoder, token_ids: list[int]) -> Tensor:
    """Logits [T, V] of one sequence of T tokens."""
    length = len(token_ids)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    return decoder(torch.tensor(token_ids), torch.arange(length), cu_seqlens)


def _check_transformers_loader(out: Path, values: dict[str, Tensor]) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # transformers warns that it dequantizes and draws bars; both are expected.
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    loaded = dict(model.named_parameters())
    for name, value in values.items():
        difference = (loaded[name].detach().float() - value).abs().max().item()
        # transformers may round to BF16 in between: a relative 2^-8.
        if not difference <= 2**-8 * value.abs().max().item():
            raise CheckFailedError(
                f"self-check: transformers' FP8 loader reads other values for '{name}'"
                f" (largest difference {difference:.3g})."
            )
