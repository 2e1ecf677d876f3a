"""AdamW update of many parameters in place.

`adamw_reference` defines it, a kernel computes it on a GPU; `_definition_for` chooses.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from infir2.numerics import adamw_reference
from infir2.numerics.adamw_reference import Hyper, Moments
from infir2.numerics.kernels import usable


class AdamWUpdate(Protocol):
    """The signature of `adamw_reference` and `kernels.adamw`."""

    def adamw_(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        moments: Sequence[Moments],
        hyper: Hyper,
        clip: Tensor,
    ) -> None: ...


def _definition_for(parameter: Tensor) -> AdamWUpdate:
    if not usable(parameter.device):
        return adamw_reference
    from infir2.numerics.kernels import adamw  # imports triton, which may be missing elsewhere

    return adamw


@torch.no_grad()
def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[Moments],
    hyper: Hyper,
    clip: Tensor,
) -> None:
    """Update parameters and their moments in place.

    Args:
        parameters: FP32, contiguous, all on one device.
        gradients: of the parameters' shapes, all FP32 or all BF16.
        moments: one per parameter, all of one format.
        hyper: learning rate, betas and so on.
        clip: [] float32, a factor of the gradients.
    """
    if parameters:
        gradients = [gradient.contiguous() for gradient in gradients]
        _definition_for(parameters[0]).adamw_(parameters, gradients, moments, hyper, clip)
