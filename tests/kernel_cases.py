"""Kernel cases for the tests under Triton's interpreter, the GPU tests and bench/kernels.py.

`CONVERSIONS` and `FUSED` map a name to two functions of (x, scale_format): results of the kernel
and of the reference, lists of `Fp8Tensor` that must be bit-equal. For a fused producer the
reference quantizes the BF16 result of the same producer without the quantizer; `producer_results`
compares that result with the FP64 definition, within the last bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from infir2.numerics import apply_rope, ops
from infir2.numerics.formats import E4M3, ROW_BLOCK, TILE_BLOCK, Fp8Tensor, WeightRows
from infir2.numerics.kernels import api as kernels
from infir2.numerics.kernels import rope as rope_kernels
from infir2.numerics.kernels import softmax as softmax_kernels
from infir2.numerics.quantize_reference import block_scale
from infir2.numerics.quantize_reference import quantize as quantize_reference
from infir2.numerics.quantize_reference import transpose as transpose_reference

EPS = 1e-6
Check = tuple[Callable[[Tensor, str], list[Fp8Tensor]], Callable[[Tensor, str], list[Fp8Tensor]]]


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    """BF16 activations [rows, columns] whose tokens differ in magnitude by factors of e**2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(
        2 * torch.randn(rows, 1, generator=generator)
    )
    return x.bfloat16()


