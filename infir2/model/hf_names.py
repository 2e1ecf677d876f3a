"""Conversion between a decoder's parameters and tensors with Hugging Face's names.

`exported_fp8_weights` is the only source of FP8 bytes: files, weight sync and verification all read
it. An FP8 Linear `name` becomes `name.weight` (E4M3 codes) and `name.weight_scale_inv` (FP32
scales, one per 128x128 block); every other parameter becomes its BF16-rounded master.
"""

import hashlib
import reprlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infir2.config.schema import Fp8Section, ScaleFormat
from infir2.errors import CheckpointError
from infir2.model.memory import require_memory
from infir2.model.safetensors_io import HfWeights, has_nan_code, read_json
from infir2.numerics import Fp8Linear, convert_to_fp8

SCALE_SUFFIX = "_scale_inv"
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
# `scale_fmt` as transformers and SGLang spell it; without that key the scales are any FP32 values
_SCALE_FORMATS: dict[str | None, ScaleFormat] = {"ue8m0": "pow2", "float": "fp32", None: "fp32"}


def exported_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters rounded to BF16, with their Hugging Face names.

    Raises CheckpointError for a model that holds only FP8 codes, since it has no masters.
    """
    for name, module, leaf in _parameter_owners(model):
        parameter = getattr(module, leaf)
        if parameter is None:
            raise CheckpointError(
                f"{name} has FP8 codes and no master; export from the training checkpoint instead"
            )
        yield name, parameter.detach().to(torch.bfloat16)


def exported_fp8_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Codes and scales of every Fp8Linear, whether trained or loaded, and the rest in BF16."""
    for name, module, leaf in _parameter_owners(model):
        if isinstance(module, Fp8Linear) and leaf == "weight":
            quantized = module.quantized_weight()
            yield name, quantized.codes
            yield name + SCALE_SUFFIX, quantized.scale
        else:
            yield name, getattr(module, leaf).detach().to(torch.bfloat16)


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes, by name; the device does not matter."""
    digests = {}
    for name, tensor in tensors:
        content = tensor.detach().to("cpu").contiguous()
        dtype = str(content.dtype).removeprefix("torch.")
        digest = hashlib.sha256(f"{dtype} {list(content.shape)} ".encode())
        raw: Any = content.reshape(-1).view(torch.uint8).numpy()
        digest.update(raw)
        digests[name] = digest.hexdigest()
    return digests


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of config.json for the FP8 layers of `model`.

    Raises CheckpointError when the model has no FP8 layer or layers of two scale formats.
    """
    formats = {module.scale_format for module in model.modules() if isinstance(module, Fp8Linear)}
    if len(formats) != 1:
        raise CheckpointError(
            f"an FP8 export needs FP8 layers of one scale format, not {sorted(formats)}; "
            "set fp8.enabled = true"
        )
    skipped = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, Fp8Linear)
    ]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0" if formats == {"pow2"} else "float",
        "modules_to_not_convert": skipped if "lm_head" in skipped else [*skipped, "lm_head"],
    }


def load_directory(model: nn.Module, directory: Path, device: torch.device | str) -> None:
    """Load a Hugging Face directory into a decoder on the meta device.

    Layers that the files store in FP8 become `Fp8Linear` with the files' codes. Raises
    CheckpointError as `load_weights` and `HfWeights` do, ConfigError if it does not fit the memory.
    """
    weights = HfWeights(directory)
    section = read_json(directory / "config.json").get("quantization_config")
    if section is not None:
        fp8 = _fp8_section(section, model, weights)
        convert_to_fp8(model, fp8.scale_format, fp8.skip_modules)
    codes = sum(m.weight.numel() for m in model.modules() if isinstance(m, Fp8Linear))
    require_memory(4 * sum(p.numel() for p in model.parameters()) - 3 * codes, device)
    load_weights(model, weights, device)


def _fp8_section(raw: Any, model: nn.Module, weights: HfWeights) -> Fp8Section:
    """The settings that a `quantization_config` describes, checked against the stored scales."""
    if not isinstance(raw, dict):
        raise CheckpointError("config.json: quantization_config must be an object")
    supported = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "fmt": "e4m3",
    }
    for key, value in supported.items():
        stored = raw.get(key, value if key in ("fmt", "activation_scheme") else None)
        if stored != value:
            raise CheckpointError(
                f"config.json: quantization_config.{key} = {reprlib.repr(stored)} is not "
                f"supported; only {value!r} is"
            )
    scale_fmt = raw.get("scale_fmt")
    if not isinstance(scale_fmt, str | None) or scale_fmt not in _SCALE_FORMATS:
        raise CheckpointError(
            f"config.json: quantization_config.scale_fmt = {reprlib.repr(scale_fmt)} is not "
            "supported; use 'ue8m0' or 'float'"
        )
    patterns = raw.get("modules_to_not_convert") or []
    if not isinstance(patterns, list) or not all(isinstance(item, str) for item in patterns):
        raise CheckpointError(
            "config.json: quantization_config.modules_to_not_convert must be a list of names"
        )
    skipped = _skipped_modules(patterns, model, weights)
    return Fp8Section(scale_format=_SCALE_FORMATS[scale_fmt], skip_modules=skipped)


def _skipped_modules(patterns: list[str], model: nn.Module, weights: HfWeights) -> tuple[str, ...]:
    """Linears that `modules_to_not_convert` lists; exactly the others must have stored scales."""
    tensor_names, skipped = set(weights.names()), []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        listed = any(
            name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
            for pattern in patterns
        )
        if listed == (f"{name}.weight{SCALE_SUFFIX}" in tensor_names):
            stored = "FP8 scales" if listed else "no FP8 scales"
            raise CheckpointError(
                f"{weights.directory}: {name} has {stored}, which modules_to_not_convert "
                "contradicts; export it again"
            )
        if listed:
            skipped.append(name)
    return tuple(skipped)


