"""The proof that a run's checkpoint and an FP8 export have the same FP8 bytes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from infir2.convert.weights import compare_names, file_scale_format, quantized_names, run_weights
from infir2.errors import CheckFailedError
from infir2.model.hf_names import SCALE_SUFFIX
from infir2.model.safetensors_io import HfWeights
from infir2.numerics import Fp8Linear, Fp8Tensor
from infir2.terminal import byte_progress


def verify_weights(run: str | Path, hf_dir: str | Path) -> int:
    """Compare the FP8 weights that training uses with those of an FP8 directory, byte by byte.

    Each master is quantized by `Fp8Linear`, the layer that trains. Codes and scales must be those
    of the file, the same layers must be FP8, and every other tensor must be its master rounded to
    BF16.

    Args:
        run: run directory (its newest checkpoint) or `checkpoints/step-N`.
        hf_dir: block-wise FP8 Hugging Face directory.

    Returns:
        The number of weights compared, all of them equal.

    Raises:
        CheckFailedError: names the first difference.
    """
    hf_dir = Path(hf_dir)
    weights = run_weights(Path(run))
    fp8 = weights.fp8
    assert fp8 is not None
    if not fp8.enabled:
        raise CheckFailedError(
            f"{weights.origin}: trains without FP8 (fp8.enabled = false),"
            " so it has no FP8 weights to compare."
        )
    scale_format = file_scale_format(hf_dir)
    if scale_format != fp8.scale_format:
        raise CheckFailedError(
            f"the run trains with {fp8.scale_format} scales, {hf_dir} declares {scale_format};"
            " export it again."
        )
    files = HfWeights(hf_dir)
    quantized = set(quantized_names(weights.config, fp8))
    compare_names(set(files.names()), set(weights.shapes), quantized, hf_dir)
    with byte_progress("comparing", weights.num_bf16_bytes) as on_bytes:
        for name in weights.shapes:
            master, stored = weights.read(name), files.read(name)
            if name in quantized:
                trained = training_codes(master, fp8.scale_format)
                _compare_codes(name, trained, stored, files.read(name + SCALE_SUFFIX))
            else:
                _compare_bf16(name, master.to(torch.bfloat16), stored)
            on_bytes(2 * master.numel())
    return len(weights.shapes)


def training_codes(master: Tensor, scale_format: str) -> Fp8Tensor:
    """Codes and scales that the training layer computes from an FP32 master [N, K]."""
    linear = nn.Linear(master.shape[1], master.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(master.float(), requires_grad=False)
    return Fp8Linear.from_linear(linear, scale_format).quantized_weight()


def _compare_codes(name: str, trained: Fp8Tensor, codes: Tensor, scale: Tensor) -> None:
    if (
        codes.shape != trained.codes.shape
        or codes.dtype != trained.codes.dtype
        or scale.shape != trained.scale.shape
    ):
        raise CheckFailedError(
            f"'{name}': the file stores {codes.dtype} {list(codes.shape)}"
            f" with scales {list(scale.shape)}."
        )
    if scale.dtype != torch.float32:
        raise CheckFailedError(
            f"'{name}{SCALE_SUFFIX}': must be FP32, the file stores {scale.dtype}."
        )
    index = _first_difference(trained.scale.view(torch.int32), scale.view(torch.int32))
    if index is not None:
        raise CheckFailedError(
            f"'{name}': scale of block {list(index)} is {trained.scale[index].item()!r} in the run"
            f" and {scale[index].item()!r} in the file."
        )
    run_bytes, file_bytes = trained.codes.view(torch.uint8), codes.view(torch.uint8)
    index = _first_difference(run_bytes, file_bytes)
    if index is not None:
        block = [i // 128 for i in index]
        raise CheckFailedError(
            f"'{name}'{list(index)}, block {block}: byte 0x{run_bytes[index].item():02X} in the run"
            f" and 0x{file_bytes[index].item():02X} in the file."
        )


def _compare_bf16(name: str, trained: Tensor, stored: Tensor) -> None:
    if stored.dtype != torch.bfloat16 or stored.shape != trained.shape:
        raise CheckFailedError(
            f"'{name}': the file stores {stored.dtype} {list(stored.shape)},"
            f" the run BF16 {list(trained.shape)}."
        )
    index = _first_difference(trained.view(torch.int16), stored.view(torch.int16))
    if index is not None:
        raise CheckFailedError(
            f"'{name}'{list(index)}: {trained[index].item()!r} in the run"
            f" and {stored[index].item()!r} in the file."
        )


def _first_difference(left: Tensor, right: Tensor) -> tuple[int, ...] | None:
    """Index of the first element that differs, or None."""
    if torch.equal(left, right):
        return None
    return tuple(int(i) for i in (left != right).nonzero()[0])
