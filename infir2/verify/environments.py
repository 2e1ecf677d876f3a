"""Environments of several turns: what a policy's turn is answered with.

An environment is a class with two methods:

    reset(row): a new episode, for a row of the data, a dict.
    step(action) -> str | None: the answer to the policy's turn, a text; None ends the episode.

It must be deterministic: every turn is answered by a new object that has seen the earlier turns, so
that a resumed run, or another process, answers the same.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

MAX_CHARACTERS, MAX_DIGITS = 500, 1000


class Environment(Protocol):
    """See the top of this file."""

    def reset(self, row: dict[str, Any]) -> None: ...

    def step(self, action: str) -> str | None: ...


class Calculator:
    """Answers a turn whose last call is `<calculator>12 * (3 + 4)</calculator>` with `84`."""

    _CALL = re.compile(r"<calculator>([^<>]*)</calculator>")

    def reset(self, row: dict[str, Any]) -> None:
        """It remembers nothing."""

    def step(self, action: str) -> str | None:
        """The value of the last call, or "error"; None without a call."""
        calls = self._CALL.findall(action)
        return calculate(calls[-1]) if calls else None


def calculate(text: str) -> str:
    """The value of a sum, difference, product, quotient or power of numbers; "error" otherwise.

    Example: calculate("2 ** 10 / 3") == "341.3333333333333".
    """
    try:
        value = _value(ast.parse(text[: MAX_CHARACTERS + 1].strip(), mode="eval").body)
        is_number = isinstance(value, int) or math.isfinite(value)
        return str(value) if len(text) <= MAX_CHARACTERS and is_number else "error"
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError, TypeError):
        return "error"


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise ValueError("not a calculation")
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Pow) and abs(right) * math.log10(abs(left) + 1) > MAX_DIGITS:
        raise ValueError("too large")
    value = _OPERATORS[type(node.op)](left, right)
    if isinstance(value, complex) or abs(value) > 10**MAX_DIGITS:
        raise ValueError("no real number, or too large")
    return value


_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def observe(name: str, row: dict[str, Any], actions: Sequence[str]) -> str | None:
    """The answer to the last of an episode's turns, by an environment `module:Class`."""
    module, _, class_name = name.partition(":")
    environment: Environment = getattr(import_module(module), class_name)()
    environment.reset(row)
    answer = None
    for action in actions:
        answer = environment.step(action)
    if not isinstance(answer, str | None):
        raise TypeError(f"step returned {type(answer).__name__}, which is neither text nor None")
    return answer
