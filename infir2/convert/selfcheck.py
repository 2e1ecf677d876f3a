"""The proof that ends an FP8 export: the files are read back without our reader and our quantiser.

1. Every tensor: names as the config calls for, BF16 tensors bit for bit, FP8 values within half a step of their source.
2. Small models: transformers and our decoder, given the dequantised weights, agree on logits and greedy tokens; and
   transformers' own FP8 loader sees the same values (where it can: its CPU path mistakes the block size of a matrix
   whose size is neither a multiple of 128 nor below it).
"""

import importlib.util
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from infir2.convert.weights import Weights, compare_names
from infir2.errors import CheckFailedError
from infir2.model import Decoder, ModelConfig
from infir2.model.hf_names import SCALE_SUFFIX, load_weights
from infir2.model.safetensors_io import read_json

SMALL_MODEL_PARAMETERS = 20_000_000
GREEDY_TOKENS = 16
_SLAB_ROWS = 1024  # multiple of 128; bounds the memory of the comparison

# Value of each of the 256 E4M3 codes: sign, 4 exponent bits (bias 7), 3 mantissa bits; exponent 0 is subnormal.
_CODE = np.arange(256)
_EXPONENT, _MANTISSA = (_CODE >> 3) & 15, _CODE & 7
_MAGNITUDE = np.where(
    _EXPONENT == 0, _MANTISSA / 8 * 2.0**-6, (1 + _MANTISSA / 8) * 2.0 ** (_EXPONENT - 7.0)
)
E4M3_VALUES = np.where(_CODE & 127 == 127, np.nan, np.where(_CODE & 128, -_MAGNITUDE, _MAGNITUDE))


def check_export(
    weights: Weights, out: Path, quantized: set[str], say: Callable[[str], None]
) -> None:
    """Raise CheckFailedError unless the FP8 directory `out` holds `weights`; on failure it is renamed to `OUT.failed-...`."""
    try:
        files = PlainReader(out)
        compare_names(files.names(), set(weights.shapes), quantized, out)
        for name, source in weights.bf16():
            _check_tensor(files, name, source, name in quantized)
        say(
            f"{out}: {len(weights.shapes)} tensors read back, {len(quantized)} of them FP8, every value within half a step of its source."
        )
        _check_behaviour(files, weights, out, say)
    except CheckFailedError as error:
        aside = out.with_name(f"{out.name}.failed-{secrets.token_hex(3)}")
        os.rename(out, aside)
        raise CheckFailedError(
            f"{error} The export is not usable and was set aside as {aside}."
        ) from error


class PlainReader:
    """The tensors of a Hugging Face directory, straight from safetensors and numpy."""

    def __init__(self, directory: Path) -> None:
        self._file_of: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._file_of |= dict.fromkeys(file.keys(), path)
        index = directory / "model.safetensors.index.json"
        if index.exists() and json.loads(index.read_bytes())["weight_map"] != {
            name: path.name for name, path in self._file_of.items()
        }:
            raise CheckFailedError(
                f"{index}: does not list the tensors that its files hold; the export is not consistent."
            )

    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def values(self, name: str, quantized: bool) -> Tensor:
        """FP32 values [N, K]; FP8 codes looked up in the table and multiplied by their block's scale."""
        tensor = self.read(name)
        if not quantized:
            return tensor.float()
        values = E4M3_VALUES[tensor.view(torch.uint8).numpy()] * _expand(
            self.read(name + SCALE_SUFFIX), *tensor.shape
        )
        return torch.from_numpy(values).float()


def _expand(scale: Tensor, rows: int, columns: int) -> np.ndarray:
    return scale.double().numpy().repeat(128, 0)[:rows].repeat(128, 1)[:, :columns]


