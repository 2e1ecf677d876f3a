"""Custom operators: one node for torch.compile, plain functions in eager mode."""

from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """A function and its registered operator `op`.

    These functions have no autograd and no variants by device, so eager mode skips the dispatcher,
    which costs 20 microseconds a call.

    Example: decorate a function with `@operator("infir2::quantize_rows")`, and the function that
    allocates its results with `@quantize_rows.register_fake`.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.op = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.op.register_fake
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        """The function's results."""
        return self.op(*arguments) if torch.compiler.is_compiling() else self.function(*arguments)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorate a function to make it an `Operator` with this qualified name."""
    return lambda function: Operator(name, function)
