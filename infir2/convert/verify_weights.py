"""The proof that a run and an FP8 export hold the same FP8 bytes."""

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
    """Compare the FP8 weights that training uses with those of a file, byte by byte; returns how many tensors agree.

    run: run directory or `checkpoints/step-N`. hf_dir: block-wise FP8 Hugging Face directory.
    Each master goes through `Fp8Linear`, the layer that trains; its codes and scales must be the file's, the same layers
    must be FP8, and all other tensors must be the masters rounded to BF16.
    Raises CheckFailedError that names the first difference.
    """
    hf_dir = Path(hf_dir)
    weights = run_weights(Path(run))
    fp8 = weights.fp8
    assert fp8 is not None
    if not fp8.enabled:
        raise CheckFailedError(
            f"{weights.origin}: trains without FP8 (fp8.enabled = false), so it has no FP8 weights to compare."
        )
    scale_format = file_scale_format(hf_dir)
    if scale_format != fp8.scale_format:
        raise CheckFailedError(
            f"the run trains with {fp8.scale_format} scales, {hf_dir} declares {scale_format}; export it again."
        )
    files = HfWeights(hf_dir)
    quantized = set(quantized_names(weights.config, fp8))
    compare_names(set(files.names()), set(weights.shapes), quantized, hf_dir)
    with byte_progress("comparing", weights.num_bf16_bytes) as on_bytes:
        for name in weights.shapes:
            master = weights.read(name)
            if name in quantized:
                _compare_codes(
                    name,
                    training_codes(master, fp8.scale_format),
                    files.read(name),
                    files.read(name + SCALE_SUFFIX),
                )
            else:
                _compare_bf16(name, master.to(torch.bfloat16), files.read(name))
            on_bytes(2 * master.numel())
    return len(weights.shapes)


def training_codes(master: Tensor, scale_format: str) -> Fp8Tensor:
    """Codes and scales that the training layer itself makes of an FP32 master [N, K]."""
    plain = nn.Linear(master.shape[1], master.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(master.float(), requires_grad=False)
    return Fp8Linear.from_linear(plain, scale_format).quantized_weight()


def _compare_codes(name: str, ours: Fp8Tensor, codes: Tensor, scale: Tensor) -> None:
    if (
        codes.shape != ours.codes.shape
        or codes.dtype != ours.codes.dtype
        or scale.shape != ours.scale.shape
    ):
        raise CheckFailedError(
            f"'{name}': the file holds {codes.dtype} {list(codes.shape)} with scales {list(scale.shape)}."
        )
    if scale.dtype != torch.float32:
        raise CheckFailedError(
            f"'{name}{SCALE_SUFFIX}': must be FP32, the file holds {scale.dtype}."
        )
    for row, column in _first_difference(ours.scale.view(torch.int32), scale.view(torch.int32)):
        run_scale, file_scale = ours.scale[row, column].item(), scale[row, column].item()
        raise CheckFailedError(
            f"'{name}': scale of block [{row}, {column}] is {run_scale!r} in the run and {file_scale!r} in the file."
        )
    run_bytes, file_bytes = ours.codes.view(torch.uint8), codes.view(torch.uint8)
    for row, column in _first_difference(run_bytes, file_bytes):
        raise CheckFailedError(
            f"'{name}'[{row}, {column}], block [{row // 128}, {column // 128}]: "
            f"byte 0x{run_bytes[row, column].item():02X} in the run and 0x{file_bytes[row, column].item():02X} in the file."
        )


def _compare_bf16(name: str, ours: Tensor, theirs: Tensor) -> None:
    if theirs.dtype != torch.bfloat16 or theirs.shape != ours.shape:
        raise CheckFailedError(
            f"'{name}': the file holds {theirs.dtype} {list(theirs.shape)}, the run BF16 {list(ours.shape)}."
        )
    for index in _first_difference(ours.view(torch.int16), theirs.view(torch.int16)):
        raise CheckFailedError(
            f"'{name}'{list(index)}: {ours[index].item()!r} in the run and {theirs[index].item()!r} in the file."
        )


def _first_difference(ours: Tensor, theirs: Tensor) -> list[tuple[int, ...]]:
    """Index of the first element that differs, as a list of none or one."""
    if torch.equal(ours, theirs):
        return []
    return [tuple(int(i) for i in (ours != theirs).nonzero()[0])]
