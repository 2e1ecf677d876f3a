"""The definition of one AdamW update, with moments in FP32, BF16 or 8 bits.

8-bit moments are E4M3 codes with one power-of-two scale per 128 values: of the first moment m, and
of sqrt(v), whose range fits E4M3 (2**18 from smallest to largest). Codes are rounded
stochastically, upwards with the probability of the remainder: rounding to nearest would never
change a value that decays by less than half a step (beta2 = 0.95 moves sqrt(v) by 2.5 %, half a
step of E4M3 is 3 to 6 %). The noise is a hash of index and step, so that a resumed run continues
bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infir2.numerics.formats import E4M3, GROUP
from infir2.numerics.quantize_reference import block_scale, decode

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of one update.

    Example: `Hyper(step=1, lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1)`.
    """

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float

    @property
    def corrections(self) -> tuple[float, float]:
        """Bias corrections of both moments, 1 - beta ** step."""
        return 1 - self.beta1**self.step, 1 - self.beta2**self.step


@dataclass(frozen=True)
class Moments:
    """A parameter's moments m and v (sqrt(v) for 8-bit moments), in the parameter's shape.

    8-bit moments are uint8 codes with scales per 128 values, float32 [ceil(size / 128)].
    """

    m: Tensor
    v: Tensor
    m_scale: Tensor | None = None
    v_scale: Tensor | None = None


def new_moment(
    parameter: Tensor, moment_dtype: str, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """A zero moment of `parameter` and its scales ("fp8" only).

    Args:
        parameter: the parameter.
        moment_dtype: "fp32", "bf16" or "fp8".
        device: "cpu" gives pinned memory if the process has a GPU.
    """
    pinned = torch.cuda.is_available() and torch.device(device).type == "cpu"
    if moment_dtype != "fp8":
        dtype = torch.float32 if moment_dtype == "fp32" else torch.bfloat16
        return torch.zeros(parameter.shape, dtype=dtype, device=device, pin_memory=pinned), None
    codes = torch.zeros(parameter.shape, dtype=torch.uint8, device=device, pin_memory=pinned)
    return codes, torch.ones(-(-parameter.numel() // GROUP), device=device, pin_memory=pinned)


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[Moments],
    hyper: Hyper,
    clip: Tensor,
) -> None:
    """Update parameters and moments in place; see `adamw.adamw_`."""
    for parameter, gradient, state in zip(parameters, gradients, moments, strict=True):
        _update(parameter, gradient.float() * clip, state, hyper)


def _update(p: Tensor, g: Tensor, state: Moments, hyper: Hyper) -> None:
    first, root_or_second = _values(state.m, state.m_scale), _values(state.v, state.v_scale)
    second = root_or_second if state.v_scale is None else root_or_second.square()
    first = first * hyper.beta1 + g * (1 - hyper.beta1)
    second = second * hyper.beta2 + g * g * (1 - hyper.beta2)
    correction1, correction2 = hyper.corrections
    p.mul_(1 - hyper.lr * hyper.decay).sub_(
        hyper.lr * (first / correction1) / ((second / correction2).sqrt() + hyper.eps)
    )
    _store(state.m, state.m_scale, first, hyper.step)
    _store(state.v, state.v_scale, second if state.v_scale is None else second.sqrt(), hyper.step)


def _values(moment: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return moment.float()
    values = decode(moment.view(E4M3).flatten(), torch.float32)
    return (_groups(values) * scale[:, None]).flatten()[: moment.numel()].view(moment.shape)


def _store(moment: Tensor, scale: Tensor | None, values: Tensor, step: int) -> None:
    if scale is None:
        moment.copy_(values)
        return
    groups = _groups(values.flatten())
    scale.copy_(block_scale(groups.abs().amax(dim=1), "pow2"))
    scaled = groups / scale[:, None]
    bits = scaled.abs().view(torch.int32)
    noise = _noise(groups.numel(), step, groups.device).view(groups.shape)
    normal = ((bits + noise) & -(1 << 20)).view(torch.float32)
    subnormal = (scaled.abs() * 512 + noise.float() * 2.0**-20).floor() * 2.0**-9
    magnitude = torch.where(bits < 0x3C800000, subnormal, normal).clamp_max(448.0)
    codes = torch.where(scaled < 0, -magnitude, magnitude).to(E4M3).view(torch.uint8)
    moment.copy_(codes.flatten()[: moment.numel()].view(moment.shape))


def _groups(flat: Tensor) -> Tensor:
    return F.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)


def _noise(size: int, step: int, device: torch.device) -> Tensor:
    """20 random bits per index, int32: the same hash as in `kernels.adamw`."""
    x = (
        torch.arange(size, dtype=torch.int64, device=device) * 0x9E3779B1 + step * 0x85EBCA77
    ) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return ((x ^ (x >> 16)) & 0xFFFFF).to(torch.int32)
