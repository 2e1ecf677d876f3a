"""A function as a custom operator: torch.compile sees the operator, eager mode calls the function itself."""

from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """The dispatcher costs 20 microseconds a call, which eager mode need not pay: these functions have no autograd and no
    variants by device. Under a compiler, `self.op` is the one node of the graph.

    Example: `@operator("infir2::quantize_rows")` over a function, then `@quantize_rows.register_fake` over its shapes.
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
    """Decorator of `Operator`."""
    return lambda function: Operator(name, function)
