"""InfiR2: train reasoning language models in block-wise FP8, from pre-training to RL."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Fp8Linear", "__version__", "convert_to_fp8"]


def __getattr__(name: str) -> Any:
    """`from infir2 import convert_to_fp8`, without importing torch before that."""
    if name in ("Fp8Linear", "convert_to_fp8"):
        return getattr(import_module("infir2.numerics"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