def hostile(rows: int, columns: int, seed: int = 0) -> Tensor:
    """BF16 [rows, columns]; the rows cycle through blocks that a scale or a cast can get wrong."""
    x = gaussian(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    # Halfway between two codes.
    tie = torch.randint(8, 16, (columns,), generator=generator).float() + 0.5
    patterns = [
        lambda row: row.zero_(),
        lambda row: row.zero_().neg_(),  # minus zero
        lambda row: row[columns // 2 :].fill_(torch.nan),
        lambda row: row[-1:].fill_(-torch.inf),
        lambda row: row.mul_(2.0**-120),  # scales at the smallest exponent, values subnormal
        lambda row: row.mul_(2.0**-133),
        lambda row: row.fill_(2.0**-133),
        lambda row: row.copy_(torch.sign(row) * 3.3895313892515355e38),  # the largest BF16
        lambda row: row.copy_(
            1.75 * torch.exp2(torch.randint(-30, 30, (columns,), generator=generator).float())
        ),
        lambda row: row.copy_(tie * torch.sign(row)),
        lambda row: row[:1].fill_(30000.0),  # one outlier: the rest lands in the subnormals
        lambda row: row.mul_(1e-30),
        lambda row: row.copy_(torch.linspace(-448, 448, columns)),
    ]
    for index in range(rows):
        choice = index % (2 * len(patterns))
        if choice < len(patterns):
            patterns[choice](x[index])
    return x


def mismatches(actual: Fp8Tensor, expected: Fp8Tensor) -> int:
    """Number of code bytes and scales that differ; NaN scales are equal to each other."""
    assert (actual.shape, actual.block, actual.scale_format) == (
        expected.shape,
        expected.block,
        expected.scale_format,
    )
    codes = (actual.codes.cpu().view(torch.uint8) != expected.codes.cpu().view(torch.uint8)).sum()
    a, b = actual.scale.cpu(), expected.scale.cpu()
    return int(codes + (~((a == b) | (a.isnan() & b.isnan()))).sum())


def second_layout(x: Tensor, scale_format: str) -> Fp8Tensor:
    """The weight gradient's operand as the reference defines it."""
    if scale_format == "pow2":
        return transpose_reference(quantize_reference(x))
    return quantize_reference(x.t(), TILE_BLOCK, scale_format)


def _weight_reference(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    w = quantize_reference(_master(x).bfloat16(), TILE_BLOCK, scale_format)
    return [w, transpose_reference(w)]


def _master(x: Tensor) -> Tensor:
    """FP32 values between BF16 ones, ties included."""
    return (
        x.float().view(torch.int32)
        + 0x7FFF
        + torch.arange(x.shape[1], device=x.device, dtype=torch.int32) % 3
    ).view(torch.float32)


def norm_weight(x: Tensor) -> Tensor:
    """FP32 norm weight [C] around one."""
    return 1 + 0.3 * torch.sin(torch.arange(x.shape[1], device=x.device, dtype=torch.float32))


def gate_and_up(x: Tensor) -> tuple[Tensor, Tensor]:
    """Halves [R, C] of one [R, 2C] matrix, computed from x."""
    fused = torch.cat([x * 0.5, x.flip(0).roll(3, 1)], dim=1)
    return fused[:, : x.shape[1]], fused[:, x.shape[1] :]


def upstream(x: Tensor) -> Tensor:
    """An output gradient [R, C], computed from x."""
    return x.roll(1, 0) * 2.0**-7


def _rows_of(values: Tensor, first: int, scale: Tensor) -> WeightRows:
    return WeightRows(values, first, scale, torch.empty_like(values, dtype=E4M3))


def _empty_scales(x: Tensor) -> Tensor:
    rows, columns = (-(-size // 128) for size in x.shape)
    return torch.zeros(rows, columns + 2, device=x.device)[:, :-2]


def _weights_at_once(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    masters = [_master(x), _master(x)[: x.shape[0] // 2], torch.ones(3, 16, device=x.device)]
    rows = [_rows_of(master, 0, _empty_scales(master)) for master in masters]
    kernels.quantize_weights(rows, scale_format)
    return [_fp8(row.codes, row.scale, scale_format) for row in rows]


def _weights_one_by_one(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    masters = [_master(x), _master(x)[: x.shape[0] // 2], torch.ones(3, 16)]
    return [quantize_reference(m.bfloat16(), TILE_BLOCK, scale_format) for m in masters]


def _weight_in_shards(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    """Of ranks with 100 rows each, which end inside blocks."""
    shards = list(enumerate(_master(x).split(100)))
    largest = [_empty_scales(x) for _ in shards]
    kernels.largest_magnitudes(
        [_rows_of(part, 100 * i, largest[i]) for i, part in shards if part.numel()]
    )
    scale = block_scale(torch.stack(largest).amax(0), scale_format)
    rows = [_rows_of(part, 100 * i, scale) for i, part in shards]
    kernels.encode_weights(rows, scale_format)
    codes = torch.cat([row.codes.view(torch.uint8) for row in rows if row.codes is not None])
    return [_fp8(codes.view(E4M3), scale, scale_format)]


def _fp8(codes: Tensor | None, scale: Tensor, scale_format: str) -> Fp8Tensor:
    assert codes is not None
    return Fp8Tensor(codes, scale, TILE_BLOCK, scale_format)


def _stacked(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    parts = [kernels.quantize(part, TILE_BLOCK, scale_format) for part in _parts(x)]
    return [kernels.stack(parts[-n:], transposed) for n in (2, 3) for transposed in (False, True)]


def _stacked_expected(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    found = []
    for n in (2, 3):
        whole = quantize_reference(torch.cat(_parts(x)[-n:]), TILE_BLOCK, scale_format)
        found += [whole, transpose_reference(whole)]
    return found


def _parts(x: Tensor) -> list[Tensor]:
    """Three matrices, of which two have 128 and 256 rows."""
    return [x.new_ones(128, x.shape[1]), x.new_full((256, x.shape[1]), 3.0), x]


CONVERSIONS: dict[str, Check] = {
    "stacked": (_stacked, _stacked_expected),
    "weights at once": (_weights_at_once, _weights_one_by_one),
    "weight in shards": (_weight_in_shards, lambda x, f: _weights_one_by_one(x, f)[:1]),
    "rows": (
        lambda x, f: [kernels.quantize(x, ROW_BLOCK, f)],
        lambda x, f: [quantize_reference(x, ROW_BLOCK, f)],
    ),
    "tiles": (
        lambda x, f: [kernels.quantize(x, TILE_BLOCK, f)],
        lambda x, f: [quantize_reference(x, TILE_BLOCK, f)],
    ),
    "gradient": (
        lambda x, f: list(kernels.quantize_gradient(x, f)),
        lambda x, f: [quantize_reference(x, ROW_BLOCK, f), quantize_reference(x.t(), ROW_BLOCK, f)],
    ),
    "input": (
        lambda x, f: list(kernels.quantize_input(x, f)),
        lambda x, f: [quantize_reference(x, ROW_BLOCK, f), second_layout(x, f)],
    ),
    "weight": (
        lambda x, f: [
            kernels.quantize_weight(_master(x), f),
            kernels.transpose(kernels.quantize_weight(_master(x), f)),
        ],
        _weight_reference,
    ),
    "second layout only": (
        lambda x, f: [kernels.quantize_transposed(x, f)],
        lambda x, f: [second_layout(x, f)],
    ),
    "transpose rows": (
        lambda x, f: [kernels.transpose(kernels.quantize(x, ROW_BLOCK, "pow2"))],
        lambda x, f: [transpose_reference(quantize_reference(x, ROW_BLOCK, "pow2"))],
    ),
    "transpose tiles": (
        lambda x, f: [kernels.transpose(kernels.quantize(x, TILE_BLOCK, f))],
        lambda x, f: [transpose_reference(quantize_reference(x, TILE_BLOCK, f))],
    ),
}


def _norm(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    weight = norm_weight(x)
    rows, rstd = kernels.rms_norm_quantize(x, weight, EPS, scale_format)
    return [rows, kernels.rms_norm_transposed(x, rstd, weight, scale_format)]


def _norm_expected(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    # Uses the kernel's rstd, an FP32 sum in no fixed order; `producer_results` checks it in FP64.
    _, rstd = kernels.rms_norm_quantize(x, norm_weight(x), EPS, scale_format)
    y = (x.float() * rstd[:, None] * norm_weight(x).bfloat16().float()).bfloat16()
    return [quantize_reference(y, ROW_BLOCK, scale_format), second_layout(y, scale_format)]


def _swiglu(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    gate, up = gate_and_up(x)
    return [
        kernels.swiglu_quantize(gate, up, scale_format),
        kernels.swiglu_transposed(gate, up, scale_format),
    ]


def _swiglu_expected(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    y = kernels.swiglu_product(*gate_and_up(x))
    return [quantize_reference(y, ROW_BLOCK, scale_format), second_layout(y, scale_format)]


def _swiglu_backward(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    return list(kernels.swiglu_backward_quantize(upstream(x), *gate_and_up(x), scale_format))


def _swiglu_backward_expected(x: Tensor, scale_format: str) -> list[Fp8Tensor]:
    grad = kernels.swiglu_backward(upstream(x), *gate_and_up(x))
    return [
        quantize_reference(grad, ROW_BLOCK, scale_format),
        quantize_reference(grad.t(), ROW_BLOCK, scale_format),
    ]


FUSED: dict[str, Check] = {
    "norm": (_norm, _norm_expected),
    "swiglu": (_swiglu, _swiglu_expected),
    "swiglu backward": (_swiglu_backward, _swiglu_backward_expected),  # C must be a multiple of 128
}


def producer_results(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (kernel, definition) results of the producers and their backwards.

    x: finite BF16 [R, C].
    """
    weight = norm_weight(x)
    gate, up = gate_and_up(x)
    grad = upstream(x)
    y, rstd = kernels.rms_norm(x, weight, EPS)
    grad_x, grad_weight = kernels.rms_norm_backward(grad, x, rstd, weight, None)
    grads = kernels.swiglu_backward(grad, gate, up)
    leaves = [t.detach().cpu().clone().requires_grad_() for t in (x, weight, gate, up)]
    normed, product = ops.rms_norm(leaves[0], leaves[1], EPS), ops.swiglu(leaves[2], leaves[3])
    torch.autograd.backward([normed, product], [grad.cpu(), grad.cpu()])
    gradients = [leaf.grad for leaf in leaves]
    assert all(g is not None for g in gradients)
    residual = upstream(grad)
    with_residual, _ = kernels.rms_norm_backward(grad, x, rstd, weight, residual)
    return {
        "norm": (y, normed.detach()),
        "reciprocal root mean square": (
            rstd,
            x.cpu().double().square().mean(dim=1).add(EPS).rsqrt().float(),
        ),
        "norm backward and residual": (with_residual, grad_x.cpu() + residual.cpu()),
        "norm backward": (grad_x, gradients[0]),
        "norm weight": (grad_weight, gradients[1]),
        "swiglu": (kernels.swiglu_product(gate, up), product.detach()),
        "swiglu backward": (grads, torch.cat([gradients[2], gradients[3]], dim=1)),
    }


def rope_results(
    tokens: int, q_heads: int, k_heads: int, size: int, device: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (kernel, definition) results of bias + rotation, and of the inverse rotation."""
    heads = q_heads + 2 * k_heads
    fused = gaussian(tokens, heads * size).to(device)
    bias = torch.linspace(-1, 1, heads * size, device=device)
    angles = torch.arange(tokens, device=device)[:, None, None] * torch.linspace(
        1, 0.01, size // 2, device=device
    )
    cos, sin = angles.cos(), angles.sin()
    q, k, v = fused.view(tokens, heads, size).split([q_heads, k_heads, k_heads], dim=1)
    biased = fused + bias.bfloat16()
    expected = [
        apply_rope(t, cos, sin)
        for t in biased.view(tokens, heads, size).split([q_heads, k_heads, k_heads], dim=1)[:2]
    ]
    rotated = rope_kernels.rope(q, k, v, bias, cos, sin, False)
    back = rope_kernels.rope(q.contiguous(), k.contiguous(), v, None, cos, sin, True)
    expected_back = [apply_rope(t, cos, -sin) for t in (q, k)]
    return {
        "rope": (
            rotated,
            torch.cat(
                [*expected, biased.view(tokens, heads, size)[:, q_heads + k_heads :]], dim=1
            ).flatten(1),
        ),
        "rope back": (back, torch.cat([*expected_back, v], dim=1).flatten(1)),
    }


def softmax_results(
    rows: int, columns: int, temperature: float, device: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (kernel, FP64) results of the softmax of the head and of its backward."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, columns, generator=generator).mul_(5).to(device)
    labels = torch.randint(0, columns, (rows,), generator=generator).to(device)
    grad = torch.randn(rows, generator=generator).to(device)
    logprobs, normalizer, entropy = softmax_kernels.label_logprobs(
        logits, labels, temperature, True
    )
    scaled = logits.double().requires_grad_()
    exact = scaled.div(temperature).log_softmax(dim=1)
    exact_entropy = -(exact.exp() * exact).sum(dim=1)
    exact_logprobs = exact.gather(1, labels[:, None]).squeeze(1)
    none, grad_entropy = logits.new_empty(0), grad.flip(0).contiguous()

    def backward(*of_entropy: Tensor) -> Tensor:
        return softmax_kernels.label_logprobs_backward(
            logits, labels, normalizer, grad, *of_entropy, temperature
        )

    plain = torch.autograd.grad(exact_logprobs, scaled, grad.double(), retain_graph=True)[0]
    of_entropy = torch.autograd.grad(exact_entropy, scaled, grad_entropy.double())[0]
    return {
        "log-probabilities": (logprobs, exact_logprobs.detach()),
        "entropy": (entropy, exact_entropy.detach()),
        "gradient": (backward(none, none), plain),
        "gradient with entropy": (backward(entropy, grad_entropy), plain + of_entropy),
    }
