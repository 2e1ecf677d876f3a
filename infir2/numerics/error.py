"""Error of quantized values against a reference."""

import math

import torch
from torch import Tensor


def relative_error(reference: Tensor, value: Tensor) -> float:
    """`|value - reference| / |reference|`, Frobenius norms in FP64.

    0 if both are zero, inf if only the reference is.
    """
    norm = float(torch.linalg.vector_norm(reference.detach().double()))
    error = float(torch.linalg.vector_norm(value.detach().double() - reference.detach().double()))
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm


def snr_db(reference: Tensor, value: Tensor) -> float:
    """Signal-to-noise ratio of `value` in decibels (28 dB is a relative error of 0.0398)."""
    error = relative_error(reference, value)
    return math.inf if error == 0 else -20.0 * math.log10(error)