def load_weights(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device | str | None = None,
) -> None:
    """Load every parameter of `model` by name; `Fp8Linear` layers load pairs of codes and scales.

    Parameters on the meta device are created on `device`. If the embedding is tied and the tensors
    contain a head, the two must be equal. Raises CheckpointError for an unknown, missing, repeated
    or wrongly shaped tensor; the model is then partly loaded.
    """
    owners = {name: (module, leaf) for name, module, leaf in _parameter_owners(model)}
    missing, pairs = set(owners), dict[str, dict[str, Tensor]]()
    tied_head: Tensor | None = None
    for name, tensor in tensors:
        weight_name = name.removesuffix(SCALE_SUFFIX)
        if weight_name not in owners:
            if name == "lm_head.weight":
                tied_head = tensor
            # old Llama files store these derived values
            elif not name.endswith("rotary_emb.inv_freq"):
                raise CheckpointError(
                    f"tensor {name} does not belong to the model that config.json describes"
                )
            continue
        module, leaf = owners[weight_name]
        is_fp8 = name != weight_name or tensor.dtype == torch.float8_e4m3fn
        if is_fp8 and not (isinstance(module, Fp8Linear) and leaf == "weight"):
            raise CheckpointError(
                f"tensor {name} belongs to an FP8 weight, but its layer is in high precision here; "
                "make the lists of skipped modules equal"
            )
        if weight_name not in missing:
            raise CheckpointError(
                f"tensor {weight_name} occurs twice; every weight must have its own name"
            )
        if is_fp8:
            pair = pairs.setdefault(weight_name, {})
            pair["scale" if name != weight_name else "codes"] = tensor
            if len(pair) < 2:
                continue
            assert isinstance(module, Fp8Linear)
            _load_codes(weight_name, module, pairs.pop(weight_name), device)
        else:
            _load_master(name, module, leaf, tensor, device)
        missing.discard(weight_name)
    _check_complete(missing, incomplete=pairs)
    if tied_head is not None:
        _check_tied(model, tied_head)


def _check_complete(missing: Iterable[str], incomplete: Iterable[str]) -> None:
    """Raise for `missing` weights; the `incomplete` ones lack only their codes or their scales."""
    names, halves = sorted(missing), [f"{name} (its codes or its scales)" for name in incomplete]
    if names:
        raise CheckpointError(
            f"{len(names)} tensors are missing, such as {(sorted(halves) or names)[0]}; "
            "the model is incomplete"
        )


def _load_codes(
    name: str, module: Fp8Linear, pair: dict[str, Tensor], device: torch.device | str | None
) -> None:
    target = torch.device(device if device is not None else _device(module))
    target = torch.device("cpu") if target.type == "meta" else target
    codes, scale = pair["codes"].to(target), pair["scale"].to(target)
    try:
        module.load_codes(codes, checked_scale(name, codes, scale))
    except ValueError as error:
        raise CheckpointError(f"tensor {name} cannot be loaded: {error}") from error


def checked_scale(name: str, codes: Tensor, scale: Tensor) -> Tensor:
    """The stored scales of FP8 weight `name` in FP32, without rounding.

    Files store them in FP32, in BF16 or FP16 (Qwen3-FP8), or as exponents (E8M0). Raises
    CheckpointError for another dtype, a scale that is not finite and positive, and a NaN code.
    """
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"tensor {name}{SCALE_SUFFIX} has dtype {scale.dtype}, which is not a scale's; "
            "copy the model again"
        )
    scale = scale.float()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(
            f"tensor {name}{SCALE_SUFFIX} has scales that are not finite and positive; "
            "copy the model again or go back to an earlier export"
        )
    if codes.dtype == torch.float8_e4m3fn and has_nan_code(codes):
        raise CheckpointError(
            f"tensor {name} has a NaN code; copy the model again or go back to an earlier export"
        )
    return scale


def _load_master(
    name: str, module: nn.Module, leaf: str, tensor: Tensor, device: torch.device | str | None
) -> None:
    parameter = getattr(module, leaf)
    if parameter is None:
        raise CheckpointError(
            f"tensor {name} is {tensor.dtype}, but its layer serves FP8 codes; load FP8 weights"
        )
    if tensor.shape != parameter.shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(tensor.shape)}, "
            f"but the model needs {list(parameter.shape)}"
        )
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"tensor {name} has dtype {tensor.dtype}, which is not a weight's; "
            "convert the model to BF16"
        )
    if parameter.is_meta:
        parameter = nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device=device or "cpu")
        )
        setattr(module, leaf, parameter)
    with torch.no_grad():
        parameter.copy_(tensor)


def _check_tied(model: nn.Module, stored: Tensor) -> None:
    embedding = dict(model.named_parameters())["model.embed_tokens.weight"]
    if not torch.equal(stored.to(embedding.device, embedding.dtype), embedding):
        raise CheckpointError(
            "lm_head.weight differs from the embedding, but config.json has "
            "tie_word_embeddings = true; set it to false"
        )


def _device(module: nn.Module) -> torch.device:
    return next(t.device for t in (*module.parameters(), *module.buffers()))


def _parameter_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, attribute) of every parameter, in model order, tied ones once.

    A weight that FP8 codes have replaced is still listed, although its parameter is None.
    """
    seen = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            codes_only = parameter is None and leaf == "weight" and isinstance(module, Fp8Linear)
            if (parameter is None and not codes_only) or (
                parameter is not None and id(parameter) in seen
            ):
                continue
            seen.add(id(parameter) if parameter is not None else id(module))
            yield f"{prefix}.{leaf}" if prefix else leaf, module, leaf