def _check_tensor(files: PlainReader, name: str, source: Tensor, quantized: bool) -> None:
    written = files.read(name)
    if written.shape != source.shape or written.dtype != (
        torch.float8_e4m3fn if quantized else torch.bfloat16
    ):
        raise CheckFailedError(
            f"self-check: '{name}' was written as {written.dtype} {list(written.shape)}."
        )
    if not quantized:
        if not torch.equal(written.view(torch.int16), source.view(torch.int16)):
            raise CheckFailedError(
                f"self-check: the BF16 tensor '{name}' does not have the bytes of its source."
            )
        return
    scale = files.read(name + SCALE_SUFFIX)
    grid = tuple(-(-size // 128) for size in source.shape)
    if (
        scale.dtype != torch.float32
        or tuple(scale.shape) != grid
        or not bool((scale > 0).all() & scale.isfinite().all())
    ):
        raise CheckFailedError(
            f"self-check: '{name}{SCALE_SUFFIX}' must be positive finite FP32 {list(grid)}."
        )
    for start in range(0, source.shape[0], _SLAB_ROWS):
        codes = written[start : start + _SLAB_ROWS]
        expanded = torch.from_numpy(
            _expand(scale[start // 128 : (start + _SLAB_ROWS) // 128], *codes.shape)
        )
        wanted = source[start : start + _SLAB_ROWS].double() / expanded
        got = torch.from_numpy(E4M3_VALUES[codes.view(torch.uint8).numpy()])
        # A step of E4M3: 1/8 of the power of two below the value, 2^-9 among the subnormals. Scales in FP32 round by 2^-24.
        step = torch.exp2((torch.frexp(wanted).exponent - 1).clamp(min=-6) - 3.0)
        bad = ~((got - wanted).abs() <= 0.5 * step * (1 + 1e-5)) | (wanted.abs() > 448 * (1 + 1e-6))
        if bad.any():
            row, column = (int(index) for index in bad.nonzero()[0])
            raise CheckFailedError(
                f"self-check: '{name}'[{start + row}, {column}] reads back as {got[row, column] * expanded[row, column]:.6g} "
                f"where its source has {source[start + row, column].item():.6g}."
            )


def _check_behaviour(
    files: PlainReader, weights: Weights, out: Path, say: Callable[[str], None]
) -> None:
    num_parameters = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    if num_parameters > SMALL_MODEL_PARAMETERS:
        say(
            f"logits against transformers not compared: {num_parameters:,} parameters are above {SMALL_MODEL_PARAMETERS:,}."
        )
        return
    values = {
        name: files.values(name, name + SCALE_SUFFIX in files.names()) for name in weights.shapes
    }
    difference = compare_with_transformers(out, values)
    say(
        f"transformers and our decoder agree on these weights: logits within {difference:.1e}, {GREEDY_TOKENS} greedy tokens equal."
    )
    quantized_shapes = [
        weights.shapes[name] for name in values if name + SCALE_SUFFIX in files.names()
    ]
    odd_sizes = any(size > 128 and size % 128 for shape in quantized_shapes for size in shape)
    if odd_sizes or torch.cuda.is_available() or importlib.util.find_spec("accelerate") is None:
        say(
            "transformers' own FP8 loader not tried: it wants accelerate, no GPU, and sizes that are multiples of 128 or below it."
        )
        return
    _check_transformers_loader(out, values)
    say("transformers' own FP8 loader reads the same values.")


def compare_with_transformers(directory: Path, values: dict[str, Tensor]) -> float:
    """Largest logit difference between transformers and our decoder, both plain FP32 with these weights and one config.json.

    Our decoder continues a fixed prompt greedily; at each step both must choose the same token, unless the two best are
    nearer than the tolerance. CheckFailedError otherwise.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    decoder = Decoder(
        ModelConfig.from_hf(read_json(directory / "config.json")), compute_dtype=torch.float32
    )
    load_weights(decoder, values.items())
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = reference.load_state_dict(values, strict=False)
    reference.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise CheckFailedError(
            f"self-check: transformers does not know {unexpected} or lacks {missing}."
        )
    token_ids = [(7 * index + 3) % decoder.config.vocab_size for index in range(12)]
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            ours = _logits(decoder, token_ids)
            token_ids.append(int(ours[-1].argmax()))
        ours = _logits(decoder, token_ids)
        theirs = reference(torch.tensor([token_ids])).logits[0].float()
    difference = (ours - theirs).abs().max().item()
    tolerance = 1e-3 * max(1.0, theirs.abs().max().item())
    best = theirs.topk(2, dim=-1).values
    unlike = (ours.argmax(-1) != theirs.argmax(-1)) & (best[:, 0] - best[:, 1] > tolerance)
    if not difference <= tolerance or unlike.any():
        raise CheckFailedError(
            f"self-check: logits of transformers and our decoder differ by {difference:.3g} (allowed {tolerance:.3g})."
        )
    return difference


def _logits(decoder: Decoder, token_ids: list[int]) -> Tensor:
    length = len(token_ids)
    return decoder(
        torch.tensor(token_ids), torch.arange(length), torch.tensor([0, length], dtype=torch.int32)
    )


def _check_transformers_loader(out: Path, values: dict[str, Tensor]) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its warning that it dequantises, and its bars, are not news here
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, local_files_only=True
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    loaded = dict(model.named_parameters())
    for name, value in values.items():
        difference = (loaded[name].detach().float() - value).abs().max().item()
        if not difference <= 2**-8 * value.abs().max().item():  # it may round to BF16 on the way
            raise CheckFailedError(
                f"self-check: transformers' FP8 loader reads '{name}' otherwise (largest difference {difference:.3g})."
            )
