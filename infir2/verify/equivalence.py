"""Mathematical equality by the math-verify library, for worker processes.

Only this file imports math-verify.
"""

import logging
import re
from typing import Any

_QUOTIENT = re.compile(r"\\[dt]?frac|\d\s*(?:/|\\div)\s*\d")


def prepare() -> None:
    """Import and warm up the library: its first parse builds tables, which takes seconds."""
    # It warns that its own time limit is disabled; the pool's limit kills the process instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    assert equivalent("\\frac{1}{2}", "0.5")


def equivalent(reference: str, answer: str) -> bool:
    """Whether two answers (LaTeX or plain, without `\\boxed`) are the same mathematical object.

    An integer reference requires a number: like the DeepScaleR grader, this rejects an unevaluated
    arithmetic expression (`3+4` for 7), which may just repeat the question.
    """
    from math_verify import parse, verify

    # The library's time limits are disabled: their SIGALRM neither stops C code nor survives a
    # broad except.
    gold, predicted = (
        parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer)
    )
    if not gold or not predicted or _repeats_the_question(gold[0], predicted[0], answer):
        return False
    return bool(verify(gold, predicted, timeout_seconds=None))


def _repeats_the_question(gold: Any, predicted: Any, answer: str) -> bool:
    from sympy import Basic, Eq, Expr, Integer, Mul, Number, NumberSymbol, UnevaluatedExpr

    if not isinstance(gold, Integer):
        return False
    if _QUOTIENT.search(answer):  # the parser has already divided it
        return True
    if isinstance(predicted, Eq):
        predicted = predicted.rhs
    if not isinstance(predicted, Expr) or isinstance(predicted, Number | NumberSymbol):
        return False
    percent = isinstance(predicted, Mul) and any(
        isinstance(factor, UnevaluatedExpr) for factor in predicted.args
    )
    return isinstance(predicted, Basic) and not predicted.free_symbols and not percent
